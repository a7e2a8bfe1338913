"""Model workers in this process, over the real state store and Redis, with a tiny model."""

import asyncio
import dataclasses
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.clients.model_worker import ModelWorkerClient
from eunoe.clients.state_store import StateStoreClient
from eunoe.decoder.tiny import write_tiny_model
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.model_worker.config import WorkerConfig
from eunoe.model_worker.worker import ModelWorker
from eunoe.runtime.grpc_channel import open_channel

WORDS = ["the", "of", "and", "to", "in", "that", "was", "he", "for", "his", "with", "as", "be", "they", "größe", "雨"]


def text(num_bytes: int, seed: int = 0) -> bytes:
    """Seeded words, some of more than one byte a character; whole characters only."""
    generator = random.Random(seed)
    words: list[str] = []
    while len(" ".join(words).encode()) < num_bytes:
        words.extend(generator.choices(WORDS, k=50))
    return " ".join(words).encode()[:num_bytes].decode(errors="ignore").encode()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_tiny_model(directory)
    return directory


@dataclass
class Platform:
    """A state store and any number of workers of one model.

    Attributes:
        config: What workers are started with; its model name is the test's own.
    """

    store: StateStoreClient
    tenant: str
    config: WorkerConfig
    workers: list[ModelWorker] = field(default_factory=list)
    deaths: list[ModelWorker] = field(default_factory=list)

    async def worker(self, **settings: Any) -> ModelWorker:
        """Start a worker; settings override the config's."""
        worker = ModelWorker(dataclasses.replace(self.config, **settings), on_engine_death=lambda: None)
        await worker.start()
        self.workers.append(worker)
        return worker

    async def kill(self, worker: ModelWorker) -> None:
        """End a worker as a crash would: nothing is committed, no lease given back, its port refuses."""
        self.workers.remove(worker)
        await worker.stop()

    async def stream(self, **settings: Any) -> str:
        """Make a stream; returns its full name."""
        name = f"tenants/{self.tenant}/streams/{uuid.uuid4().hex}"
        complete = {"kv_budget_tokens": 48, "segment_length": 16, "num_sink_tokens": 4} | settings
        complete.setdefault("positions", api.POSITION_MODE_COMPACT)
        request = pb.CreateStreamRequest(
            name=name, model=self.config.model_name, settings=api.StreamSettings(**complete)
        )
        await self.store.create_stream(request)
        return name

    async def append(self, name: str, data: bytes, kind: int = api.RECORD_KIND_TEXT) -> int:
        """Append one record behind the others; returns the accepted offset."""
        offset = (await self.record(name)).stream.accepted_offset
        request = pb.AppendRecordRequest(name=name, offset=offset, data=data, kind=kind)
        return (await self.store.append_record(request)).accepted_offset

    async def record(self, name: str) -> pb.StreamRecord:
        """The stream as the state store has it."""
        return (await self.store.get_stream(pb.GetStreamRequest(name=name))).record

    async def flush(self, worker: ModelWorker, name: str) -> pb.StreamRecord:
        """Fold and commit all full segments at `worker`; returns the stream after it."""
        accepted = (await self.record(name)).stream.accepted_offset
        async with open_channel(worker.address) as channel:
            client = ModelWorkerClient(channel)
            lease = await worker.place(name)
            responses = [response async for response in client.flush(name, lease, accepted)]
        assert [response.is_committed for response in responses].index(True) == len(responses) - 1
        return await self.record(name)

    async def digest(self, worker: ModelWorker, data: bytes, **settings: Any) -> str:
        """Digest of a new stream that took `data` as one record, undisturbed."""
        name = await self.stream(**settings)
        await self.append(name, data)
        return (await self.flush(worker, name)).stream.state_digest

    async def generate(self, worker: ModelWorker, name: str, **request: Any) -> list[api.GenerateResponse]:
        """All responses of a Generate at `worker`."""
        async with open_channel(worker.address) as channel:
            lease = await worker.place(name)
            call = ModelWorkerClient(channel).generate(api.GenerateRequest(stream=name, **request), lease)
            return [response async for response in call]

    async def score(self, worker: ModelWorker, name: str, **request: Any) -> list[float]:
        """All log-probabilities of a Score at `worker`."""
        async with open_channel(worker.address) as channel:
            lease = await worker.place(name)
            call = ModelWorkerClient(channel).score(api.ScoreRequest(stream=name, **request), lease)
            return [log_prob async for response in call for log_prob in response.tokens.log_probs]

    async def verify(self, worker: ModelWorker, name: str) -> api.VerifySummary:
        """The end of a VerifyStream at `worker`."""
        async with open_channel(worker.address) as channel:
            call = ModelWorkerClient(channel).verify_stream(api.VerifyStreamRequest(name=name))
            *_, last = [response async for response in call]
            return last.summary

    async def checkpoints(self, name: str) -> list[pb.Manifest]:
        """The stream's retained checkpoints, oldest first."""
        *_, last = [r async for r in self.store.check_history(pb.CheckHistoryRequest(name=name))]
        return list(last.history.checkpoints)

    async def until(self, condition: Callable[[], Awaitable[bool]]) -> None:
        """Wait until a condition holds."""
        async with asyncio.timeout(20):
            while not await condition():
                await asyncio.sleep(0.01)


@pytest.fixture
async def platform(state_store: Any, tiny_model: Path) -> AsyncIterator[Platform]:
    config = WorkerConfig(
        # Of the test's own: the index of backlogs is shared by all tenants of a model.
        model_name=f"tiny-{uuid.uuid4().hex[:8]}",
        model_path=tiny_model,
        state_store_address=state_store.address,
        num_threads=1,
        drain_seconds=1.0,
        # Only a test that is about them waits for a sweep or for time to pass.
        sweep_seconds=60.0,
        checkpoint_seconds=60.0,
    )
    platform = Platform(state_store.client, state_store.tenant, config)
    yield platform
    for worker in platform.workers:
        await worker.stop()


@pytest.fixture
def make_text() -> Callable[..., bytes]:
    return text


@pytest.fixture
def a_read_stream(platform: Platform) -> Callable[..., Awaitable[str]]:
    """Makes a stream of five records and as many checkpoints; gives its name."""

    async def made(worker: ModelWorker, **settings: Any) -> str:
        name = await platform.stream(**settings)
        for seed in range(5):
            await platform.append(name, text(500, seed))
            await platform.flush(worker, name)
        return name

    return made
