"""Keys, certificates and TLS contexts of closed clusters. The only home of `cryptography`, which open clusters never import."""
