"""Where everything lies. All keys of a tenant share a hash tag, so that one function call can change any of them."""

import re

from eunoe.runtime.errors import InvalidRequest

TENANT_PATTERN = re.compile(r"[a-z0-9-]{1,64}")
_NAME_PATTERN = re.compile(r"tenants/([a-z0-9-]{1,64})/streams/([A-Za-z0-9._-]{1,128})")

# Outside every tenant: hints, which a sweep repairs, and API keys.
TENANTS = "eunoe:tenants"
WORKERS = "eunoe:workers"
API_KEYS = "eunoe:{api-keys}"


def parse_name(name: str) -> tuple[str, str]:
    """(tenant, stream id) of a resource name.

    Raises:
        InvalidRequest: If it is no full stream name.
    """
    match = _NAME_PATTERN.fullmatch(name)
    if match is None:
        raise InvalidRequest(f"{name!r} is not tenants/{{tenant}}/streams/{{stream}}")
    return match[1], match[2]


def check_tenant(tenant: str) -> str:
    """The tenant, if it is well formed.

    Raises:
        InvalidRequest.
    """
    if TENANT_PATTERN.fullmatch(tenant) is None:
        raise InvalidRequest(f"{tenant!r} is no tenant: 1 to 64 of a-z, 0-9 and -")
    return tenant


def live_stream(name: str) -> str:
    tenant, stream_id = parse_name(name)
    return f"{_tag(tenant)}:stream:{stream_id}"


def deleted_stream(tenant: str, uid: str) -> str:
    return f"{_tag(tenant)}:deleted:{uid}"


def stream_ids(tenant: str) -> str:
    """Index of the tenant's streams, in the order of their ids."""
    return f"{_tag(tenant)}:streams"


def deleted_uids(tenant: str) -> str:
    """Index of deleted streams of which something is left."""
    return f"{_tag(tenant)}:deleted"


def totals(tenant: str) -> str:
    return f"{_tag(tenant)}:totals"


def log_index(tenant: str, uid: str) -> str:
    """Index of a log's records by their ends."""
    return f"{_tag(tenant)}:log:{uid}"


def log_record(tenant: str, uid: str, start: int) -> str:
    return f"{_tag(tenant)}:log:{uid}:{start}"


def outcome(tenant: str, uid: str, request_id: str) -> str:
    return f"{_tag(tenant)}:outcome:{uid}:{request_id}"


def outcome_index(tenant: str, uid: str) -> str:
    """Index of a stream's outcomes by the end of their time in ms since 1970."""
    return f"{_tag(tenant)}:outcomes:{uid}"


def staged_index(tenant: str, uid: str) -> str:
    """Index of chunks staged for a stream and not committed, by the end of their time in ms since 1970."""
    return f"{_tag(tenant)}:staged:{uid}"


def erasure(tenant: str, request_id: str) -> str:
    return f"{_tag(tenant)}:erasure:{request_id}"


def pending_key(tenant: str, stream_id: str) -> str:
    """The wrapped key of a stream that is not there yet, while its chunks are staged."""
    return f"{_tag(tenant)}:pending-key:{stream_id}"


def chunk(tenant: str, chunk_id: str) -> str:
    return f"{_tag(tenant)}:chunk:{chunk_id}"


def worker(worker_id: str) -> str:
    return f"eunoe:worker:{worker_id}"


def backlog(model: str) -> str:
    """Index of a model's streams by accepted - applied."""
    return f"eunoe:backlog:{model}"


def api_key(key_id: str) -> str:
    return f"{API_KEYS}:{key_id}"


def _tag(tenant: str) -> str:
    return f"eunoe:{{{tenant}}}"
