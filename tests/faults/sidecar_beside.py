"""What is beside a worker here: an eviction sidecar that is started again when it ends, and a proxy before it."""

import asyncio
import random
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import torch
from fault_proxy import FaultProxy
from worker_processes import Process, until

from eunoe.eviction import Namm
from eunoe.eviction.backward_attention import NUM_PARAMETERS, BackwardAttention
from eunoe.eviction.namm import Normalization
from eunoe.eviction_sidecar.config import EvictionSidecarConfig
from eunoe.runtime.config import to_env

_RULES = """
default = "heavy-hitter/1"
[[rules]]
streams = "*/namm*"
policy = "random"
"""


class SidecarBeside:
    """A sidecar of two policies: a random NAMM for streams named namm..., heavy hitters for all others.

    Attributes:
        proxy: Between the worker and the sidecar.
        process: The sidecar that runs now, or that has ended last.
        absence_seconds: From its end to the start of the next one.
        num_ends: How often it has ended.
    """

    def __init__(self, seed: int) -> None:
        # Not pytest's: a socket's path ends at 107 bytes.
        self._directory = Path(tempfile.mkdtemp(prefix="eunoe-beside-"))
        self.policies_dir, self.payload_dir = self._directory / "policies", self._directory / "payloads"
        for directory in (self.policies_dir, self.payload_dir):
            directory.mkdir()
        parameters = 0.3 * torch.randn(NUM_PARAMETERS, generator=torch.Generator().manual_seed(seed))
        normalization = Normalization(torch.full((17,), 0.01), torch.full((17,), 0.02))
        namm = Namm(BackwardAttention(parameters), normalization, num_recent_tokens=8)
        namm.save(self.policies_dir / "random.safetensors")
        (self.policies_dir / "rules.toml").write_text(_RULES)
        self.socket = self._directory / "sidecar.sock"
        self.audit_file = self._directory / "audit.jsonl"
        self.ready_file = self._directory / "sidecar.json"
        self.config = EvictionSidecarConfig(
            listen_address=f"unix:{self.socket}",
            policies_dir=self.policies_dir,
            payload_dir=self.payload_dir,
            audit_file=self.audit_file,
            reload_seconds=0.2,
            ready_file=self.ready_file,
        )
        self.proxy = FaultProxy(f"unix://{self.socket}", seed, listen_path=self._directory / "proxy.sock")
        self.absence_seconds = 0.0
        self.num_ends = 0
        self.process: Process
        self._keeping: asyncio.Task[None]

    async def __aenter__(self) -> Self:
        await self.proxy.__aenter__()
        self._start()
        self._keeping = asyncio.create_task(self._keep())
        await until(self.serves, "the sidecar does not serve")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._keeping.cancel()
        await asyncio.wait([self._keeping])
        self.process.end()
        await self.proxy.__aexit__()
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def worker_settings(self) -> dict[str, Any]:
        """Of a worker beside it."""
        return {
            "scoring": "sidecar",
            "sidecar_address": self.proxy.address,
            "policies_dir": self.policies_dir,
            "payload_dir": self.payload_dir,
        }

    async def serves(self) -> bool:
        """Whether one that runs has said that it serves."""
        return self.process.exit_status is None and self.ready_file.exists()

    async def has_ended(self, num_ends: int) -> bool:
        """Whether it has ended more often than so many times."""
        return self.num_ends > num_ends

    @asynccontextmanager
    async def impostor(self, chance: random.Random) -> AsyncIterator[None]:
        """Somebody else listens in the sidecar's place, who knows random bytes only."""

        async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while await reader.read(1 << 16):
                    writer.write(chance.randbytes(chance.randint(1, 500)))
                    await writer.drain()
            except ConnectionError:
                pass
            finally:
                writer.close()

        path = self._directory / "impostor.sock"
        async with await asyncio.start_unix_server(babble, path):
            self.proxy.target = f"unix://{path}"
            self.proxy.reset_all()
            try:
                yield
            finally:
                self.proxy.target = f"unix://{self.socket}"
                self.proxy.reset_all()

    def _start(self) -> None:
        self.ready_file.unlink(missing_ok=True)
        environment = to_env(self.config, "EUNOE_EVICTION_SIDECAR")
        self.process = Process("garbling_sidecar", environment, self._directory / "sidecar.log")

    async def _keep(self) -> None:
        while True:
            await self.process.ended()
            self.num_ends += 1
            await asyncio.sleep(self.absence_seconds)
            self._start()
