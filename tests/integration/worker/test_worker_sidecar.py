"""Evictions that the sidecar scores, chooses and records, and what happens when it does not."""

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.eviction import POLICIES, Namm, tensor_payload
from eunoe.eviction.backward_attention import NUM_PARAMETERS, BackwardAttention
from eunoe.eviction.namm import Normalization
from eunoe.eviction.spectrogram import AttentionSpectrogram
from eunoe.eviction_sidecar import scoring
from eunoe.eviction_sidecar.config import EvictionSidecarConfig
from eunoe.eviction_sidecar.servicer import EvictionSidecarServicer
from eunoe.eviction_sidecar.sidecar import running_sidecar
from eunoe.internal.v1 import eviction_sidecar_pb2 as pb
from eunoe.model_worker.worker import ModelWorker
from eunoe.runtime.config import to_env
from eunoe.runtime.errors import PolicyNotFound

Text = Callable[..., bytes]


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
        told = to_env(dataclasses.replace(config, ready_file=ready_file), "EUNOE_EVICTION_SIDECAR")
        self._environment = told | {"PYTHONPATH": os.pathsep.join(sys.path)}
        self._process: subprocess.Popen[bytes]

    async def start(self) -> None:
        self._ready_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "eunoe.eviction_sidecar"]
        self._process = subprocess.Popen(command, env={**os.environ, **self._environment})  # noqa: ASYNC220
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


def counted(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"eunoe_worker_{name}_total", labels) or 0.0


def num_fallbacks(reason: str) -> float:
    return counted("eviction_fallbacks", reason=reason)


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


async def test_a_stream_goes_on_without_a_killed_sidecar_and_comes_back_to_its_policy(
    platform: Any, installation: Installation, sidecar_process: SidecarProcess, make_text: Text
) -> None:
    worker = await platform.worker(**installation.worker_settings)
    name, namm = await platform.stream(retain_log=True), a_namm(0).name
    before = num_fallbacks("unavailable")
    await fold(platform, worker, name, make_text(600, 0))

    sidecar_process.kill()
    start = time.monotonic()
    without = await fold(platform, worker, name, make_text(600, 1))
    seconds = time.monotonic() - start
    await sidecar_process.start()
    seed = 2
    while policies_of(record := await fold(platform, worker, name, make_text(100, seed)))[-1] != namm:
        seed += 1

    assert policies_of(without) == [namm, f"fallback:unavailable:{namm}"]
    assert policies_of(record) == [namm, f"fallback:unavailable:{namm}", namm]
    assert num_fallbacks("unavailable") > before
    num_segments = (without.manifest.tokens - without.manifest.decisions[1].first_segment * 16) // 16
    assert seconds < 0.5 * num_segments
    summary = await platform.verify(await platform.worker(policies_dir=installation.policies_dir), name)
    assert (summary.verdict, summary.tokens_folded) == (api.VERDICT_VERIFIED, record.stream.tokens)


async def test_a_worker_knows_the_policy_of_a_stream_that_came_to_it_while_the_sidecar_was_away(
    platform: Any, installation: Installation, sidecar_process: SidecarProcess, make_text: Text
) -> None:
    first, second = [await platform.worker(**installation.worker_settings) for _ in range(2)]
    installation.add("later", a_namm(1))
    installation.write_rules('default = "later"')
    name, later = await platform.stream(), a_namm(1).name
    while (await fold(platform, first, name, make_text(600))).stream.policy != later:
        pass

    sidecar_process.kill()
    await first.drain()
    without = await fold(platform, second, name, make_text(600))

    assert policies_of(without)[-1] == f"fallback:unavailable:{later}"


