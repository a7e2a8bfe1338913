"""Calls to the eviction sidecar, for the engine thread: blocking, or not waited for at all."""

import threading
from collections.abc import Callable
from typing import Any

import grpc

from eunoe.internal.v1 import eviction_sidecar_pb2 as pb
from eunoe.internal.v1 import eviction_sidecar_pb2_grpc
from eunoe.runtime.errors import from_rpc_error
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
        self._lock = threading.Lock()

    def choose_policy(self, stream: str) -> pb.ChoosePolicyResponse:
        """Which policy decides for the stream, by its full name."""
        response: pb.ChoosePolicyResponse = self._waited_for(
            self._stub.ChoosePolicy, pb.ChoosePolicyRequest(stream=stream)
        )
        return response

    def score_slots(self, request: pb.ScoreSlotsRequest) -> pb.ScoreSlotsResponse:
        """Scores of all layers and heads.

        Raises:
            PolicyNotFound: If the policy is not there.
            InvalidRequest: If the features are not what was meant.
            DeadlineTooShort, Unavailable.
        """
        response: pb.ScoreSlotsResponse = self._waited_for(self._stub.ScoreSlots, request)
        return response

    @property
    def is_comparing(self) -> bool:
        """Whether the answer of the last comparison is still to come."""
        return self._comparison is not None and not self._comparison.done()

    def compare_policies(self, request: pb.ComparePoliciesRequest) -> None:
        """Have policies compared, some time; whatever becomes of it."""
        self._comparison = self._stub.ComparePolicies.future(request, timeout=_RECORD_SECONDS)

    def record_eviction(self, request: pb.RecordEvictionRequest) -> bool:
        """Have an eviction recorded, as soon as the sidecar is there; False if too many others wait for it."""
        with self._lock:
            if len(self._under_way) >= _MAX_RECORDS_UNDER_WAY:
                return False
            call = self._stub.RecordEviction.future(request, timeout=_RECORD_SECONDS, wait_for_ready=True)
            self._under_way.add(call)
        call.add_done_callback(self._forget)
        return True

    def close(self) -> None:
        """End all calls."""
        self._channel.close()

    def _waited_for(self, method: Callable[..., Any], request: Any) -> Any:
        try:
            return method(request, timeout=self._deadline_seconds)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    def _forget(self, call: Any) -> None:
        with self._lock:
            self._under_way.discard(call)
