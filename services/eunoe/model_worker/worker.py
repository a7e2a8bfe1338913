"""The model worker: wires its parts, and says which streams are here."""

import asyncio
import contextlib
import logging
import os
import uuid
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import grpc

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.clients.eviction_sidecar import EvictionSidecarClient
from eunoe.clients.state_store import StateStoreClient
from eunoe.decoder.checkpoint import load_stream_defaults
from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MemorySettings
from eunoe.decoder.tokenizer import load_tokenizer
from eunoe.eviction.policy_files import PolicyFiles
from eunoe.internal.v1 import model_worker_pb2, model_worker_pb2_grpc
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.model_worker import metrics
from eunoe.model_worker.checkpoints import Checkpoints
from eunoe.model_worker.config import WorkerConfig
from eunoe.model_worker.engine import Engine
from eunoe.model_worker.failures import FailedStreams
from eunoe.model_worker.generation import Generation
from eunoe.model_worker.memory import Admission, MemoryLedger
from eunoe.model_worker.ownership import Ownership
from eunoe.model_worker.servicer import ModelWorkerServicer
from eunoe.model_worker.sidecar import Sidecar
from eunoe.model_worker.stream import OwnedStream, WorkerParts
from eunoe.model_worker.sweep import Sweep
from eunoe.model_worker.verification import Verification
from eunoe.runtime.errors import EunoeError, ModelMismatch, NotFound, NotOwner, Unavailable
from eunoe.runtime.failpoints import failpoint
from eunoe.runtime.grpc_channel import open_channel
from eunoe.runtime.grpc_server import GrpcServer
from eunoe.runtime.telemetry import serve_metrics

logger = logging.getLogger(__name__)

_SERVICE = model_worker_pb2.DESCRIPTOR.services_by_name["ModelWorkerService"].full_name
_IDLE_PROBE_SECONDS = 5.0
_HEALTH_SECONDS = 1.0
_FLUSH_SECONDS = 1.0


