"""Does eunoe-nano recall a passkey from up to a million bytes ago? Asked of the running platform, or many side by side.

The task is that of Infini-attention's appendix B: a key of five digits hidden at the start, in the middle or at the
end of filler, asked for after all of it. `passkey_<length>_<depth>` is the share of digits that are right (guessing:
0.1), `..._exact` that of whole answers. By default each document is streamed into a platform of two workers over gRPC
and asked about by Generate; of each length the first stream is then verified by the other worker, which folds its log
anew to the same digest. A stream whose owner is killed in the middle, and a fork of it from there, must end with the
digest and the answer of one that nothing happened to.

`--batched N` instead reads N cases a cell side by side, with the weights that the platform serves, and the controls:
the window alone, and a memory that is zeroed just before the answer.
"""

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from _report import Report, arguments

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.client import AppendProgress, AsyncClient, Stream, StreamSettings
from eunoe.clients.state_store import StateStoreClient
from eunoe.embedded.models import resolve_model
from eunoe.embedded.platform import Platform
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.runtime.grpc_channel import open_channel
from eunoe.training.decoder.export import load
from eunoe.training.decoder.passkey import question
from eunoe.training.decoder.passkey_evaluation import (
    NUM_ANSWER_BYTES,
    MemoryUse,
    PasskeyCase,
    answers,
    passkey_case,
    scores,
)

LENGTHS = {"10k": 10_240, "32k": 1 << 15, "128k": 1 << 17, "256k": 1 << 18, "512k": 1 << 19, "1m": 1 << 20}
DEPTHS = {"start": 0.0, "middle": 0.5, "end": 1.0}
CONTROLS: tuple[MemoryUse, ...] = ("window_only", "zeroed")
SEGMENT_LENGTH = 128


def main() -> None:
    """Measure and print."""
    options = parsed_options()
    # A benchmark that is told to end must still stop the platform that it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    report = Report("passkey", as_json=options.json)
    _, directory = resolve_model(str(options.model), on_step=report.say)
    if options.batched:
        torch.set_num_threads(options.threads)
        ask_side_by_side(report, options, directory)
    else:
        with tempfile.TemporaryDirectory(prefix="eunoe-bench-") as home:
            platform = Platform(home=Path(home), model=directory, workers=2, threads=1, on_step=report.progress)
            with platform:
                asyncio.run(ask_platform(report, options, platform))
    report.finish()


def parsed_options() -> argparse.Namespace:
    """What the command line says."""
    parser = arguments(__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="eunoe-nano", help="name or directory (default: %(default)s)")
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, help="of the documents (default: 32k to 1m)")
    parser.add_argument("--cases", type=int, default=3, help="a cell, of the platform (default: %(default)s)")
    parser.add_argument("--batched", type=int, default=0, metavar="N", help="cases a cell side by side, no platform")
    parser.add_argument("--filler", choices=("paper", "shuffled", "book"), default="paper", help="of the test split")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.lengths = options.lengths or (["10k"] if options.quick else list(LENGTHS)[1:])
    return options


def cells(options: argparse.Namespace, count: int) -> Iterator[tuple[str, str, list[PasskeyCase]]]:
    """Names of a length and a depth, and the cell's cases."""
    for length in options.lengths:
        for depth, share in DEPTHS.items():
            # A case is the same whatever other cells are asked for.
            generator = np.random.default_rng((options.seed, LENGTHS[length], list(DEPTHS).index(depth)))
            yield length, depth, [passkey_case(LENGTHS[length], share, generator, options.filler) for _ in range(count)]


def ask_side_by_side(report: Report, options: argparse.Namespace, directory: Path) -> None:
    """All cases of a cell in one batch, and a few of them again with each control."""
    model = load(directory)
    for length, depth, cases in cells(options, options.batched):
        for use in ("all", *CONTROLS):
            asked = cases if use == "all" else cases[:10]
            if use != "all" and LENGTHS[length] > LENGTHS["32k"]:
                continue
            report.progress(f"{length} {depth}, {use}: {len(asked)} cases")
            suffix = "" if use == "all" else f"_{use}"
            add_cell(report, f"passkey_{length}_{depth}{suffix}", asked, answers(model, asked, SEGMENT_LENGTH, use))


def add_cell(report: Report, name: str, cases: list[PasskeyCase], given: list[bytes]) -> None:
    """Shares of digits and of whole answers that are right."""
    (score,) = scores(cases, given).values()
    report.add(name, score.digit_accuracy, f"of the digits of {score.num_cases} answers")
    report.add(f"{name}_exact", score.exact_match, "of the answers")


@dataclass(frozen=True, slots=True)
class Asked:
    """A case that the platform answered."""

    answer: bytes
    stream: Stream
    seconds: float


