"""Starting, finding and stopping the processes of one machine's platform."""

import contextlib
import fcntl
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Self

from eunoe.embedded.home import PlatformRecord, default_home, read_record
from eunoe.embedded.models import DEFAULT_MODEL, default_policy, default_threads, resolve_model
from eunoe.embedded.processes import (
    ProcessRecord,
    free_ports,
    is_alive,
    is_port_free,
    last_lines,
    start_process,
    stop_process,
)
from eunoe.embedded.ray_host import RayHostConfig
from eunoe.embedded.redis_server import answers_ping, redis_command
from eunoe.eviction_sidecar.config import EvictionSidecarConfig
from eunoe.runtime.config import to_env

DEFAULT_PORT = 8400

# In the order of starting. Each is stopped before what it needs; Ray's grace covers the drain of its workers.
_GRACE_SECONDS = {"redis": 10.0, "state_store": 10.0, "eviction_sidecar": 5.0, "ray_host": 60.0, "gateway": 15.0}
_POLL_SECONDS = 0.05


class StartFailed(Exception):
    """The platform did not come up; the message says why, with the last log lines of a process that failed."""


class AlreadyRunning(Exception):
    """A platform with this home runs already, at `address`."""

    def __init__(self, address: str) -> None:
        super().__init__(f"already running at {address}")
        self.address = address


