"""The eviction sidecar is killed, stopped, cut off and made to answer garbage under streams that are appended to.

Nobody who appends may notice; each segment that was decided without the policy is recorded as such, the policy comes
back, and another worker that folds the log with the recorded decisions gets the same memory.
"""

import asyncio
import contextlib
import itertools
import json
import random
import signal
import statistics
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from endless_writer import EndlessWriter, writing
from prometheus_client.parser import text_string_to_metric_families
from sidecar_beside import SidecarBeside
from sidecar_strikes import StrikeFigures, Striker, drawn_kinds
from timed_worker import Stopwatch, TimedEviction
from worker_processes import Fault, Site, until

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.client import AsyncClient
from eunoe.embedded.processes import free_ports
from eunoe.internal.v1 import state_store_pb2 as pb

_FAULTS_A_ROUND = 25
# A name, the segment's length and the budget. Features and scores of the first two go as files, those of the last in
# messages.
_STREAMS = (("namm", 16, 48), ("hitter", 16, 48), ("short", 8, 16))
_AUDIT_SECONDS = 70.0


@dataclass(kw_only=True)
class SidecarFigures(StrikeFigures):
    """What was done to the sidecar, and what came of it.

    Attributes:
        num_appends: Acknowledged records, of `num_bytes` together.
        failed_appends: What appends failed of, and each time that their call broke.
        lost_bytes: By which logs are not what was appended.
        num_evictions: By policies, fallbacks among them.
        recorded: Segments of the recorded runs of fallbacks, by reason.
        counted: The worker's counter of fallbacks, by reason.
        misrecorded: Segments of which worker, manifest and audit log do not say the same.
        failed_folds: What the worker logged of streams that failed there, and were folded again.
        num_unanswered_choices: Segments whose policy stayed because nobody chose one.
        num_unaudited: Evictions that are not in the audit log, of which the worker counted `num_unrecorded`.
        verdicts: Of all streams, folded anew by another worker, by name.
        different: The verdicts that are not VERIFIED, in full.
        usual_seconds: The median time that the sidecar kept a segment.
    """

    num_appends: int = 0
    num_bytes: int = 0
    failed_appends: list[str] = field(default_factory=list)
    lost_bytes: int = 0
    num_evictions: int = 0
    recorded: Counter[str] = field(default_factory=Counter)
    counted: Counter[str] = field(default_factory=Counter)
    misrecorded: list[str] = field(default_factory=list)
    failed_folds: list[str] = field(default_factory=list)
    num_unanswered_choices: int = 0
    num_unaudited: int = 0
    num_unrecorded: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    different: list[str] = field(default_factory=list)
    usual_seconds: float = 0.0
    seconds: float = 0.0


async def sidecar_faults(num_faults: int, seed: int, model_path: Path, deadline_seconds: float = 0.5) -> SidecarFigures:
    """Do harm to a sidecar so often, each time after every stream has come back to its policy.

    Args:
        num_faults: How many.
        seed: Of kinds, moments, garbage and texts.
        model_path: The model's directory.
        deadline_seconds: That the worker gives its sidecar.
    """
    start, figures = time.monotonic(), SidecarFigures()
    kinds = drawn_kinds(num_faults, random.Random(f"{seed} kinds"))
    async with SidecarBeside(seed) as beside, Site(model_path) as site:
        (metrics_port,) = free_ports(1)
        worker = await site.serving_worker(
            module="timed_worker",
            metrics_port=metrics_port,
            sidecar_deadline_seconds=deadline_seconds,
            **beside.worker_settings,
        )
        stopwatch = Stopwatch(worker.ready_file)
        gateway = await site.serving_gateway()
        striker = Striker(beside, stopwatch, figures, random.Random(f"{seed} faults"), deadline_seconds)
        async with AsyncClient(gateway.address) as client:
            for number, first in enumerate(range(0, num_faults, _FAULTS_A_ROUND)):
                writers = [
                    EndlessWriter(
                        site,
                        client,
                        f"{name}{number}",
                        segment_length=segment_length,
                        kv_budget_tokens=budget,
                        seed=f"{seed} {name}{number}",
                    )
                    for name, segment_length, budget in _STREAMS
                ]
                async with writing(writers):
                    striker.streams = [writer.name for writer in writers]
                    await striker.strike_all(kinds[first : first + _FAULTS_A_ROUND])
                for writer in writers:
                    await _check(writer, stopwatch.read(), figures)
                await _verify(site, client, beside, writers, figures)
        figures.num_evictions = len(stopwatch.read())
        figures.usual_seconds = statistics.median(each.seconds for each in stopwatch.evictions)
        figures.failed_folds = [line for line in worker.log_file.read_text().splitlines() if "a stream failed" in line]
        await _check_audit(beside.audit_file, stopwatch.evictions, metrics_port, figures)
        figures.counted = await _counted(metrics_port, "eunoe_worker_eviction_fallbacks")
        figures.num_unanswered_choices = (await _counted(metrics_port, "eunoe_worker_unanswered_choices")).total()
    figures.seconds = time.monotonic() - start
    return figures


