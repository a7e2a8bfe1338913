"""A site: Redis, a state store and model workers, each a real process that may be killed, stopped and started again.

State store and workers are forked from one warm process (multiprocessing's fork server), which has imported everything
and started nothing: a worker of the tiny model then serves after 0.3 s instead of 3.
"""

import asyncio
import contextlib
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, Self

import grpc

from eunoe.clients.state_store import StateStoreClient
from eunoe.embedded.processes import free_ports
from eunoe.embedded.redis_server import answers_ping, redis_command
from eunoe.gateway.config import GatewayConfig
from eunoe.model_worker.config import WorkerConfig
from eunoe.runtime.config import to_env
from eunoe.runtime.grpc_channel import open_channel

LEASE_SECONDS = 1.0
"""A worker of a site counts as dead after so long without a sign of life; it gives one every 0.25 s."""

_START_SECONDS = 60.0
_POLL_SECONDS = 0.005


class Fault(Exception):
    """A process of the site does not do what it must."""


class Process:
    """A process forked from the warm one: a module's `main` with an environment, its output in a file."""

    def __init__(self, module: str, environment: dict[str, str], log_file: Path) -> None:
        self.log_file = log_file
        self._process: ForkServerProcess = _context().Process(
            target=_run_module, args=(module, environment, str(log_file)), daemon=True
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """None while it runs; minus the signal that ended it."""
        return self._process.exitcode

    def send(self, signal_number: int) -> None:
        """Send a signal; nothing if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            if self.exit_status is None:
                os.kill(self.pid, signal_number)

    async def ended(self) -> int:
        """Wait for its end; returns the exit status."""
        while (status := self.exit_status) is None:
            await asyncio.sleep(_POLL_SECONDS)
        return status

    def end(self) -> None:
        """Kill it, whatever state it is in."""
        self.send(signal.SIGKILL)
        self._process.join(10)

    async def is_stopped(self) -> bool:
        """Whether SIGSTOP has taken effect on every thread."""
        states = [
            path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{self.pid}/task").glob("*/stat")
        ]
        return all(state == "T" for state in states)


class Worker(Process):
    """A model worker's process.

    Attributes:
        address: host:port of its gRPC server; empty until it serves.
        failpoints: What it was armed with.
    """

    def __init__(self, config: WorkerConfig, failpoints: str, log_file: Path, module: str) -> None:
        assert config.ready_file is not None
        self.ready_file = config.ready_file
        self.failpoints = failpoints
        self.address = ""
        super().__init__(module, {**to_env(config, "EUNOE_WORKER"), "EUNOE_FAILPOINTS": failpoints}, log_file)

    async def serves(self) -> bool:
        """Wait until it serves; False if it ended before."""
        give_up_at = time.monotonic() + _START_SECONDS
        while not self.ready_file.exists():
            if self.exit_status is not None:
                return False
            if time.monotonic() > give_up_at:
                raise Fault(f"a worker does not serve after {_START_SECONDS:.0f} s; its log is {self.log_file}")
            await asyncio.sleep(_POLL_SECONDS)
        self.address = json.loads(self.ready_file.read_text())["address"]
        return True


class Gateway(Process):
    """A gateway's process; `address` is empty until it serves."""

    def __init__(self, store_address: str, directory: Path, settings: dict[str, Any]) -> None:
        self._ready_file = directory / "gateway.json"
        # Of one that was killed before.
        self._ready_file.unlink(missing_ok=True)
        self.address = ""
        defaults = {
            "state_store_address": store_address,
            "listen_address": "127.0.0.1:0",
            "requires_key": False,
            "ready_file": self._ready_file,
        }
        environment = to_env(GatewayConfig(**{**defaults, **settings}), "EUNOE_GATEWAY")
        super().__init__("eunoe.gateway.__main__", environment, directory / "gateway.log")

    async def serves(self) -> bool:
        """Whether it serves by now."""
        if self.exit_status is not None:
            raise Fault(f"the gateway ended: {self.log_file.read_text()[-2000:]}")
        if self._ready_file.exists():
            self.address = json.loads(self._ready_file.read_text())["address"]
        return bool(self.address)


class Site:
    """Redis and a state store of one's own, and any number of workers of one model; as a context manager it runs.

    Args:
        model_path: The model's directory.
        lease_seconds: See LEASE_SECONDS.
        store_settings: Variables of the state store, EUNOE_STATE_STORE_<name>.

    Attributes:
        store: A client of the state store.
        store_address: host:port of the state store, the same after a restart.
        model_name: The model's.
    """

    def __init__(self, model_path: Path, lease_seconds: float = LEASE_SECONDS, **store_settings: str) -> None:
        self.model_path = model_path
        self.model_name = model_path.name
        self.lease_seconds = lease_seconds
        self._store_settings = store_settings
        self.workers: list[Worker] = []
        self.gateways: list[Gateway] = []
        # Not pytest's: a socket's path ends at 107 bytes.
        self._directory = Path(tempfile.mkdtemp(prefix="eunoe-site-"))
        self._num_started = 0
        self.store_address = f"127.0.0.1:{free_ports(1)[0]}"
        self._channel: grpc.aio.Channel
        self.store: StateStoreClient

    async def __aenter__(self) -> Self:
        self._redis = self._start_redis()
        try:
            await self._redis_answers()
            self._state_store = self._start_state_store()
            await self._state_store_serves()
        except BaseException:
            self._end_processes()
            raise
        self._channel = open_channel(self.store_address)
        self.store = StateStoreClient(self._channel)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()
        await asyncio.to_thread(self._end_processes)
        shutil.rmtree(self._directory, ignore_errors=True)

    def start_worker(
        self, *, failpoints: str = "", module: str = "eunoe.model_worker.__main__", **settings: Any
    ) -> Worker:
        """Start a worker, the process of a module's `main`; settings override what is said here."""
        self._num_started += 1
        stem = self._directory / f"worker{self._num_started}"
        defaults = {
            "model_name": self.model_name,
            "model_path": self.model_path,
            "state_store_address": self.store_address,
            "num_threads": 1,
            "renew_seconds": self.lease_seconds / 4,
            "sweep_seconds": 0.1,
            "drain_seconds": 0.5,
            "ready_file": stem.with_suffix(".json"),
        }
        worker = Worker(WorkerConfig(**{**defaults, **settings}), failpoints, stem.with_suffix(".log"), module)
        self.workers.append(worker)
        return worker

    async def serving_worker(self, **settings: Any) -> Worker:
        """A worker that serves."""
        worker = self.start_worker(**settings)
        if not await worker.serves():
            raise Fault(f"a worker ended with status {worker.exit_status}: {worker.log_file.read_text()[-2000:]}")
        return worker

    async def serving_gateway(self, **settings: Any) -> "Gateway":
        """A gateway that serves, without API keys; settings override its config's."""
        gateway = Gateway(self.store_address, self._directory, settings)
        self.gateways.append(gateway)
        await until(gateway.serves, "the gateway does not serve")
        return gateway

    @property
    def state_store_pid(self) -> int:
        return self._state_store.pid

    async def restart_state_store(self) -> None:
        """kill -9 the state store, and wait until a new one serves at its address."""
        self._state_store.end()
        self._state_store = self._start_state_store()
        await self._state_store_serves()

    async def restart_redis(self) -> None:
        """kill -9 Redis, and wait until it has loaded its data again."""
        self._redis.kill()
        self._redis.wait()
        self._redis = self._start_redis()
        await self._redis_answers()

    def _start_redis(self) -> "subprocess.Popen[bytes]":
        command = redis_command(self._directory / "redis", self._directory / "redis.sock")
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def _start_state_store(self) -> Process:
        ready_file = self._directory / "state_store.json"
        ready_file.unlink(missing_ok=True)
        environment = {
            "LISTEN_ADDRESS": self.store_address,
            "REDIS_URL": f"unix://{self._directory}/redis.sock",
            "READY_FILE": str(ready_file),
            "WORKER_SECONDS": str(self.lease_seconds),
            **self._store_settings,
        }
        prefixed = {f"EUNOE_STATE_STORE_{name}": value for name, value in environment.items()}
        return Process("eunoe.state_store.__main__", prefixed, self._directory / "state_store.log")

    async def _redis_answers(self) -> None:
        socket_path = self._directory / "redis.sock"
        await until(lambda: asyncio.to_thread(answers_ping, socket_path), "Redis does not answer")

    async def _state_store_serves(self) -> None:
        async def is_ready() -> bool:
            if self._state_store.exit_status is not None:
                raise Fault(f"the state store ended: {self._state_store.log_file.read_text()[-2000:]}")
            return (self._directory / "state_store.json").exists()

        await until(is_ready, "the state store does not serve")

    def _end_processes(self) -> None:
        for process in (*self.gateways, *self.workers):
            process.end()
        if hasattr(self, "_state_store"):
            self._state_store.end()
        self._redis.kill()
        self._redis.wait()


async def until(
    condition: Callable[[], Awaitable[bool]], complaint: str, longest_seconds: float = _START_SECONDS
) -> None:
    """Wait for a condition.

    Raises:
        Fault: With the complaint, after so long.
    """
    give_up_at = time.monotonic() + longest_seconds
    while not await condition():
        if time.monotonic() > give_up_at:
            raise Fault(complaint)
        await asyncio.sleep(_POLL_SECONDS)


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    mains = [f"eunoe.{name}.__main__" for name in ("model_worker", "state_store", "gateway", "eviction_sidecar")]
    context.set_forkserver_preload(["worker_processes", *mains])
    return context


def _run_module(module: str, environment: dict[str, str], log_file: str) -> None:
    """What a forked process runs."""
    from eunoe.runtime import failpoints

    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environment)
    failpoints.arm_from(environment.get(failpoints.VARIABLE, ""))
    sys.exit(importlib.import_module(module).main())