class Platform:
    """The platform of one home directory; as a context manager it runs inside of the block.

    Args:
        home: Where data and logs lie; default is EUNOE_HOME, then ~/.eunoe.
        model: As `resolve_model` takes it.
        workers: Model workers.
        threads: Threads of each worker; None: as many as are of use to the model.
        port: The gateway's; 0 picks a free one.
        memory_limit_bytes: Most bytes of resident memory states of a worker; None leaves the worker's default.
        requires_key: Refuse calls without an API key.
        policy: Evicts where the rules in the home's `policies` say nothing: a name, or the stem of a file there. None:
            the one trained for the model, else sinks and recent.
        on_step: Told what is being waited for.
    """

    def __init__(
        self,
        *,
        home: Path | None = None,
        model: str | Path = DEFAULT_MODEL,
        workers: int = 1,
        threads: int | None = None,
        port: int = 0,
        memory_limit_bytes: int | None = None,
        requires_key: bool = False,
        policy: str | None = None,
        on_step: Callable[[str], None] = lambda step: None,
    ) -> None:
        if workers < 1 or (threads is not None and threads < 1):
            raise ValueError("workers and threads must be at least 1")
        self.home = (home or default_home()).resolve()
        self._model = str(model)
        self._num_workers = workers
        self._num_threads = threads
        self._port = port
        self._memory_limit_bytes = memory_limit_bytes
        self._requires_key = requires_key
        self._policy = policy
        self._on_step = on_step
        self._record: PlatformRecord | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def record(self) -> PlatformRecord:
        """What runs.

        Raises:
            ValueError: If it was not started.
        """
        if self._record is None:
            raise ValueError("the platform is not started")
        return self._record

    @property
    def address(self) -> str:
        """host:port for clients."""
        return self.record.address

    @property
    def state_store_address(self) -> str:
        """host:port of the state store, for administration."""
        return self.record.state_store_address

    @property
    def model(self) -> str:
        """The served model's name."""
        return self.record.model

    def start(self) -> None:
        """Bring everything up on the home's data; what a crashed platform left is ended first.

        Raises:
            AlreadyRunning: If one with this home is up.
            ModelUnavailable: If the model cannot be had.
            StartFailed: If the port is taken, or a process fails; whatever was started is stopped again.
        """
        with self._locked():
            if (found := read_record(self.home)) is not None:
                if found.is_running:
                    raise AlreadyRunning(found.address)
                self._on_step("cleaning up what is left of a former run")
                _stop_all(found)
            if not is_port_free(self._port):
                raise StartFailed(
                    f"port {self._port} is taken: choose another one (`eunoe up --port 0` picks a free one)"
                )
            name, directory = resolve_model(self._model, on_step=self._on_step)
            # Socket paths end at 107 bytes, and Ray's session takes 64 of them.
            temp_dir = tempfile.mkdtemp(prefix="eunoe-", dir="/tmp" if Path("/tmp").is_dir() else None)
            self._record = PlatformRecord(model=name, temp_dir=temp_dir)
            try:
                self._start_all(name, directory)
            except BaseException:
                self._on_step("stopping what was started")
                self._stop_locked()
                raise

    def stop(self) -> None:
        """End everything, in whatever state it is; data and logs stay."""
        with self._locked():
            self._record = read_record(self.home)
            self._stop_locked()

    def _stop_locked(self) -> None:
        if self._record is not None:
            _stop_all(self._record, on_step=self._on_step)
        (self.home / "platform.json").unlink(missing_ok=True)
        self._record = None

    def _start_all(self, model_name: str, model_path: Path) -> None:
        temp_dir = Path(self.record.temp_dir)
        socket_path = temp_dir / "redis.sock"
        redis = self._spawn("redis", redis_command(self.home / "redis", socket_path), {})
        self._wait(redis, "the log's disk (Redis)", 60.0, lambda: answers_ping(socket_path))

        ready_file = temp_dir / "state_store.json"
        environment = {
            "EUNOE_STATE_STORE_LISTEN_ADDRESS": "127.0.0.1:0",
            "EUNOE_STATE_STORE_REDIS_URL": f"unix://{socket_path}",
            "EUNOE_STATE_STORE_DATA_MARKER_FILE": str(self.home / "redis-installation"),
            "EUNOE_STATE_STORE_READY_FILE": str(ready_file),
        }
        state_store = self._spawn("state_store", _module("eunoe.state_store"), environment)
        self._wait(state_store, "the state store", 30.0, ready_file.exists)
        self.record.state_store_address = _address_in(ready_file)

        policies_dir, payload_dir = self.home / "policies", _payload_dir(self.record)
        policies_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Its name could be seen before: one that is there already is somebody else's.
        payload_dir.mkdir(mode=0o700)
        sidecar_ready_file = temp_dir / "eviction_sidecar.json"
        policy = self._policy or default_policy(model_name)
        sidecar_config = EvictionSidecarConfig(
            listen_address=f"unix:{temp_dir}/sidecar.sock",
            policies_dir=policies_dir,
            policy=policy,
            payload_dir=payload_dir,
            audit_file=self.home / "logs" / "evictions.jsonl",
            ready_file=sidecar_ready_file,
        )
        environment = {**to_env(sidecar_config, "EUNOE_EVICTION_SIDECAR"), "OMP_NUM_THREADS": "1"}
        keeper = [*_module("eunoe.embedded.keeper"), str(sidecar_ready_file)]
        sidecar = self._spawn("eviction_sidecar", [*keeper, *_module("eunoe.eviction_sidecar")], environment)

        serve_grpc_port, serve_http_port = free_ports(2)
        ray_ready_file = temp_dir / "ray_host.json"
        ray_config = RayHostConfig(
            model_name=model_name,
            model_path=model_path,
            state_store_address=self.record.state_store_address,
            serve_grpc_port=serve_grpc_port,
            serve_http_port=serve_http_port,
            temp_dir=temp_dir / "ray",
            ready_file=ray_ready_file,
            num_workers=self._num_workers,
            num_threads=self._num_threads or default_threads(model_name),
            memory_limit_bytes=self._memory_limit_bytes,
            sidecar_address=sidecar_config.listen_address,
            policies_dir=policies_dir,
            policy=policy,
            payload_dir=payload_dir,
        )
        ray_host = self._spawn("ray_host", _module("eunoe.embedded.ray_host"), to_env(ray_config, "EUNOE_RAY_HOST"))

        ready_file = temp_dir / "gateway.json"
        environment = {
            "EUNOE_GATEWAY_LISTEN_ADDRESS": f"127.0.0.1:{self._port}",
            "EUNOE_GATEWAY_STATE_STORE_ADDRESS": self.record.state_store_address,
            "EUNOE_GATEWAY_SERVE_ADDRESS": f"127.0.0.1:{serve_grpc_port}",
            "EUNOE_GATEWAY_REQUIRES_KEY": str(self._requires_key).lower(),
            "EUNOE_GATEWAY_READY_FILE": str(ready_file),
        }
        gateway = self._spawn("gateway", _module("eunoe.gateway"), environment)
        self._wait(gateway, "the gateway", 30.0, ready_file.exists)
        self.record.address = _address_in(ready_file)

        self._wait(sidecar, "the eviction sidecar", 60.0, sidecar_ready_file.exists)
        workers = "a model worker" if self._num_workers == 1 else f"{self._num_workers} model workers"
        self._wait(ray_host, f"Ray with {workers}", 240.0, ray_ready_file.exists)
        self.record.is_ready = True
        self._write_record()

    def _spawn(self, name: str, command: list[str], environment: dict[str, str]) -> ProcessRecord:
        process = start_process(
            name,
            command,
            environment={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            log_file=self.home / "logs" / f"{name}.log",
        )
        self.record.processes.append(process)
        self._write_record()
        return process

    def _wait(self, process: ProcessRecord, what: str, timeout_seconds: float, is_up: Callable[[], bool]) -> None:
        self._on_step(f"waiting for {what}")
        give_up_at = time.monotonic() + timeout_seconds
        while not is_up():
            for other in self.record.processes:
                if not is_alive(other):
                    raise StartFailed(f"{other.name} ended; its log ({other.log_file}):\n{last_lines(other.log_file)}")
            if time.monotonic() > give_up_at:
                raise StartFailed(
                    f"{process.name} was not up after {timeout_seconds:.0f} s; its log ({process.log_file}):\n"
                    f"{last_lines(process.log_file)}"
                )
            time.sleep(_POLL_SECONDS)

    def _write_record(self) -> None:
        partial = self.home / "platform.json.partial"
        partial.write_text(json.dumps(asdict(self.record), indent=2))
        partial.replace(self.home / "platform.json")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One start or stop of a home at a time."""
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self.home / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _stop_all(record: PlatformRecord, on_step: Callable[[str], None] = lambda step: None) -> None:
    for process in reversed(record.processes):
        on_step(f"stopping {process.name}")
        stop_process(process, grace_seconds=_GRACE_SECONDS[process.name])
    for directory in (Path(record.temp_dir), _payload_dir(record)):
        shutil.rmtree(directory, ignore_errors=True)


def _payload_dir(record: PlatformRecord) -> Path:
    """In memory, where there is such a directory."""
    temp_dir, shared_memory = Path(record.temp_dir), Path("/dev/shm")
    return shared_memory / temp_dir.name if shared_memory.is_dir() else temp_dir / "payloads"


def _module(name: str) -> list[str]:
    # -P: a file in the user's directory must not shadow a library.
    return [sys.executable, "-P", "-m", name]


def _address_in(ready_file: Path) -> str:
    address: str = json.loads(ready_file.read_text())["address"]
    return address
