"""A gateway over the real state store, with fake workers whose fold is trivial: a byte is a token.

The fake keeps the protocol to the letter (leases, fences, checkpoints, probes), so that what these tests show of
placement and recovery holds for real workers too.
"""

import asyncio
import hashlib
import socket
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import google_crc32c
import pytest
import xxhash

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.api.v1 import long_context_pb2_grpc
from eunoe.clients.state_store import StateStoreClient
from eunoe.gateway.config import GatewayConfig
from eunoe.gateway.gateway import Gateway
from eunoe.internal.v1 import model_worker_pb2 as pb
from eunoe.internal.v1 import model_worker_pb2_grpc
from eunoe.internal.v1 import state_store_pb2 as store_pb
from eunoe.internal.v1.state_store_pb2 import Lease
from eunoe.runtime.errors import EunoeError, NotOwner, PromptTooLong
from eunoe.runtime.grpc_channel import open_channel
from eunoe.runtime.grpc_server import GrpcServer

SEGMENT_LENGTH = 16


@dataclass
class FakeMemory:
    """The running memory of one stream: a hash over its segments."""

    lease: Lease
    version: int = 0
    applied: int = 0
    folded: int = 0
    digest: bytes = b""


class FakeWorker(model_worker_pb2_grpc.ModelWorkerServiceServicer):
    """A worker without a model.

    Attributes:
        memories: The streams that it owns.
        num_calls: How often each RPC was called.
        summary: What it says of every stream it is to verify; an error is raised instead.
        is_open: Generate waits for it before each token but the first.
        has_cancelled: A Generate was cancelled.
    """

    def __init__(self, store: StateStoreClient, model: str, *, vocab_size: int = 512, max_positions: int = 512) -> None:
        self.worker_id = uuid.uuid4().hex
        self.memories: dict[str, FakeMemory] = {}
        self.num_calls: Counter[str] = Counter()
        self.summary: api.VerifySummary | EunoeError = api.VerifySummary(verdict=api.VERDICT_VERIFIED)
        self.is_open = asyncio.Event()
        self.is_open.set()
        self.has_cancelled = asyncio.Event()
        self._store = store
        self._model = api.Model(
            name=model,
            model_digest=f"digest of {model}",
            vocab_size=vocab_size,
            max_positions=max_positions,
            num_layers=1,
        )
        self._server = GrpcServer(
            address="127.0.0.1:0",
            add_servicers=lambda s: model_worker_pb2_grpc.add_ModelWorkerServiceServicer_to_server(self, s),
            service_names=["eunoe.internal.v1.ModelWorkerService"],
        )

    @property
    def address(self) -> str:
        return self._server.address

    async def start(self) -> None:
        await self._server.start()
        worker = store_pb.Worker(worker=self.worker_id, address=self.address, model=self._model)
        await self._store.renew_worker(store_pb.RenewWorkerRequest(worker=worker))

    async def kill(self) -> None:
        """Vanish: connections break, the port is refused, the directory still has the entry."""
        await self._server.drain(0)

    async def stop(self) -> None:
        await self.kill()
        await self._store.remove_worker(store_pb.RemoveWorkerRequest(worker=self.worker_id))

    async def give_back(self, name: str) -> None:
        """Release a stream, as a worker does that drains."""
        memory = self.memories.pop(name)
        await self._store.release_stream(store_pb.ReleaseStreamRequest(name=name, lease=memory.lease))

    async def TakeStream(self, request: pb.TakeStreamRequest, context: Any) -> pb.TakeStreamResponse:
        self.num_calls["TakeStream"] += 1
        suspect = request.suspect if request.HasField("suspect") and is_refused(request.suspect.address) else None
        by = Lease(worker=self.worker_id, address=self.address)
        record = (
            await self._store.acquire_stream(store_pb.AcquireStreamRequest(name=request.name, by=by, suspect=suspect))
        ).record
        memory = FakeMemory(lease=record.lease)
        if record.HasField("manifest"):
            chunks = store_pb.ReadChunksRequest(name=request.name, chunks=record.manifest.chunks)
            async for chunk in self._store.read_chunks(chunks):
                memory.digest = chunk.data
            memory.version = record.manifest.version
            memory.applied = memory.folded = record.manifest.applied_offset
        self.memories.setdefault(request.name, memory)
        return pb.TakeStreamResponse(lease=record.lease)

    async def Advance(self, request: pb.AdvanceRequest, context: Any) -> pb.AdvanceResponse:
        self.num_calls["Advance"] += 1
        memory = await self._held(request.name, request.lease)
        await self._fold(request.name, memory, request.accepted_offset)
        return pb.AdvanceResponse(folded_offset=memory.folded, applied_offset=memory.applied)

    async def Flush(self, request: pb.FlushRequest, context: Any) -> AsyncIterator[pb.FlushResponse]:
        self.num_calls["Flush"] += 1
        memory = await self._held(request.name, request.lease)
        await self._fold(request.name, memory, request.accepted_offset)
        if memory.folded > memory.applied:
            await self._commit(request.name, memory)
        yield pb.FlushResponse(folded_offset=memory.folded, applied_offset=memory.applied, is_committed=True)

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self.num_calls["Generate"] += 1
        memory = await self._held(request.request.stream, request.lease)
        record = (await self._store.get_stream(store_pb.GetStreamRequest(name=request.request.stream))).record
        budget = record.stream.settings.kv_budget_tokens
        if len(request.request.text) > budget:
            raise PromptTooLong("too long", num_tokens=len(request.request.text), limit_tokens=budget)
        catching_up = api.CatchingUp(applied_offset=memory.folded, accepted_offset=record.stream.accepted_offset)
        yield pb.GenerateResponse(response=api.GenerateResponse(catching_up=catching_up))
        try:
            for i in range(request.request.max_tokens):
                tokens = api.GeneratedTokens(token_ids=[i], text=f"{i} ", log_probs=[-1.0])
                yield pb.GenerateResponse(response=api.GenerateResponse(tokens=tokens))
                await self.is_open.wait()
        except (asyncio.CancelledError, GeneratorExit):
            self.has_cancelled.set()
            raise
        summary = api.GenerateSummary(
            finish_reason=api.FINISH_REASON_LENGTH,
            num_answer_tokens=request.request.max_tokens,
            offset=record.stream.accepted_offset,
        )
        yield pb.GenerateResponse(response=api.GenerateResponse(summary=summary))

    async def Score(self, request: pb.ScoreRequest, context: Any) -> AsyncIterator[pb.ScoreResponse]:
        await self._held(request.request.stream, request.lease)
        scored = api.ScoredTokens(token_ids=list(request.request.text.encode()), log_probs=[-2.0])
        yield pb.ScoreResponse(response=api.ScoreResponse(tokens=scored))

    async def InspectMemory(
        self, request: pb.InspectMemoryRequest, context: Any
    ) -> AsyncIterator[pb.InspectMemoryResponse]:
        await self._held(request.request.name, request.lease)
        head = api.HeadMemory(layer=0, head=0, positions=[0], token_ids=[1], texts=["a"])
        yield pb.InspectMemoryResponse(response=api.InspectMemoryResponse(head=head))
        if request.request.with_log:
            log = api.LogTokens(token_ids=[1], pieces=[b"a"])
            yield pb.InspectMemoryResponse(response=api.InspectMemoryResponse(log=log))

    async def VerifyStream(
        self, request: pb.VerifyStreamRequest, context: Any
    ) -> AsyncIterator[pb.VerifyStreamResponse]:
        self.num_calls["VerifyStream"] += 1
        yield pb.VerifyStreamResponse(response=api.VerifyStreamResponse(progress=api.VerifyProgress(tokens=1)))
        if isinstance(self.summary, EunoeError):
            raise self.summary
        yield pb.VerifyStreamResponse(response=api.VerifyStreamResponse(summary=self.summary))

    async def _held(self, name: str, lease: Lease) -> FakeMemory:
        if lease.worker != self.worker_id:
            raise NotOwner("another incarnation listens here")
        memory = self.memories.get(name)
        if memory is not None and memory.lease.epoch == lease.epoch:
            return memory
        owner = (await self._store.get_stream(store_pb.GetStreamRequest(name=name))).record.lease
        if owner.worker == self.worker_id and memory is None:
            raise NotOwner("it was mine, and I let go of it")
        raise NotOwner("not mine", worker=owner.worker, epoch=owner.epoch, address=owner.address)

    async def _fold(self, name: str, memory: FakeMemory, offset: int) -> None:
        end = offset // SEGMENT_LENGTH * SEGMENT_LENGTH
        if end <= memory.folded:
            return
        data = b""
        request = store_pb.ReadLogRequest(name=name, offset=memory.folded, max_bytes=end - memory.folded)
        async for piece in self._store.read_log(request):
            data += piece.data
        for start in range(0, end - memory.folded, SEGMENT_LENGTH):
            memory.digest = hashlib.sha256(memory.digest + data[start : start + SEGMENT_LENGTH]).digest()
        memory.folded = end

    async def _commit(self, name: str, memory: FakeMemory) -> None:
        chunk_id = uuid.uuid4().hex
        await self._store.stage_chunks(name, [(chunk_id, memory.digest)])
        chunk = store_pb.ChunkRef(
            chunk_id=chunk_id, length=len(memory.digest), digest=xxhash.xxh3_128_digest(memory.digest)
        )
        manifest = store_pb.Manifest(
            encoding_version=1,
            version=memory.version + 1,
            applied_offset=memory.folded,
            tokens=memory.folded,
            state_bytes=len(memory.digest),
            state_digest=memory.digest.hex(),
            model_digest=self._model.model_digest,
            decisions=[store_pb.DecisionRun(first_segment=0, policy="fake/1", numerics_id="fake")],
            chunks=[chunk],
        )
        await self._store.commit_checkpoint(
            store_pb.CommitCheckpointRequest(name=name, lease=memory.lease, manifest=manifest)
        )
        memory.version, memory.applied = manifest.version, manifest.applied_offset


