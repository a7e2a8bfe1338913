"""Evictions that the sidecar scores, chooses and records, and what happens when it does not."""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY

from eunoe.eviction import POLICIES, Namm, tensor_payload
from eunoe.eviction.backward_attention import NUM_PARAMETERS, BackwardAttention
from eunoe.eviction.namm import Normalization
from eunoe.eviction_sidecar.config import EvictionSidecarConfig
from eunoe.eviction_sidecar.sidecar import running_sidecar
from eunoe.model_worker.worker import ModelWorker

Text = Callable[..., bytes]

SERVICES = str(Path(__file__).parents[3] / "services")


def a_namm(seed: int) -> Namm:
    parameters = 0.3 * torch.randn(NUM_PARAMETERS, generator=torch.Generator().manual_seed(seed))
    normalization = Normalization(torch.full((17,), 0.01), torch.full((17,), 0.02))
    return Namm(BackwardAttention(parameters), normalization, num_recent_tokens=8)


class Installation:
    """What sidecar and workers of a machine share: policies, a socket, a directory of payloads.

    Attributes:
        config: Of the sidecar.
    """

    def __init__(self, directory: Path) -> None:
        self.policies_dir = directory / "policies"
        self.policies_dir.mkdir()
        (directory / "payloads").mkdir()
        self.config = EvictionSidecarConfig(
            listen_address=f"unix:{directory}/sidecar.sock",
            policies_dir=self.policies_dir,
            payload_dir=directory / "payloads",
            audit_file=directory / "audit.jsonl",
            reload_seconds=0.02,
        )

    @property
    def worker_settings(self) -> dict[str, Any]:
        return {
            "scoring": "sidecar",
            "sidecar_address": self.config.listen_address,
            "policies_dir": self.policies_dir,
            "payload_dir": self.config.payload_dir,
        }

    def add(self, stem: str, policy: Namm) -> None:
        policy.save(self.policies_dir / f"{stem}.safetensors")

    def write_rules(self, text: str) -> None:
        partial = self.policies_dir / "rules.partial"
        partial.write_text(text)
        partial.replace(self.policies_dir / "rules.toml")

    def audit(self) -> list[dict[str, Any]]:
        assert self.config.audit_file is not None
        return [json.loads(line) for line in self.config.audit_file.read_text().splitlines()]


@pytest.fixture
def installation() -> Iterator[Installation]:
    """With the NAMM "random", every stream's policy."""
    # Not pytest's tmp_path: a socket's path ends at 107 bytes.
    with tempfile.TemporaryDirectory(prefix="eunoe-sidecar-") as directory:
        made = Installation(Path(directory))
        made.add("random", a_namm(0))
        made.write_rules('default = "random"')
        yield made


@pytest.fixture
async def sidecar(installation: Installation) -> AsyncIterator[Installation]:
    """The installation with a sidecar in this process."""
    async with running_sidecar(installation.config) as server:
        await server.start()
        yield installation
        await server.drain(0)


class SidecarProcess:
    """A sidecar that may be killed, stopped and started again."""

    def __init__(self, config: EvictionSidecarConfig, ready_file: Path) -> None:
        self._ready_file = ready_file
        self._environment = {
            "EUNOE_EVICTION_SIDECAR_LISTEN_ADDRESS": config.listen_address,
            "EUNOE_EVICTION_SIDECAR_POLICIES_DIR": str(config.policies_dir),
            "EUNOE_EVICTION_SIDECAR_AUDIT_FILE": str(config.audit_file),
            "EUNOE_EVICTION_SIDECAR_READY_FILE": str(ready_file),
            "PYTHONPATH": os.pathsep.join([SERVICES, str(Path(SERVICES).parent / "kernels")]),
        }
        self._process: subprocess.Popen[bytes]

    async def start(self) -> None:
        self._ready_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "eunoe.eviction_sidecar"]
        self._process = subprocess.Popen(command, env={**os.environ, **self._environment})
        async with asyncio.timeout(50):
            while not self._ready_file.exists():
                assert self._process.poll() is None, "the sidecar ended"
                await asyncio.sleep(0.02)

    def send(self, signal_number: int) -> None:
        self._process.send_signal(signal_number)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(timeout=10)


@pytest.fixture
async def sidecar_process(installation: Installation, tmp_path: Path) -> AsyncIterator[SidecarProcess]:
    process = SidecarProcess(installation.config, tmp_path / "ready")
    await process.start()
    yield process
    process.kill()


async def fold(platform: Any, worker: ModelWorker, name: str, data: bytes) -> Any:
    """Fold what is full of more text; the stream's record after it."""
    await platform.append(name, data)
    return await platform.flush(worker, name)


def policies_of(record: Any) -> list[str]:
    return [run.policy for run in record.manifest.decisions]


def num_fallbacks(reason: str) -> float:
    return REGISTRY.get_sample_value("eunoe_worker_eviction_fallbacks_total", {"reason": reason}) or 0.0


@pytest.mark.parametrize("policy", ["random", *(name for name in POLICIES)])
@pytest.mark.parametrize("has_files", [False, True], ids=["messages", "files"])
async def test_scores_of_the_sidecar_and_of_the_worker_give_the_same_state(
    platform: Any, sidecar: Installation, make_text: Text, monkeypatch: pytest.MonkeyPatch, policy: str, has_files: bool
) -> None:
    if has_files:
        monkeypatch.setattr(tensor_payload, "INLINE_BYTES", 0)
    sidecar.write_rules(f'default = "{policy}"')
    here = await platform.worker(policies_dir=sidecar.policies_dir, policy=policy)
    beside = await platform.worker(**sidecar.worker_settings, sidecar_deadline_seconds=10.0)
    both = await platform.worker(**sidecar.worker_settings | {"scoring": "in_process"}, sidecar_deadline_seconds=10.0)
    data = make_text(2000)

    digests = {await platform.digest(worker, data) for worker in (here, beside, both)}

    assert len(digests) == 1
    has_scores = policy != "sinks-recent/1"
    assert any(Path(sidecar.config.payload_dir or "").iterdir()) == (has_files and has_scores)
