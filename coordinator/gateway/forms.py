"""The first file in a form, as browsers and curl send it (multipart/form-data: RFC 7578; RFC 2046, section 5.1).

It searches for the boundaries between parts. A general parser of mail takes minutes for a body that is made to be hard to read.
"""

from __future__ import annotations

from email import message_from_bytes
from email.message import EmailMessage, Message
from email.policy import HTTP

from potluck.errors import InvalidRequest

PARTS_LIMIT = 100
"""How many parts of a form are searched for a file."""
HEAD_LIMIT_BYTES = 3 * 1024
"""The head of a part. A file's name of 255 bytes has a quarter of this where each byte is escaped; the time to read a head grows with
the square of its size."""
HEADS_LIMIT_BYTES = 6 * 1024
"""The heads that are read: those that name a file."""
_CONTENT_TYPE_LIMIT = 1024
_BOUNDARY_LIMIT = 70
"""Characters, as in the standard."""
_PLAIN = ("", "7bit", "8bit", "binary")


def first_file(content_type: str, body: bytes) -> tuple[str, bytes]:
    """(its type, its bytes) of the first part with a file's name; `content_type` is the request's header. Raises InvalidRequest."""
    delimiter = b"--" + _boundary(content_type)
    end = -2 if body.startswith(delimiter) else body.find(b"\r\n" + delimiter)
    left = HEADS_LIMIT_BYTES
    for _ in range(PARTS_LIMIT):
        begin = end + 2 + len(delimiter)
        if end == -1 or body.startswith(b"--", begin):
            break
        head_begin = body.find(b"\r\n", begin, begin + HEAD_LIMIT_BYTES)
        head_end = body.find(b"\r\n\r\n", head_begin, head_begin + HEAD_LIMIT_BYTES)
        if head_begin < 0 or head_end < 0:
            raise InvalidRequest(
                f"the form cannot be read: a part has no head, or one of over {HEAD_LIMIT_BYTES} bytes"
            )
        end = body.find(b"\r\n" + delimiter, head_end)
        if end < 0:
            raise InvalidRequest("the form cannot be read: its end is cut off")
        text = body[head_begin + 2 : head_end + 4]
        if b"filename" not in text.lower():
            continue
        left -= len(text)
        if left < 0:
            raise InvalidRequest(f"the form cannot be read: the heads of its parts are over {HEADS_LIMIT_BYTES} bytes")
        head = _head(text)
        if head.get_filename() is not None:
            coding = str(head.get("Content-Transfer-Encoding", "")).strip().lower()
            if coding not in _PLAIN:
                raise InvalidRequest(f"the file in the form is encoded as {coding[:40]!r}: send its bytes as they are")
            return head.get_content_type(), body[head_end + 4 : end]
    raise InvalidRequest("the form has no file: send one as a field of its own (curl: -F file=@image.png)")


def _boundary(content_type: str) -> bytes:
    head = EmailMessage(HTTP)
    try:
        if len(content_type) > _CONTENT_TYPE_LIMIT:
            raise ValueError
        head["Content-Type"] = content_type
        boundary = head.get_boundary("")
    except (ValueError, LookupError, AttributeError, RecursionError):
        # The standard library raises these for headers that it cannot read.
        boundary = ""
    if not 0 < len(boundary) <= _BOUNDARY_LIMIT or not boundary.isascii():
        raise InvalidRequest("the form cannot be read: its Content-Type has no boundary")
    return boundary.encode()


def _head(head: bytes) -> Message:
    try:
        found = message_from_bytes(head, policy=HTTP)
        found.get_filename(), found.get_content_type()
        return found
    except (ValueError, LookupError, AttributeError, RecursionError) as error:
        raise InvalidRequest("the form cannot be read: the head of a part is malformed") from error
