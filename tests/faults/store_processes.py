"""Redis and state stores as real processes, to be killed, stopped and started again."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Self

from fault_proxy import FaultProxy

from eunoe.embedded.redis_server import DURABLE_SETTINGS, answers_ping, server_binary
from eunoe.runtime.failpoints import VARIABLE as FAILPOINTS_VARIABLE
from eunoe.state_store.redis_storage import RedisStorage

_SERVICES = Path(__file__).parents[2] / "services"
_START_SECONDS = 30.0
_POLL_SECONDS = 0.005


class HarnessError(Exception):
    """Something that the harness relies on does not happen; says nothing about the product."""


class _Process:
    """A process with its output in a file."""

    def __init__(self, command: list[str], log_file: Path, environment: Mapping[str, str] = {}) -> None:
        self.log_file = log_file
        with log_file.open("ab") as log:
            self._process = subprocess.Popen(
                command, env={**os.environ, **environment}, stdout=log, stderr=subprocess.STDOUT
            )

    @property
    def exit_status(self) -> int | None:
        """None while it runs; minus the signal that ended it."""
        return self._process.poll()

    def send(self, signal_number: int) -> None:
        """Send a signal; nothing if it has ended."""
        self._process.send_signal(signal_number)

    def kill(self) -> None:
        """kill -9, whatever state it is in, and wait for its end."""
        self._process.kill()
        self._process.wait(_START_SECONDS)

    async def until(self, is_true: Callable[[], bool], what: str) -> None:
        """Wait for something that this process is to bring about.

        Raises:
            HarnessError: If the process ends before, or it takes too long.
        """

        async def condition() -> bool:
            if self.exit_status is not None and not is_true():
                tail = self.log_file.read_text(errors="replace")[-2000:]
                raise HarnessError(f"{what}: the process ended with status {self.exit_status}; its log: {tail}")
            return is_true()

        await until(condition, what)


class RedisProcess:
    """A redis-server with its data in a directory; killed and started, it goes on with what it had.

    Args:
        directory: Of data, socket and log; made if absent. Its path has at most 90 bytes.
        settings: Of its command line, after the durable ones.
        port: Also listen on this port of the loopback interface; 0 does not.
        environment: Variables beside this process's own.
        binary: The server; default is the one that a platform would start.

    Attributes:
        url: Of the unix socket.
        port: As given.
    """

    def __init__(
        self,
        directory: Path,
        *settings: str,
        port: int = 0,
        environment: Mapping[str, str] | None = None,
        binary: str = "",
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.port = port
        self.socket_path = directory / "redis.sock"
        self.url = f"unix://{self.socket_path}"
        self._settings = settings
        self._binary = binary or server_binary()
        self._environment = dict(environment or {})
        self._process: _Process | None = None

    @property
    def exit_status(self) -> int | None:
        assert self._process is not None
        return self._process.exit_status

    async def start(self, *settings: str) -> None:
        """Start it, and wait until it has loaded its data and answers."""
        self.socket_path.unlink(missing_ok=True)
        command = [self._binary, "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--unixsocket", str(self.socket_path), "--dir", str(self.directory), *DURABLE_SETTINGS]
        command += [*self._settings, *settings]
        self._process = _Process(command, self.directory / "redis.log", self._environment)
        await self._process.until(lambda: answers_ping(self.socket_path), "Redis does not answer")

    def kill(self) -> None:
        """kill -9; nothing if it is not there."""
        if self._process is not None:
            self._process.kill()

    async def restart(self) -> None:
        """kill -9, and start it on what it has on disk."""
        self.kill()
        await self.start()

    def stop_and_go(self, is_going: bool) -> None:
        """SIGSTOP, or SIGCONT."""
        assert self._process is not None
        self._process.send(signal.SIGCONT if is_going else signal.SIGSTOP)


class StateStoreProcess:
    """`python -m eunoe.state_store`; each start listens at a new address.

    Args:
        directory: Of its log and its ready file.
        redis_url: As EUNOE_STATE_STORE_REDIS_URL.
        variables: EUNOE_STATE_STORE_<name>, in lower case.
        environment: Other variables.

    Attributes:
        address: host:port where it listens since the newest start.
    """

    def __init__(
        self,
        directory: Path,
        redis_url: str,
        *,
        variables: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._variables = {"listen_address": "127.0.0.1:0", "redis_url": redis_url, **(variables or {})}
        self._environment = dict(environment or {})
        self._num_starts = 0
        self._process: _Process | None = None
        self.address = ""

    @property
    def exit_status(self) -> int | None:
        assert self._process is not None
        return self._process.exit_status

    async def start(self, failpoints: str = "") -> None:
        """Start it, and wait until it serves."""
        self._num_starts += 1
        ready_file = self._directory / f"ready{self._num_starts}.json"
        variables = {**self._variables, "ready_file": str(ready_file)}
        environment = {f"EUNOE_STATE_STORE_{name.upper()}": value for name, value in variables.items()}
        environment |= {"PYTHONPATH": str(_SERVICES), FAILPOINTS_VARIABLE: failpoints, **self._environment}
        command = [sys.executable, "-m", "eunoe.state_store"]
        self._process = _Process(command, self._directory / "state_store.log", environment)
        await self._process.until(ready_file.exists, "the state store does not serve")
        self.address = json.loads(ready_file.read_text())["address"]

    def kill(self) -> None:
        """kill -9; nothing if it is not there."""
        if self._process is not None:
            self._process.kill()

    async def restart(self, failpoints: str = "") -> None:
        """kill -9, and start another one."""
        self.kill()
        await self.start(failpoints)

    def stop_and_go(self, is_going: bool) -> None:
        """SIGSTOP, or SIGCONT."""
        assert self._process is not None
        self._process.send(signal.SIGCONT if is_going else signal.SIGSTOP)


class StoreSite:
    """Redis and a state store over it, with a proxy before each; as a context manager it runs.

    Args:
        redis_environment: Variables of the Redis process.
        store_environment: Variables of the state store process.
        redis_directory: Redis' data; default is a directory of the site's own.
        redis_binary: As of RedisProcess.

    Attributes:
        redis: The database.
        store: The state store, which reaches Redis through `redis_proxy`.
        redis_proxy: Between the two.
        proxy: Before the state store: `proxy.address` stays the same over restarts.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        redis_directory: Path | None = None,
        redis_environment: Mapping[str, str] | None = None,
        redis_binary: str = "",
        store_environment: Mapping[str, str] | None = None,
    ) -> None:
        # Not pytest's: a socket's path ends at 107 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix="eunoe-faults-"))
        self.redis = RedisProcess(
            redis_directory or self.directory / "redis", environment=redis_environment, binary=redis_binary
        )
        self.redis_proxy = FaultProxy(self.redis.url, seed)
        self.proxy = FaultProxy("127.0.0.1:1", seed + 1)
        self._store_environment = store_environment
        self.store: StateStoreProcess

    async def __aenter__(self) -> Self:
        try:
            await self.redis.start()
            await self.redis_proxy.__aenter__()
            await self.proxy.__aenter__()
            self.store = StateStoreProcess(
                self.directory, f"redis://{self.redis_proxy.address}/0", environment=self._store_environment
            )
            await self.start_store()
        except BaseException:
            self._end_processes()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._end_processes()
        await self.proxy.__aexit__()
        await self.redis_proxy.__aexit__()
        shutil.rmtree(self.directory, ignore_errors=True)

    async def start_store(self, failpoints: str = "") -> None:
        """Start the state store, killing the one that runs, and lead the proxy to it."""
        self.store.kill()
        # Connections of the dead one go; those to come wait until the new one serves.
        await self.store.start(failpoints)
        self.proxy.target = self.store.address

    def _end_processes(self) -> None:
        with contextlib.suppress(AttributeError):
            self.store.kill()
        self.redis.kill()


async def until(condition: Callable[[], Awaitable[bool]], complaint: str, seconds: float = _START_SECONDS) -> None:
    """Wait for a condition.

    Raises:
        HarnessError: With the complaint, after so long.
    """
    give_up_at = time.monotonic() + seconds
    while not await condition():
        if time.monotonic() > give_up_at:
            raise HarnessError(complaint)
        await asyncio.sleep(_POLL_SECONDS)


@contextlib.asynccontextmanager
async def storage_at(url: str) -> AsyncIterator[RedisStorage]:
    """The state store's own driver, in this process."""
    storage = RedisStorage(url)
    try:
        yield storage
    finally:
        await storage.close()