def is_refused(address: str) -> bool:
    """A worker's own probe of a suspect: nobody listens there any more."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except ConnectionError:
        return True
    return False


class AppendClient:
    """One Append as a careful client would drive it.

    Attributes:
        accepted: The accepted offset as last heard.
        progress: What came unasked.
    """

    def __init__(self, stub: Any, name: str, source_id: str = "") -> None:
        self.call = stub.Append()
        self.accepted = 0
        self.progress: list[api.AppendProgress] = []
        self._open = api.AppendOpen(stream=name, source_id=source_id)

    async def open(self) -> api.AppendOpened:
        await self.call.write(api.AppendRequest(open=self._open))
        opened: api.AppendOpened = (await self.next()).opened
        self.accepted = opened.stream.accepted_offset
        return opened

    async def send(
        self, data: bytes, *, offset: int | None = None, crc32c: int | None = None, kind: Any = None
    ) -> None:
        record = api.AppendRecord(
            offset=self.accepted if offset is None else offset,
            data=data,
            crc32c=google_crc32c.value(data) if crc32c is None else crc32c,
            kind=kind or api.RECORD_KIND_TEXT,
        )
        await self.call.write(api.AppendRequest(record=record))

    async def record(self, data: bytes, **values: Any) -> api.AppendVerdict:
        """Send a record and wait for its verdict."""
        await self.send(data, **values)
        verdict: api.AppendVerdict = (await self.next()).verdict
        self.accepted = verdict.accepted_offset
        return verdict

    async def flush(self) -> api.Stream:
        await self.call.write(api.AppendRequest(flush=api.AppendFlush()))
        return (await self.next()).flushed.stream  # type: ignore[no-any-return]

    async def finish(self) -> api.Stream:
        await self.call.write(api.AppendRequest(finish=api.AppendFinish()))
        return (await self.next()).finished.stream  # type: ignore[no-any-return]

    async def next(self) -> Any:
        """The next response that is no progress."""
        async for response in self.call:
            if response.WhichOneof("response") != "progress":
                return response
            self.progress.append(response.progress)
        raise EOFError("the server ended the call")


@pytest.fixture
def store(state_store: Any) -> StateStoreClient:
    return state_store.client  # type: ignore[no-any-return]


@pytest.fixture
def model() -> str:
    """A model's name that no other test uses: the worker directory is shared."""
    return f"fake-{uuid.uuid4().hex[:8]}"