async def test_a_sidecar_that_hangs_costs_one_deadline_and_then_none_for_a_while(
    platform: Any, installation: Installation, sidecar_process: SidecarProcess, make_text: Text
) -> None:
    worker = await platform.worker(**installation.worker_settings)
    name, namm = await platform.stream(retain_log=True), a_namm(0).name
    await fold(platform, worker, name, make_text(600))
    sidecar_process.send(signal.SIGSTOP)
    start = time.monotonic()
    without = await fold(platform, worker, name, make_text(600, 1))
    seconds = time.monotonic() - start
    sidecar_process.send(signal.SIGCONT)
    seed = 2
    while policies_of(record := await fold(platform, worker, name, make_text(100, seed)))[-1] != namm:
        seed += 1
        await asyncio.sleep(0.1)

    assert policies_of(without) == [namm, f"fallback:late:{namm}"]
    # Each of more than ten segments asks twice: of all these calls one alone may run into the deadline.
    assert 0.5 <= seconds < 5.0
    num_segments = (without.manifest.tokens - without.manifest.decisions[1].first_segment * 16) // 16
    assert num_segments > 10
    assert policies_of(record) == [namm, f"fallback:late:{namm}", namm]
    assert (await platform.verify(worker, name)).verdict == api.VERDICT_VERIFIED


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (lambda scores: scores.fill_(torch.nan), "bad-scores"),
        # With which nobody could tell sinks from others.
        (lambda scores: scores.fill_(torch.inf), "bad-scores"),
        (lambda scores: scores[:, :, 1:], "bad-scores"),
        (lambda scores: scores.half(), "bad-scores"),
        (lambda scores: 1 / 0, "refused"),
    ],
    ids=["NaN", "infinity", "another shape", "another dtype", "an error"],
)
async def test_nonsense_is_a_fallback(
    platform: Any, sidecar: Installation, make_text: Text, monkeypatch: pytest.MonkeyPatch, broken: Any, reason: str
) -> None:
    worker = await platform.worker(**sidecar.worker_settings, sidecar_deadline_seconds=10.0)
    name, namm = await platform.stream(retain_log=True), a_namm(0).name
    await fold(platform, worker, name, make_text(600, 0))

    with monkeypatch.context() as patched:
        patched.setattr(scoring, "score", lambda policy, features: broken(policy.scores(features)))
        await fold(platform, worker, name, make_text(600, 1))
    record = await fold(platform, worker, name, make_text(600, 2))

    assert policies_of(record) == [namm, f"fallback:{reason}:{namm}", namm]
    assert (await platform.verify(worker, name)).verdict == api.VERDICT_VERIFIED


