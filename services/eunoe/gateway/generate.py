"""The calls that read a memory: Generate, Score and InspectMemory are checked here and passed to the stream's owner."""

import uuid
from collections.abc import AsyncGenerator

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.clients.model_worker import ModelWorkerClient
from eunoe.gateway.placement import Placement
from eunoe.gateway.resources import checked_request_id
from eunoe.internal.v1.state_store_pb2 import Lease
from eunoe.runtime.errors import InvalidRequest

DEFAULT_MAX_TOKENS = 128
MAX_MAX_TOKENS = 4096
MAX_TEMPERATURE = 10.0
MAX_NUM_STOPS = 8
MAX_STOP_BYTES = 64

_ROLES = ("system", "user", "assistant")
_FRESHNESS = (api.FRESHNESS_ACCEPTED, api.FRESHNESS_APPLIED)


def generate(
    placement: Placement, name: str, request: api.GenerateRequest, timeout_seconds: float | None
) -> AsyncGenerator[api.GenerateResponse, None]:
    """The answer, token by token, from the stream of this full name. Closing the iterator cancels the work.

    Raises:
        InvalidRequest: If a value is out of range.
    """
    checked = _checked_generate(name, request)

    def call(worker: ModelWorkerClient, lease: Lease) -> AsyncGenerator[api.GenerateResponse, None]:
        return worker.generate(checked, lease, timeout_seconds)

    return placement.stream_from_owner(name, call, lambda response: response.HasField("catching_up"))


def score(
    placement: Placement, name: str, request: api.ScoreRequest, timeout_seconds: float | None
) -> AsyncGenerator[api.ScoreResponse, None]:
    """The text's log-probabilities given the stream of this full name. Closing the iterator cancels the work.

    Raises:
        InvalidRequest: If there is no text, or the freshness is none.
    """
    if not request.text:
        raise InvalidRequest("there is no text to score")
    checked = api.ScoreRequest(stream=name, text=request.text, freshness=_checked_freshness(request.freshness))

    def call(worker: ModelWorkerClient, lease: Lease) -> AsyncGenerator[api.ScoreResponse, None]:
        return worker.score(checked, lease, timeout_seconds)

    return placement.stream_from_owner(name, call, lambda response: response.HasField("catching_up"))


def inspect_memory(
    placement: Placement, name: str, request: api.InspectMemoryRequest, timeout_seconds: float | None
) -> AsyncGenerator[api.InspectMemoryResponse, None]:
    """Which tokens the committed memory of the stream of this full name keeps."""
    named = api.InspectMemoryRequest(name=name, with_log=request.with_log)

    def call(worker: ModelWorkerClient, lease: Lease) -> AsyncGenerator[api.InspectMemoryResponse, None]:
        return worker.inspect_memory(named, lease, timeout_seconds)

    return placement.stream_from_owner(name, call)


def _checked_generate(name: str, request: api.GenerateRequest) -> api.GenerateRequest:
    checked = api.GenerateRequest()
    checked.CopyFrom(request)
    checked.stream = name
    checked.max_tokens = request.max_tokens or DEFAULT_MAX_TOKENS
    if checked.max_tokens > MAX_MAX_TOKENS:
        raise InvalidRequest(f"max_tokens={checked.max_tokens} is above {MAX_MAX_TOKENS}")
    checked.sampling.CopyFrom(_checked_sampling(request.sampling))
    if len(request.stop) > MAX_NUM_STOPS or any(not 1 <= len(s.encode()) <= MAX_STOP_BYTES for s in request.stop):
        raise InvalidRequest(f"stop has at most {MAX_NUM_STOPS} texts of 1 to {MAX_STOP_BYTES} bytes each")
    if request.HasField("chat") and not request.chat.turns:
        raise InvalidRequest("chat has no turns")
    for turn in request.chat.turns:
        if turn.role not in _ROLES:
            raise InvalidRequest(f"role {turn.role!r} is none of {', '.join(_ROLES)}")
    checked.freshness = _checked_freshness(request.freshness)
    checked_request_id(request.request_id)
    if request.remember:
        if checked.freshness == api.FRESHNESS_APPLIED:
            raise InvalidRequest("remember needs freshness ACCEPTED: an answer is remembered behind what it has read")
        # Even if the client will not repeat the call, this gateway may, at another worker.
        checked.request_id = request.request_id or f"gateway-{uuid.uuid4().hex}"
    return checked


def _checked_sampling(sampling: api.Sampling) -> api.Sampling:
    if not 0.0 <= sampling.temperature <= MAX_TEMPERATURE:  # a NaN fails too
        raise InvalidRequest(f"temperature={sampling.temperature:g} is not in 0..{MAX_TEMPERATURE:g}")
    if not 0.0 <= sampling.top_p <= 1.0:
        raise InvalidRequest(f"top_p={sampling.top_p:g} is not in 0..1")
    checked = api.Sampling()
    checked.CopyFrom(sampling)
    checked.top_p = sampling.top_p or 1.0
    return checked


def _checked_freshness(freshness: api.Freshness) -> api.Freshness:
    freshness = freshness or api.FRESHNESS_ACCEPTED
    if freshness not in _FRESHNESS:
        raise InvalidRequest(f"freshness={freshness} is no Freshness")
    return freshness
