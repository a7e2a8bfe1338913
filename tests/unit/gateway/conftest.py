"""A state store for the gateway's units, in the test's own process: it knows keys and workers, nothing else."""

from collections import Counter

import pytest

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.runtime.errors import Unauthenticated


class DirectoryStore:
    """The part of StateStoreClient that authentication and the model directory use.

    Attributes:
        keys: Secret -> tenant.
        workers: The worker directory.
        num_calls: How often each method was called.
    """

    def __init__(self) -> None:
        self.keys: dict[str, str] = {}
        self.workers: list[pb.Worker] = []
        self.num_calls: Counter[str] = Counter()

    async def authenticate(self, request: pb.AuthenticateRequest) -> pb.AuthenticateResponse:
        self.num_calls["authenticate"] += 1
        if request.secret not in self.keys:
            raise Unauthenticated("no such key")
        return pb.AuthenticateResponse(tenant=self.keys[request.secret])

    async def list_workers(self, request: pb.ListWorkersRequest) -> pb.ListWorkersResponse:
        self.num_calls["list_workers"] += 1
        return pb.ListWorkersResponse(workers=self.workers)


class Clock:
    """Seconds that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store() -> DirectoryStore:
    return DirectoryStore()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def model() -> api.Model:
    return api.Model(name="tiny", model_digest="d1", vocab_size=512, max_positions=512)