async def test_scores_that_changed_on_their_way_are_a_fallback(
    platform: Any, sidecar: Installation, make_text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await platform.worker(**sidecar.worker_settings, sidecar_deadline_seconds=10.0)
    name, namm = await platform.stream(retain_log=True), a_namm(0).name

    with monkeypatch.context() as patched:
        patched.setattr(scoring, "to_message", lambda scores, writer: tensor_payload.to_message(-scores, writer))
        record = await fold(platform, worker, name, make_text(600, 0))

    # The first segments evict nothing, so nobody is asked for scores.
    assert policies_of(record) == [namm, f"fallback:bad-scores:{namm}"]
    assert (await platform.verify(worker, name)).verdict == api.VERDICT_VERIFIED


async def test_the_deadline_is_for_a_segment_whatever_it_asks(
    platform: Any, installation: Installation, make_text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rpc in ("ChoosePolicy", "ScoreSlots"):
        monkeypatch.setattr(EvictionSidecarServicer, rpc, _slow(getattr(EvictionSidecarServicer, rpc), 0.25))
    name, namm = await platform.stream(), a_namm(0).name

    async with running_sidecar(installation.config) as server:
        await server.start()
        worker = await platform.worker(**installation.worker_settings, sidecar_deadline_seconds=0.4)
        record = await fold(platform, worker, name, make_text(200))
        await server.drain(0)

    assert policies_of(record) == [namm, f"fallback:late:{namm}"]


async def test_a_sidecar_of_other_numerics_or_without_the_policy_is_not_listened_to(
    platform: Any, sidecar: Installation, make_text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await platform.worker(**sidecar.worker_settings, sidecar_deadline_seconds=10.0)
    name, namm = await platform.stream(), a_namm(0).name

    with monkeypatch.context() as patched:
        patched.setattr(scoring, "scoring_numerics", lambda: "torch-0.4")
        await fold(platform, worker, name, make_text(600, 0))
    with monkeypatch.context() as patched:
        patched.setattr(scoring.Scoring, "_policy", _not_found)
        record = await fold(platform, worker, name, make_text(600, 1))

    # The first segments evict nothing, so nobody is asked for scores.
    assert policies_of(record) == [namm, f"fallback:other-numerics:{namm}", f"fallback:unknown-policy:{namm}"]


async def test_new_rules_and_parameters_count_from_the_next_segment_on(
    platform: Any, sidecar: Installation, make_text: Text
) -> None:
    worker = await platform.worker(**sidecar.worker_settings, sidecar_deadline_seconds=10.0)
    name = await platform.stream(retain_log=True)
    await fold(platform, worker, name, make_text(600, 0))

    sidecar.add("better", a_namm(1))
    sidecar.write_rules('default = "better"')
    seed = 1
    while policies_of(record := await fold(platform, worker, name, make_text(100, seed)))[-1] != a_namm(1).name:
        seed += 1
    sidecar.write_rules('default = "no such policy"')
    record = await fold(platform, worker, name, make_text(600, 1000))

    assert policies_of(record) == [a_namm(0).name, a_namm(1).name]
    assert (await platform.verify(worker, name)).verdict == api.VERDICT_VERIFIED


async def test_streams_have_policies_of_their_own(platform: Any, sidecar: Installation, make_text: Text) -> None:
    names = [await platform.stream(retain_log=True) for _ in range(3)]
    sidecar.add("other", a_namm(1))
    sidecar.write_rules(
        f"""
        default = "random"
        [[rules]]
        streams = "{names[1]}"
        policy = "snapkv/1"
        [[rules]]
        streams = "tenants/{platform.tenant}/streams/{names[2][-4:]}*"
        policy = "heavy-hitter/1"
        [[rules]]
        streams = "tenants/{platform.tenant}/streams/*{names[2][-6:]}"
        policy = "other"
        """
    )
    worker = await platform.worker(**sidecar.worker_settings, sidecar_deadline_seconds=10.0)
    await platform.until(lambda: _is_chosen(worker, names[2], a_namm(1).name))

    records = await asyncio.gather(*(fold(platform, worker, name, make_text(800)) for name in names))
    before = [record.stream.state_digest for record in records]
    answers = await asyncio.gather(*(platform.generate(worker, name, text="so", max_tokens=40) for name in names))

    assert [policies_of(record) for record in records] == [[a_namm(0).name], ["snapkv/1"], [a_namm(1).name]]
    assert len(set(before)) == 3
    assert all(answer[-1].summary.num_answer_tokens > 16 for answer in answers)
    for name, digest in zip(names, before, strict=True):
        assert (await platform.record(name)).stream.state_digest == digest
        assert (await platform.verify(worker, name)).verdict == api.VERDICT_VERIFIED


@pytest.mark.parametrize("inline_bytes", [0, 1 << 20], ids=["files", "messages"])
async def test_a_shadow_is_counted_and_changes_nothing(
    platform: Any, sidecar: Installation, make_text: Text, monkeypatch: pytest.MonkeyPatch, inline_bytes: int
) -> None:
    monkeypatch.setattr(tensor_payload, "INLINE_BYTES", inline_bytes)
    worker = await platform.worker(**sidecar.worker_settings, sidecar_deadline_seconds=10.0)
    data = make_text(2000)
    alone = await platform.digest(worker, data)
    sidecar.add("candidate", a_namm(1))
    rule = f'[[rules]]\nstreams = "tenants/{platform.tenant}/*"\npolicy = "random"\nshadow = "candidate"'
    sidecar.write_rules(f'default = "random"\n{rule}')
    labels = {"policy": a_namm(0).name, "shadow": a_namm(1).name}

    def slots(what: str) -> float:
        return REGISTRY.get_sample_value(f"eunoe_sidecar_{what}_slots_total", labels) or 0.0

    before, lost = slots("compared"), counted("lost_comparisons")
    while slots("compared") == before:
        assert await platform.digest(worker, data) == alone

    # Sinks and the newest slots are common to all.
    assert 0.2 < slots("agreed") / slots("compared") < 1.0
    assert counted("lost_comparisons") == lost


async def test_a_stream_goes_on_beside_a_shadow_that_nobody_observes(
    platform: Any, installation: Installation, make_text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answered(*arguments: Any) -> pb.ChoosePolicyResponse:
        return pb.ChoosePolicyResponse(policy="sinks-recent/1", shadow_policy="heavy-hitter/1")

    monkeypatch.setattr(EvictionSidecarServicer, "ChoosePolicy", answered)
    worker = await platform.worker(**installation.worker_settings, sidecar_deadline_seconds=10.0)

    async with running_sidecar(installation.config) as server:
        await server.start()
        record = await fold(platform, worker, await platform.stream(), make_text(2000))
        await server.drain(0)

    assert policies_of(record) == ["sinks-recent/1"]
    assert record.stream.tokens > 10 * 48


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
async def test_evictions_that_a_full_disk_has_no_room_for_are_counted_and_harm_no_stream(
    platform: Any, installation: Installation, make_text: Text
) -> None:
    worker = await platform.worker(**installation.worker_settings, sidecar_deadline_seconds=10.0)
    before = counted("unrecorded_evictions")

    async def are_counted() -> bool:
        return counted("unrecorded_evictions") - before == record.stream.tokens // 16 - 3

    async with running_sidecar(dataclasses.replace(installation.config, audit_file=Path("/dev/full"))) as server:
        await server.start()
        record = await fold(platform, worker, await platform.stream(), make_text(2000))
        await platform.until(are_counted)
        await server.drain(0)

    assert policies_of(record) == [a_namm(0).name]


async def test_a_reload_of_larger_statistics_is_taken_where_they_fit_and_waits_where_they_do_not(
    platform: Any, sidecar: Installation, make_text: Text
) -> None:
    data, settings = make_text(600), sidecar.worker_settings | {"sidecar_deadline_seconds": 10.0}
    large = await platform.worker(**settings)
    first, second = await platform.stream(), await platform.stream()
    await fold(platform, large, first, data)
    before = large.ledger.reserved_bytes
    small = await platform.worker(**settings, memory_limit_bytes=before)
    await fold(platform, small, second, data)
    wide = dataclasses.replace(a_namm(1), statistics=AttentionSpectrogram(is_packed=False))
    sidecar.add("wide", wide)
    sidecar.write_rules('default = "wide"')
    while policies_of(await fold(platform, large, first, data))[-1] != wide.name:
        pass
    num_waiting = counted("unanswered_choices", reason="no-room")
    record = await fold(platform, small, second, data)

    assert large.ledger.reserved_bytes == (await large.streams[first].load()).resident_bytes > before
    assert small.ledger.reserved_bytes == before >= (await small.streams[second].load()).resident_bytes
    assert policies_of(record) == [a_namm(0).name]
    assert counted("unanswered_choices", reason="no-room") > num_waiting
    await platform.kill(large)
    assert large.ledger.reserved_bytes == 0


async def test_the_audit_log_says_what_no_head_keeps_any_more(
    platform: Any, sidecar: Installation, make_text: Text
) -> None:
    worker = await platform.worker(**sidecar.worker_settings, sidecar_deadline_seconds=10.0)
    name = await platform.stream()
    record = await fold(platform, worker, name, make_text(2000))
    num_evictions = record.stream.tokens // 16 - 3

    async def is_written() -> bool:
        assert sidecar.config.audit_file is not None
        return sidecar.config.audit_file.exists() and len(sidecar.audit()) == num_evictions

    await platform.until(is_written)
    lines = sorted(sidecar.audit(), key=lambda line: line["segment"])
    state = (await worker.streams[name].load()).boundary_copy().state
    dropped = [position for line in lines for first, last in line["dropped"] for position in range(first, last + 1)]

    assert [line["segment"] for line in lines] == list(range(3, record.stream.tokens // 16))
    assert {(line["stream"], line["policy"]) for line in lines} == {(name, a_namm(0).name)}
    assert {(line["slots_before"], line["slots_after"]) for line in lines} == {(64, 48)}
    assert len(dropped) == len(set(dropped))
    assert set(dropped) | set(state.positions_LHS.flatten().tolist()) == set(range(record.stream.tokens))
    assert not set(dropped) & set(state.positions_LHS.flatten().tolist())


async def _is_chosen(worker: ModelWorker, stream: str, policy: str) -> bool:
    sidecar = worker.parts.sidecar
    assert sidecar is not None
    choice = await asyncio.to_thread(sidecar.choose, stream, worker.parts.policy)
    return choice.policy.name == policy


def _slow(answer: Any, seconds: float) -> Any:
    async def answered(*arguments: Any) -> Any:
        await asyncio.sleep(seconds)
        return await answer(*arguments)

    return answered


def _not_found(scoring: Any, name: str) -> Any:
    raise PolicyNotFound("it was here yesterday")
