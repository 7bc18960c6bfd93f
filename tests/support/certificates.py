"""A self-signed certificate for 127.0.0.1 and localhost, only for tests: everybody has its key. Made with

    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 36500 -subj "/CN=potluck tests" \\
        -addext "subjectAltName=IP:127.0.0.1,DNS:localhost"
"""

from __future__ import annotations

import ssl
from pathlib import Path

CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBozCCAUmgAwIBAgIUXfC1cJG4O43A+5QeOiQPWaM8xJ8wCgYIKoZIzj0EAwIw
GDEWMBQGA1UEAwwNcG90bHVjayB0ZXN0czAgFw0yNjExMzAwNTE0MjBaGA8yMTI2
MTEwNjA1MTQyMFowGDEWMBQGA1UEAwwNcG90bHVjayB0ZXN0czBZMBMGByqGSM49
AgEGCCqGSM49AwEHA0IABDg6wdWdZbUunVQnBf6Ic7lUXnUlNDuf7fD3Qflkn70u
FhlaijKh4G+CzW8sR2HDWMfO2vcDsQvUubxLGc6j4POjbzBtMB0GA1UdDgQWBBRg
UQMOBlP+iw7TOG4PgCyJjnNwoTAfBgNVHSMEGDAWgBRgUQMOBlP+iw7TOG4PgCyJ
jnNwoTAPBgNVHRMBAf8EBTADAQH/MBoGA1UdEQQTMBGHBH8AAAGCCWxvY2FsaG9z
dDAKBggqhkjOPQQDAgNIADBFAiEA2NB6P4+YgT0BLapqyLAJqkZAZaQK9ojCoXfE
72HDDEgCIFrivpbs+iodkupc8seOW7S2/CBU4lwJq8nlUCnTul2k
-----END CERTIFICATE-----
"""
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg1Sxgiax8N9KbVhFb
qptA6KYyFB211wHrdB76nyqSr9yhRANCAAQ4OsHVnWW1Lp1UJwX+iHO5VF51JTQ7
n+3w90H5ZJ+9LhYZWooyoeBvgs1vLEdhw1jHztr3A7EL1Lm8SxnOo+Dz
-----END PRIVATE KEY-----
"""


def server_context(folder: Path) -> ssl.SSLContext:
    """TLS 1.3 with this certificate, whose file is written to `folder`."""
    file = folder / "server.pem"
    file.write_text(CERTIFICATE + KEY)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(file)
    return context


def client_context() -> ssl.SSLContext:
    """Trusts this certificate, and no other."""
    return ssl.create_default_context(cadata=CERTIFICATE)
