"""Fixtures for every test: a real Redis, and a state store that serves from it."""

import os

# Before anything imports triton: its kernels then run on the CPU.
os.environ.setdefault("TRITON_INTERPRET", "1")
# The tiny model has nothing to share out: on a busy machine two threads take ten times as long as one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from eunoe.runtime.local_ray import local_ray_environment

# Before anything imports Ray, which then believes what it finds.
os.environ.update(local_ray_environment(num_threads=1))

import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import redis

from eunoe.clients.state_store import StateStoreClient
from eunoe.embedded.processes import free_ports
from eunoe.embedded.redis_server import DURABLE_SETTINGS, server_binary
from eunoe.internal.v1 import state_store_pb2_grpc
from eunoe.runtime.auth import TlsConfig
from eunoe.runtime.grpc_channel import open_channel
from eunoe.runtime.grpc_server import GrpcServer
from eunoe.state_store.__main__ import build_server
from eunoe.state_store.config import StateStoreConfig
from eunoe.state_store.redis_storage import RedisStorage
from eunoe.state_store.store import StateStore
from eunoe.state_store.transactions import Environment


class RedisServer:
    """A redis-server on a unix socket in `directory`, where it also keeps its data.

    Attributes:
        url: Where it listens.
    """

    def __init__(self, directory: Path, *settings: str) -> None:
        self.url = f"unix://{directory}/redis.sock"
        self._command = [server_binary(), "--port", "0", "--unixsocket", f"{directory}/redis.sock"]
        self._command += ["--dir", str(directory), *settings]
        self._process = self._started()

    def pause(self, is_paused: bool = True) -> None:
        """SIGSTOP, or SIGCONT."""
        self._process.send_signal(signal.SIGSTOP if is_paused else signal.SIGCONT)

    def restart_after_kill(self) -> None:
        """Kill it as a power cut would, and start it again."""
        self._process.kill()
        self._ended()
        self._process = self._started()

    def stop(self) -> None:
        # Not SIGTERM: a replica that is about to write its first append-only file ignores that, then and later.
        self._process.kill()
        self._ended()

    def _started(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert process.stdout is not None
        for line in process.stdout:
            if b"ready to accept connections" in line.lower():
                # What Redis says from here on does not fill a pipe during any test run.
                return process
        raise RuntimeError(f"redis-server ended with status {process.wait()}")

    def _ended(self) -> None:
        self._process.wait(timeout=10)
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture(scope="session")
def start_redis() -> Iterator[Callable[..., RedisServer]]:
    """Starts redis-servers with the settings it is called with; they are stopped at the end of the session."""
    servers = []
    # Not pytest's tmp_path: a socket's path ends at 107 bytes.
    with tempfile.TemporaryDirectory(prefix="eunoe-redis-") as root:

        def start(*settings: str) -> RedisServer:
            directory = Path(root) / str(len(servers))
            directory.mkdir()
            servers.append(RedisServer(directory, *settings))
            return servers[-1]

        try:
            yield start
        finally:
            for server in servers:
                server.stop()


@pytest.fixture(scope="session")
def redis_server(start_redis: Callable[..., RedisServer]) -> RedisServer:
    """One Redis for all tests: durable, so that it behaves as in production. Nobody flushes it: use your own tenant."""
    return start_redis(*DURABLE_SETTINGS)


@dataclass(frozen=True)
class ReplicatedRedis:
    """A primary and its one replica, connected."""

    primary: RedisServer
    replica: RedisServer


@pytest.fixture(scope="session")
def start_replicated_redis(start_redis: Callable[..., RedisServer]) -> Callable[[], ReplicatedRedis]:
    """Starts a primary with a replica that has caught up with it. They have ports too, for each other."""

    def start() -> ReplicatedRedis:
        port, replica_port = map(str, free_ports(2))
        # Later settings win. Replicas copy at once and without a file, so that tests need not wait.
        common = (*DURABLE_SETTINGS, "--bind", "127.0.0.1", "--repl-diskless-sync-delay", "0")
        primary = start_redis(*common, "--port", port)
        replica = start_redis(*common, "--port", replica_port, "--replicaof", "127.0.0.1", port)
        client = redis.Redis.from_url(primary.url)
        deadline = time.monotonic() + 20
        while client.wait(1, 100) < 1 or client.info("replication").get("slave0", {}).get("state") != "online":
            assert time.monotonic() < deadline, "the replica does not connect"
        client.close()
        return ReplicatedRedis(primary, replica)

    return start


@pytest.fixture(scope="session")
def replicated_redis(start_replicated_redis: Callable[[], ReplicatedRedis]) -> ReplicatedRedis:
    """One pair for all tests that pause none of it."""
    return start_replicated_redis()


@dataclass(frozen=True)
class RunningStateStore:
    """A state store in this process, served on loopback.

    Attributes:
        address: host:port for `open_channel`.
        channel: An open channel to it.
        client: A client over that channel.
        tenant: A tenant that no other test uses.
        store: The store behind the RPCs.
    """

    address: str
    channel: grpc.aio.Channel
    client: StateStoreClient
    tenant: str
    store: StateStore


@pytest.fixture
async def state_store(redis_server: RedisServer) -> AsyncIterator[RunningStateStore]:
    """A state store over the session's Redis, with a tenant of the test's own."""
    storage = RedisStorage(redis_server.url)
    await storage.load_function()
    config = StateStoreConfig(listen_address="127.0.0.1:0")
    store = StateStore(Environment(storage=storage, config=config))
    server = build_server(store, config)
    await server.start()
    async with store.running(), open_channel(server.address) as channel:
        yield RunningStateStore(
            address=server.address,
            channel=channel,
            client=StateStoreClient(channel),
            tenant=f"test-{uuid.uuid4().hex}",
            store=store,
        )
    await server.drain(0)
    await storage.close()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, bytes], bytes]:
    """Compares bytes that were written now with those of a file in `golden/` beside the test, and gives the file's.

    A file that is not there is written, and the test fails once: look at it and commit it. One that is there is never
    changed: other bytes are another version, with files of its own.
    """

    def compare(name: str, written: bytes) -> bytes:
        path = request.path.parent / "golden" / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(written)
            pytest.fail(f"{path} is new")
        assert written == path.read_bytes(), f"{name} is written otherwise now: that needs a new version"
        return written

    return compare


