"""Names of resources: tenants/{tenant}/streams/{stream}, always within the caller's own tenant."""

import base64
import binascii
import re
import uuid

from eunoe.runtime.errors import InvalidRequest, StreamNotFound

MAX_REQUEST_ID_BYTES = 64

_STREAM_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_NAME = re.compile(r"tenants/([^/]+)/streams/([^/]+)")


def resolved(name: str, tenant: str) -> str:
    """The full name of a stream that the caller names, "-" standing for the caller's tenant.

    Raises:
        InvalidRequest: If it is no stream's name.
        StreamNotFound: If it is another tenant's, whether it exists or not.
    """
    match = _NAME.fullmatch(name)
    if match is None or not _STREAM_ID.fullmatch(match[2]):
        raise InvalidRequest("a stream is named tenants/{tenant}/streams/{stream}, {stream} of [A-Za-z0-9._-]{1,128}")
    if match[1] not in ("-", tenant):
        raise StreamNotFound("no such stream")
    return stream_name(match[2], tenant)


def new_name(stream_id: str, tenant: str) -> str:
    """The full name of a stream to make; an empty id gets a random one.

    Raises:
        InvalidRequest: If the id has other characters than [A-Za-z0-9._-] or more than 128.
    """
    stream_id = stream_id or uuid.uuid4().hex
    if not _STREAM_ID.fullmatch(stream_id):
        raise InvalidRequest("a stream's id is 1 to 128 of [A-Za-z0-9._-]")
    return stream_name(stream_id, tenant)


def stream_name(stream_id: str, tenant: str) -> str:
    return f"tenants/{tenant}/streams/{stream_id}"


def checked_request_id(request_id: str) -> str:
    """The id itself.

    Raises:
        InvalidRequest: If it is longer than 64 bytes.
    """
    if len(request_id.encode()) > MAX_REQUEST_ID_BYTES:
        raise InvalidRequest(f"a request_id has at most {MAX_REQUEST_ID_BYTES} bytes")
    return request_id


def page_token(last_name: str) -> str:
    """An opaque token for the page behind the stream of this name."""
    return base64.urlsafe_b64encode(last_name.rpartition("/")[2].encode()).decode()


def stream_id_before_page(token: str) -> str:
    """The stream id that a page starts behind; empty for the first.

    Raises:
        InvalidRequest: If the token is none of ours.
    """
    try:
        stream_id = base64.b64decode(token, altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, UnicodeDecodeError):
        stream_id = "/"
    if stream_id and not _STREAM_ID.fullmatch(stream_id):
        raise InvalidRequest("page_token is none that ListStreams gave out")
    return stream_id