async def ask_platform(report: Report, options: argparse.Namespace, platform: Platform) -> None:
    """Every cell, two documents at a time; then what is only measured once."""
    turns = asyncio.Semaphore(2)
    async with AsyncClient(platform.address) as client:
        num_verified = 0
        for length, depth, cases in cells(options, options.cases):
            report.progress(f"{length} {depth}: {len(cases)} cases")
            names = [f"{length}-{depth}-{index}" for index in range(len(cases))]
            asked = await asyncio.gather(
                *(
                    ask(client, name, case, turns, retain_log=name.endswith("-start-0"))
                    for name, case in zip(names, cases, strict=True)
                )
            )
            add_cell(report, f"passkey_{length}_{depth}", cases, [each.answer for each in asked])
            report.say(f"    digests {', '.join(each.stream.state_digest for each in asked)}")
            if depth == "start":
                verdict = (await client.verify_stream(names[0])).verdict
                num_verified += verdict == api.VERDICT_VERIFIED
            for name in names:
                await client.delete_stream(name)
        report.add("digests_verified", num_verified, f"of {len(options.lengths)}, one stream a length")
        longest = options.lengths[-1]
        await time_alone(report, client, longest, options)
        await move(report, client, platform, longest, options)


async def ask(
    client: AsyncClient, name: str, case: PasskeyCase, turns: asyncio.Semaphore, *, retain_log: bool = False
) -> Asked:
    """Stream a case's document and generate the answer."""
    async with turns:
        await client.create_stream(name, settings=StreamSettings(retain_log=retain_log))
        start = time.perf_counter()
        stream = await client.append(name, case.prompt[: -len(question())])
        seconds = time.perf_counter() - start
        return Asked(await answer(client, name), stream, seconds)


async def answer(client: AsyncClient, name: str) -> bytes:
    """What the model says to the question, greedily."""
    summary = await client.generate(name, question(), max_tokens=NUM_ANSWER_BYTES).finish()
    return summary.text.encode()


async def time_alone(report: Report, client: AsyncClient, length: str, options: argparse.Namespace) -> None:
    """How long one document takes that has the platform for itself, and the size of its memory."""
    samples: list[tuple[float, int]] = []
    document, _ = a_document(length, options)

    def on_progress(progress: AppendProgress) -> None:
        samples.append((time.perf_counter(), progress.folded_offset))
        report.progress(f"{length} alone: {progress.folded_offset:,} bytes")

    await client.create_stream("alone")
    start = time.perf_counter()
    stream = await client.append("alone", document, on_progress=on_progress)
    end = time.perf_counter()
    report.add(f"seconds_{length}", end - start, f"{len(document) / (end - start):,.0f} bytes/s, nothing else runs")
    report.add(f"state_bytes_{length}", stream.state_bytes, "of the checkpoint: window of 128 bytes, float32")
    points = [(start, 0), *samples, (end, len(document))]
    first, last = seconds_between(points, 0.0, 0.1), seconds_between(points, 0.9, 1.0)
    report.add(f"flatness_{length}", first / last, "speed of the last tenth over that of the first")
    await client.create_stream("short")
    short = await client.append("short", document[: LENGTHS["10k"]])
    report.add("state_bytes_10k", short.state_bytes, f"after {LENGTHS['10k']:,} bytes")


def a_document(length: str, options: argparse.Namespace) -> tuple[bytes, bytes]:
    """A document with its key at the start, and the answer."""
    case = passkey_case(LENGTHS[length], 0.0, np.random.default_rng(options.seed), options.filler)
    return case.prompt[: -len(question())], case.answer


def seconds_between(points: list[tuple[float, int]], low: float, high: float) -> float:
    """Time from one share of the bytes to another, interpolated."""
    times, offsets = zip(*points, strict=True)
    end = offsets[-1]
    at_low, at_high = np.interp([low * end, high * end], offsets, times)
    return float(at_high - at_low)


async def move(
    report: Report, client: AsyncClient, platform: Platform, length: str, options: argparse.Namespace
) -> None:
    """The same document three times: undisturbed, with its owner killed in the middle, and forked there."""
    document, expected = a_document(length, options)
    middle = len(document) // 2
    await client.create_stream("moved")
    half = await client.append("moved", document[:middle])
    await client.fork_stream("moved", "forked")
    killed = await owner(platform, half.name)
    killed.kill()
    report.progress(f"{length}: owner killed after {middle:,} bytes")
    ends = await asyncio.gather(*(client.append(name, document[middle:]) for name in ("moved", "forked")))
    undisturbed = await client.get_stream("alone")
    num_equal = sum(end.state_digest == undisturbed.state_digest for end in ends)
    report.add("moved_and_forked_digests_equal", num_equal, f"of 2, to {undisturbed.state_digest}")
    given = [await answer(client, name) for name in ("alone", "moved", "forked")]
    report.add("moved_and_forked_answers_right", sum(each == expected for each in given), f"of 3: {given}")


async def owner(platform: Platform, name: str) -> psutil.Process:
    """The process of the worker that holds a stream's lease."""
    async with open_channel(platform.state_store_address) as channel:
        record = (await StateStoreClient(channel).get_stream(pb.GetStreamRequest(name=name))).record
    port = int(record.lease.address.rpartition(":")[2])
    host = next(process for process in platform.record.processes if process.name == "ray_host")
    for process in psutil.Process(host.pid).children(recursive=True):
        if any(
            each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in process.net_connections("tcp")
        ):
            return process
    raise SystemExit(f"nobody listens at {record.lease.address}")


if __name__ == "__main__":
    main()