@pytest.fixture(scope="session")
def smollm2_directory() -> Path:
    """SmolLM2's model directory, of the tests with the marker `model`."""
    if directory := os.environ.get("EUNOE_TEST_MODEL"):
        return Path(directory)
    if os.environ.get("EUNOE_REQUIRE_MODEL"):
        pytest.fail("EUNOE_REQUIRE_MODEL is set, EUNOE_TEST_MODEL is not")
    pytest.skip("EUNOE_TEST_MODEL names no model directory")


Serve = Callable[..., AbstractAsyncContextManager[tuple[GrpcServer, Any]]]


@pytest.fixture
def serve() -> Serve:
    """Serves a state store's servicer, whose handlers a test writes, for the length of an `async with`: a started
    server and a stub connected to it.
    """

    @asynccontextmanager
    async def serving(servicer: Any, *, client_tls: TlsConfig | None = None, **options: Any) -> AsyncIterator[Any]:
        server = GrpcServer(
            address="127.0.0.1:0",
            add_servicers=lambda s: state_store_pb2_grpc.add_StateStoreServiceServicer_to_server(servicer, s),
            service_names=["eunoe.internal.v1.StateStoreService"],
            **options,
        )
        await server.start()
        try:
            async with open_channel(server.address, client_tls) as channel:
                yield server, state_store_pb2_grpc.StateStoreServiceStub(channel)
        finally:
            await server.drain(0)

    return serving