@pytest.fixture
async def a_worker(store: StateStoreClient, model: str) -> AsyncIterator[Callable[..., Awaitable[FakeWorker]]]:
    """Starts fake workers of the test's model, and stops them after it."""
    workers = []

    async def start(of_model: str = model, **limits: int) -> FakeWorker:
        worker = FakeWorker(store, of_model, **limits)
        await worker.start()
        workers.append(worker)
        return worker

    yield start
    for worker in workers:
        await worker.stop()


@pytest.fixture
async def worker(a_worker: Callable[..., Awaitable[FakeWorker]]) -> FakeWorker:
    return await a_worker()


@pytest.fixture
def a_gateway(state_store: Any) -> Any:
    """Runs a gateway of the given config for the length of an `async with`; gives (gateway, stub)."""

    @asynccontextmanager
    async def running(**values: Any) -> AsyncIterator[tuple[Gateway, Any]]:
        config = GatewayConfig(
            **{
                "state_store_address": state_store.address,
                "listen_address": "127.0.0.1:0",
                "requires_key": False,
            }
            | values
        )
        gateway = Gateway(config)
        await gateway.server.start()
        try:
            async with open_channel(gateway.server.address) as channel:
                yield gateway, long_context_pb2_grpc.LongContextServiceStub(channel)
        finally:
            await gateway.server.drain(0)
            await gateway.close()

    return running


@pytest.fixture
async def stub(a_gateway: Any) -> AsyncIterator[Any]:
    """A stub of a gateway that lets loopback in as tenant "default"."""
    async with a_gateway() as (_, stub):
        yield stub


@pytest.fixture
async def stream(stub: Any, worker: FakeWorker, model: str) -> str:
    """The name of a new stream of the test's model, served by one fake worker."""
    return await new_stream(stub, model)


@pytest.fixture
def a_stream() -> Any:
    """Makes a stream with segments of 16 tokens; gives its full name."""
    return new_stream


async def new_stream(stub: Any, model: str, **values: Any) -> str:
    settings = api.StreamSettings(segment_length=SEGMENT_LENGTH, kv_budget_tokens=64)
    request = api.CreateStreamRequest(model=model, settings=settings, **values)
    return (await stub.CreateStream(request)).stream.name  # type: ignore[no-any-return]


@pytest.fixture
def append_to() -> Any:
    """Opens an Append; gives its AppendClient."""

    async def opened(stub: Any, name: str, source_id: str = "") -> AppendClient:
        client = AppendClient(stub, name, source_id)
        await client.open()
        return client

    return opened


@pytest.fixture
def until() -> Any:
    """Waits for a condition, which may be a coroutine function."""

    async def waiting(is_true: Callable[[], Any]) -> None:
        async with asyncio.timeout(15):
            while True:
                found = is_true()
                if await found if asyncio.iscoroutine(found) else found:
                    return
                await asyncio.sleep(0.01)

    return waiting