class ModelWorker:
    """Serves one model from one process. Everything but the engine thread lives in the event loop of `start`.

    Args:
        config: What to serve, and where.
        on_engine_death: See `Engine`.
    """

    def __init__(self, config: WorkerConfig, on_engine_death: Callable[[], None] | None = None) -> None:
        self.config = config
        self.incarnation = uuid.uuid4().hex
        self.ledger = MemoryLedger(config.memory_limit_bytes)
        self.streams: dict[str, OwnedStream] = {}
        self._engine = Engine(lambda: Decoder.load(config.model_path, num_threads=config.num_threads), on_engine_death)
        self._server = GrpcServer(
            address=f"{config.listen_host}:0", add_servicers=self._add_servicers, service_names=[_SERVICE]
        )
        # One taking or letting go of a stream at a time; a lock lives as long as somebody uses it.
        self._name_locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._failed_streams = FailedStreams()
        self._tasks: list[asyncio.Task[None]] = []
        self._is_draining = False
        self._metrics = contextlib.ExitStack()
        self._channel: grpc.aio.Channel
        self.parts: WorkerParts
        self._ownership: Ownership
        self._generation: Generation
        self._verification: Verification

    @property
    def address(self) -> str:
        """host:port of this worker's own gRPC server."""
        return self._server.address

    async def start(self) -> None:
        """Load the model, run a tiny inference, listen, and enter the worker directory.

        Raises:
            ValueError: If there is no model of that name to load, or no such policy.
            Unavailable: If the state store cannot be reached.
        """
        config = self.config
        self._channel = open_channel(config.state_store_address)
        store = StateStoreClient(self._channel)
        policies = await asyncio.to_thread(PolicyFiles, config.policies_dir)
        policy = policies.named(config.policy)
        decoder = await self._engine.start()
        tokenizer = await asyncio.to_thread(load_tokenizer, config.model_path)
        defaults = await asyncio.to_thread(load_stream_defaults, config.model_path)
        self.parts = WorkerParts(
            config=config,
            store=store,
            engine=self._engine,
            decoder=decoder,
            tokenizer=tokenizer,
            policy=policy,
            policies=policies,
            sidecar=self._sidecar_beside(policies),
            checkpoints=Checkpoints(store, self._engine, decoder),
            admission=Admission(self.ledger, self._drop_idle),
        )
        self._generation = Generation(self.parts)
        self._verification = Verification(self.parts)
        await self._probe()
        self._metrics.enter_context(serve_metrics(config.metrics_port, config.listen_host))
        await self._server.start()
        model = describe_model(config, decoder, defaults)
        worker = pb.Worker(worker=self.incarnation, address=self.address, model=model)
        self._ownership = Ownership(store, worker)
        await store.renew_worker(pb.RenewWorkerRequest(worker=worker))
        sweep = Sweep(store, config.model_name, self.streams, self._take)
        self._tasks = [
            asyncio.create_task(self._ownership.renew_forever(config.renew_seconds, self._is_able), name="renew"),
            asyncio.create_task(sweep.run_forever(config.sweep_seconds), name="sweep"),
            asyncio.create_task(self._probe_when_idle(), name="probe"),
            asyncio.create_task(self._report_health(), name="health"),
        ]
        logger.info("the worker serves", extra={"model": config.model_name, "address": self.address})

    async def place(self, name: str, suspect: pb.Lease | None = None) -> pb.Lease:
        """Take a stream if nobody living has it; returns the owner's lease, whoever that is.

        Args:
            name: Full resource name.
            suspect: A lease whose owner the caller could not reach.

        Raises:
            StreamNotFound: If there is no such stream.
            ModelMismatch: If it is bound to another model.
            EunoeError: What it failed of here a short while ago.
            Unavailable: If this worker drains, or the state store cannot be reached.
        """
        if self._is_draining:
            raise Unavailable("this worker is draining")
        async with self._lock(name):
            # Asked even where the stream seems to be here: it may have been taken, or deleted and made anew.
            try:
                record = await self._ownership.acquire(name, suspect)
            except NotOwner as owner:
                self._fail_if_held(name, owner)
                return pb.Lease(worker=owner.worker, epoch=owner.epoch, address=owner.address)
            except NotFound as error:
                self._fail_if_held(name, error)
                raise
            if (held := self.streams.get(name)) is not None:
                if held.is_of(record):
                    return held.lease
                held.fail(NotOwner(f"{name} is another stream now"))
            if record.stream.model != self.config.model_name:
                await self._ownership.release(name, record.lease)
                raise ModelMismatch(
                    f"{name} is bound to another model", expected=self.config.model_name, found=record.stream.model
                )
            # Its lease stays here: at another worker it would fail as well.
            self._failed_streams.check(name, record.stream.create_time.ToNanoseconds())
            self.streams[name] = OwnedStream(record, self.parts, self._forget)
            metrics.OWNED_STREAMS.set(len(self.streams))
            failpoint("worker.acquired")
            return record.lease

    def _fail_if_held(self, name: str, error: EunoeError) -> None:
        if (held := self.streams.get(name)) is not None:
            held.fail(error)

    async def held(self, name: str, lease: pb.Lease) -> OwnedStream:
        """The stream that this worker holds under `lease`.

        Raises:
            NotOwner: If it does not; without an address if another worker was meant that listened here.
        """
        if lease.worker != self.incarnation:
            raise NotOwner("another worker listens here now")
        stream = self.streams.get(name)
        if stream is not None:
            if stream.lease.epoch == lease.epoch:
                return stream
            owner = stream.lease
        else:
            owner = (await self.parts.store.get_stream(pb.GetStreamRequest(name=name))).record.lease
        if owner.worker == self.incarnation and stream is None:
            owner = pb.Lease()
        raise NotOwner(
            f"{name} is not held here under epoch {lease.epoch}",
            worker=owner.worker,
            epoch=owner.epoch,
            address=owner.address,
        )

    async def drain(self) -> None:
        """Take no more calls, commit every stream at its last full boundary, give all leases back, and stop."""
        self._is_draining = True
        await self._server.drain(self.config.drain_seconds)
        renewal, *others = self._tasks
        await _cancel(others)
        results = await asyncio.gather(*map(self._let_go, list(self.streams.values())), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                logger.error("a stream was not committed", exc_info=result)
        # Last: whoever leaves the directory counts as dead, and its streams may be taken.
        await _cancel([renewal])
        await self._ownership.leave()
        if self.parts.sidecar is not None:
            await asyncio.to_thread(self.parts.sidecar.flush, _FLUSH_SECONDS)
        await self.stop()

    async def stop(self) -> None:
        """Stop without a word to anybody, as a crash would; leases end by themselves."""
        await _cancel(self._tasks)
        for stream in list(self.streams.values()):
            stream.fail(Unavailable("the worker has stopped"))
        await self._server.drain(0)
        await asyncio.to_thread(self._engine.stop)
        if self.parts.sidecar is not None:
            self.parts.sidecar.close()
        await self._channel.close()
        self._metrics.close()

    def check_health(self) -> None:
        """Raise if this worker should be replaced.

        Raises:
            Unavailable: If work has been pending for `stall_seconds` without a step.
        """
        if not self._engine.is_alive:
            logger.critical("the engine thread is dead")
            os._exit(70)
        if not self._is_able():
            raise Unavailable(f"no step for {self._engine.stalled_seconds():.0f} s while work is pending")

    def _is_able(self) -> bool:
        return self._engine.stalled_seconds() < self.config.stall_seconds

    def _add_servicers(self, server: grpc.aio.Server) -> None:
        model_worker_pb2_grpc.add_ModelWorkerServiceServicer_to_server(
            ModelWorkerServicer(self, self._generation, self._verification), server
        )

    def _lock(self, name: str) -> asyncio.Lock:
        return self._name_locks.setdefault(name, asyncio.Lock())

    async def _take(self, name: str) -> bool:
        return (await self.place(name)).worker == self.incarnation

    async def _drop_idle(self) -> bool:
        """Commit and let go the least recently used idle stream with a memory state here; False if there is none.

        What its commit fails of is not the trouble of whoever needs the room, perhaps another tenant's stream.
        """
        idle = [stream for stream in self.streams.values() if stream.is_loaded and stream.is_idle]
        if not idle:
            return False
        stream = min(idle, key=lambda stream: stream.last_used)
        try:
            await self._let_go(stream)
        except EunoeError as error:
            logger.warning("an idle stream ended", extra={"stream": stream.name, "error": str(error)})
        return True

    async def _let_go(self, stream: OwnedStream) -> None:
        async with self._lock(stream.name):
            if self.streams.get(stream.name) is not stream:
                return
            await stream.close(commits=True)
            await self._ownership.release(stream.name, stream.lease)

    def _forget(self, stream: OwnedStream, error: BaseException) -> None:
        """The stream has ended here, whatever the reason."""
        if self.streams.get(stream.name) is stream:
            del self.streams[stream.name]
        if isinstance(error, NotOwner | NotFound | Unavailable):
            self._failed_streams.forget(stream.name)
        else:
            self._failed_streams.note(stream.name, stream.create_time_ns, error)
        metrics.OWNED_STREAMS.set(len(self.streams))
        metrics.DROPPED_STREAMS.labels(error.reason() if isinstance(error, EunoeError) else "FAILED").inc()

    def _sidecar_beside(self, policies: PolicyFiles) -> Sidecar | None:
        config = self.config
        if config.sidecar_address is None:
            return None
        return Sidecar(
            EvictionSidecarClient(config.sidecar_address, config.sidecar_deadline_seconds),
            policies,
            deadline_seconds=config.sidecar_deadline_seconds,
            scores_in_process=config.scoring == "in_process",
            payload_dir=config.payload_dir,
            stem=self.incarnation,
        )

    async def _probe(self) -> None:
        """A tiny inference: that the decoder answers at all."""
        parts = self.parts
        settings = MemorySettings(kv_budget_tokens=4, segment_length=4, num_sink_tokens=0)

        def infer() -> bool:
            state = parts.decoder.new_state(settings)
            parts.decoder.prefill(state, [0], parts.policy)
            return bool(parts.decoder.decode([state], [0], parts.policy).isfinite().all())

        if not await parts.engine.call(infer):
            raise ValueError(f"the model in {self.config.model_path} computes no finite numbers")

    async def _report_health(self) -> None:
        """What the health service answers is whether work goes forward, not whether somebody listens."""
        while True:
            await asyncio.sleep(_HEALTH_SECONDS)
            await self._server.set_serving(self._is_able())

    async def _probe_when_idle(self) -> None:
        while True:
            await asyncio.sleep(_IDLE_PROBE_SECONDS)
            if self._engine.is_idle:
                await self._probe()


def describe_model(config: WorkerConfig, decoder: Decoder, defaults: MemorySettings) -> api.Model:
    """The model as the public API lists it, with the settings of streams that name none."""
    shape = decoder.config
    # What does not grow with the budget is in both.
    one, two = (
        decoder.new_state(MemorySettings(kv_budget_tokens=budget, segment_length=1, num_sink_tokens=0)).state_bytes
        for budget in (1, 2)
    )
    kv_bytes = 2 * shape.num_kv_layers * shape.num_kv_heads * shape.head_dim * decoder.dtypes.kv.itemsize
    return api.Model(
        name=config.model_name,
        model_digest=decoder.model_digest,
        num_layers=shape.num_layers,
        num_kv_source_layers=shape.num_kv_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        max_positions=shape.max_positions,
        state_bytes_per_budget_token=two - one,
        full_cache_bytes_per_token=kv_bytes,
        default_state_bytes=one + (defaults.kv_budget_tokens - 1) * (two - one),
        default_settings=api.StreamSettings(
            kv_budget_tokens=defaults.kv_budget_tokens,
            segment_length=defaults.segment_length,
            num_sink_tokens=defaults.num_sink_tokens,
            positions=api.POSITION_MODE_COMPACT,
        ),
    )


async def _cancel(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
