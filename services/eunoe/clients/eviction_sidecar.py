"""Calls to the eviction sidecar, for the engine thread: blocking, or not waited for at all."""

import threading
from collections.abc import Callable
from typing import Any

import grpc

from eunoe.internal.v1 import eviction_sidecar_pb2 as pb
from eunoe.internal.v1 import eviction_sidecar_pb2_grpc
from eunoe.runtime.errors import EunoeError, from_rpc_error
from eunoe.runtime.grpc_channel import open_blocking_channel

DEADLINE_SECONDS = 0.5
# A sidecar that is started again within this gets to know what was evicted meanwhile.
_RECORD_SECONDS = 60.0
_MAX_RECORDS_UNDER_WAY = 1000


class EvictionSidecarClient:
    """Calls of one sidecar. Nothing is repeated: what fails or takes too long is decided without it.

    Args:
        address: unix:path.
        deadline_seconds: Of each call that is waited for.
    """

    def __init__(self, address: str, deadline_seconds: float = DEADLINE_SECONDS) -> None:
        self._channel = open_blocking_channel(address)
        self._stub = eviction_sidecar_pb2_grpc.EvictionSidecarServiceStub(self._channel)
        self._deadline_seconds = deadline_seconds
        self._under_way: set[Any] = set()
        self._comparison: Any = None
        self._has_ended = threading.Condition()

    def choose_policy(self, stream: str) -> pb.ChoosePolicyResponse:
        """Which policy decides for the stream, by its full name; errors as `score_slots`."""
        request = pb.ChoosePolicyRequest(stream=stream)
        response: pb.ChoosePolicyResponse = _waited_for(self._stub.ChoosePolicy, request, self._deadline_seconds)
        return response

    def score_slots(self, request: pb.ScoreSlotsRequest, spent_seconds: float = 0.0) -> pb.ScoreSlotsResponse:
        """Scores of all layers and heads, of which the deadline is so much nearer than usual.

        Raises:
            PolicyNotFound: If the policy is not there.
            InvalidRequest: If the features are not what was meant.
            DeadlineTooShort, Unavailable.
            EunoeError: If the answer is none.
        """
        timeout = max(0.0, self._deadline_seconds - spent_seconds)
        response: pb.ScoreSlotsResponse = _waited_for(self._stub.ScoreSlots, request, timeout)
        return response

    @property
    def is_comparing(self) -> bool:
        """Whether the answer of the last comparison is still to come."""
        return self._comparison is not None and not self._comparison.done()

    def compare_policies(self, request: pb.ComparePoliciesRequest, on_lost: Callable[[str], None]) -> None:
        """Have policies compared, some time; any thread calls `on_lost` with the reason if they cannot be."""
        self._comparison = self._stub.ComparePolicies.future(request, timeout=_RECORD_SECONDS)
        self._comparison.add_done_callback(
            lambda call: None if call.code() is grpc.StatusCode.OK else on_lost(call.details())
        )

    def record_eviction(self, request: pb.RecordEvictionRequest, on_lost: Callable[[], None]) -> None:
        """Have an eviction recorded as soon as the sidecar is there; any thread calls `on_lost` if it cannot be."""
        with self._has_ended:
            if len(self._under_way) >= _MAX_RECORDS_UNDER_WAY:
                on_lost()
                return
            call = self._stub.RecordEviction.future(request, timeout=_RECORD_SECONDS, wait_for_ready=True)
            self._under_way.add(call)
        call.add_done_callback(lambda call: self._note_end(call, on_lost))

    def flush(self, timeout_seconds: float) -> None:
        """Wait until no eviction is on its way to be recorded, but no longer than that."""
        with self._has_ended:
            self._has_ended.wait_for(lambda: not self._under_way, timeout_seconds)

    def close(self) -> None:
        """End all calls."""
        self._channel.close()

    def _note_end(self, call: Any, on_lost: Callable[[], None]) -> None:
        if call.code() is not grpc.StatusCode.OK:
            on_lost()
        with self._has_ended:
            self._under_way.discard(call)
            self._has_ended.notify_all()


def _waited_for(method: Callable[..., Any], request: Any, timeout_seconds: float) -> Any:
    try:
        response = method(request, timeout=timeout_seconds)
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error
    if response is None:
        # grpc takes a status of OK without a message for an answer.
        raise EunoeError("the sidecar answered nothing")
    return response