async def _check(writer: EndlessWriter, evictions: list[TimedEviction], figures: SidecarFigures) -> None:
    """Compare log and manifest of a stream that has come to its end with what its writer and the worker did."""
    figures.num_appends += writer.num_appends
    figures.num_bytes += writer.num_bytes
    figures.failed_appends += writer.failures
    figures.lost_bytes += await writer.num_lost_bytes()
    decided = [*_decided(await writer.record())]
    figures.recorded += Counter(policy.split(":")[1] for policy in decided if policy.startswith("fallback:"))
    told = {each.segment: each.policy for each in evictions if each.stream == writer.name}
    for segment, policy in enumerate(decided):
        # Nothing is evicted before the budget is exceeded.
        if told.get(segment, policy) != policy:
            figures.misrecorded.append(f"{writer.name} {segment}: {policy}, not {told[segment]}")


def _decided(record: pb.StreamRecord) -> Iterator[str]:
    """What decided, segment by segment."""
    runs, manifest = record.manifest.decisions, record.manifest
    ends = [*(run.first_segment for run in runs[1:]), manifest.tokens // record.stream.settings.segment_length]
    for run, end in zip(runs, ends, strict=True):
        yield from itertools.repeat(run.policy, end - run.first_segment)


async def _verify(
    site: Site, client: AsyncClient, beside: SidecarBeside, writers: list[EndlessWriter], figures: SidecarFigures
) -> None:
    """Have another worker, which has the policies but no sidecar, fold all logs anew."""
    other = await site.serving_worker(policies_dir=beside.policies_dir)
    for writer in writers:
        summary = await client.verify_stream(writer.stream_id)
        is_whole = summary.tokens_folded == (await writer.record()).manifest.tokens
        verdict = api.Verdict.Name(summary.verdict).removeprefix("VERDICT_") + ("" if is_whole else " in part")
        figures.verdicts[verdict] += 1
        if verdict != "VERIFIED":
            figures.different.append(f"{writer.stream_id}: {summary}")
    other.send(signal.SIGTERM)
    await other.ended()
    for writer in writers:
        await client.delete_stream(writer.stream_id)


async def _check_audit(
    audit_file: Path, evictions: list[TimedEviction], metrics_port: int, figures: SidecarFigures
) -> None:
    """Compare the audit log with what the worker did, once all that was under way has come."""
    decided = {(each.stream, each.segment): each.policy for each in evictions}

    async def is_complete() -> bool:
        figures.num_unrecorded = (await _counted(metrics_port, "eunoe_worker_unrecorded_evictions")).total()
        figures.num_unaudited = len(decided.keys() - {(line["stream"], line["segment"]) for line in _lines(audit_file)})
        return figures.num_unaudited <= figures.num_unrecorded

    with contextlib.suppress(Fault):
        await until(is_complete, "", _AUDIT_SECONDS)
    for line in _lines(audit_file):
        key = (line["stream"], line["segment"])
        if decided.get(key) != line["policy"]:
            figures.misrecorded.append(f"{key}: audited as {line['policy']}, not {decided.get(key)}")


def _lines(audit_file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in audit_file.read_text().splitlines()]


async def _counted(metrics_port: int, name: str) -> Counter[str]:
    """A counter of the worker, by the value of its only label."""

    def read() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=30.0) as response:
            text: str = response.read().decode()
            return text

    families = text_string_to_metric_families(await asyncio.to_thread(read))
    samples = [sample for family in families for sample in family.samples if sample.name == f"{name}_total"]
    return Counter({"".join(sample.labels.values()): int(sample.value) for sample in samples})
