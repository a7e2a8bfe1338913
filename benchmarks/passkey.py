"""Does eunoe-nano recall a passkey from up to a million bytes ago? Asked of the running platform, or many side by side.

The task is that of Infini-attention's appendix B: a key of five digits hidden at the start, in the middle or at the
end of filler, asked for after all of it. `passkey_<length>_<depth>` is the share of digits that are right (guessing:
0.1), `..._exact` that of whole answers. By default documents are streamed into a platform of two workers over gRPC and
asked about by Generate. Bytes that several documents begin with are streamed once: where the documents part, the stream
is forked, and a document that is the beginning of another is asked about on the way. (The filler of all is the same,
and so is a case's key at the start, whatever the length.) A fork's memory is that of the shared bytes, so every answer
is that of a stream of its document alone. Of the longest documents one a depth is then verified by another worker,
which folds its log anew to the same digest. A stream whose owner is killed in the middle, and a fork of it from there,
must end with the digest and the answer of one that nothing happened to.

`--batched N` instead reads N cases a cell side by side, with the weights that the platform serves, and the controls:
the window alone, and a memory that is zeroed just before the answer.
"""

import argparse
import asyncio
import itertools
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch
from _report import Report, arguments

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.client import AppendProgress, AsyncClient, StreamSettings
from eunoe.clients.state_store import StateStoreClient
from eunoe.decoder.checkpoint import load_stream_defaults
from eunoe.embedded.models import resolve_model
from eunoe.embedded.platform import Platform
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.runtime.grpc_channel import open_channel
from eunoe.training.bootstrap import mean_interval, share_interval
from eunoe.training.decoder.export import load
from eunoe.training.decoder.passkey import question
from eunoe.training.decoder.passkey_evaluation import (
    NUM_ANSWER_BYTES,
    MemoryUse,
    PasskeyCase,
    answered,
    passkey_case,
    scores,
)

LENGTHS = {"10k": 10_240, "32k": 1 << 15, "128k": 1 << 17, "256k": 1 << 18, "512k": 1 << 19, "1m": 1 << 20}
DEPTHS = {"start": 0.0, "middle": 0.5, "end": 1.0}
CONTROLS: tuple[MemoryUse, ...] = ("window_only", "zeroed")


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
    parser.add_argument("--depths", nargs="+", choices=DEPTHS, default=list(DEPTHS), help="of the keys (default: all)")
    parser.add_argument("--cases", type=int, default=3, help="a cell, of the platform (default: %(default)s)")
    parser.add_argument("--batched", type=int, default=0, metavar="N", help="cases a cell side by side, no platform")
    parser.add_argument("--filler", choices=("paper", "shuffled", "book"), default="paper", help="of the test split")
    parser.add_argument(
        "--haystacks",
        type=int,
        default=1,
        help="texts that keys are hidden in, by turns (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.lengths = options.lengths or (["10k"] if options.quick else list(LENGTHS)[1:])
    return options


def ask_side_by_side(report: Report, options: argparse.Namespace, directory: Path) -> None:
    """All documents in one batch; before, a few of at most 32 KiB with each control."""
    model, segment_length = load(directory), load_stream_defaults(directory).segment_length
    short = [length for length in options.lengths if LENGTHS[length] <= LENGTHS["32k"]]
    controlled = list(documents_of(options, short, min(10, options.batched)))
    for use in (*CONTROLS, "all"):
        documents = controlled if use != "all" else list(documents_of(options, options.lengths, options.batched))
        sizes = Counter(document.cell for document in documents)
        said: dict[str, list[tuple[PasskeyCase, bytes]]] = {}
        for index, given in answered(model, [document.case for document in documents], segment_length, use):
            cell = documents[index].cell
            so_far = said.setdefault(cell, [])
            so_far.append((documents[index].case, given))
            if len(so_far) == sizes[cell]:
                add_cell(report, f"passkey_{cell}" + ("" if use == "all" else f"_{use}"), so_far)


def add_cell(report: Report, name: str, said: Sequence[tuple[PasskeyCase, bytes]]) -> None:
    """Shares of digits and of whole answers that are right, with intervals of 95%; digits come by answers."""
    (score,) = scores([case for case, _ in said], [given for _, given in said]).values()
    low, high = mean_interval(score.digit_shares)
    report.add(name, score.digit_accuracy, f"{low:.3f} to {high:.3f} of the digits of {len(said)} answers")
    low, high = share_interval(score.num_exact, len(said))
    report.add(f"{name}_exact", score.num_exact / len(said), f"{low:.3f} to {high:.3f} of the answers")


@dataclass(frozen=True, slots=True)
class Document:
    """A case that the platform is asked about.

    Attributes:
        text: The prompt without its question.
    """

    length: str
    depth: str
    case: PasskeyCase
    text: bytes

    @property
    def cell(self) -> str:
        """Its length and depth, as results are named."""
        return f"{self.length}_{self.depth}"


@dataclass(frozen=True, slots=True)
class Said:
    """An answer, and the stream that gave it, with its digest at that time."""

    answer: bytes
    name: str
    digest: str


@dataclass(slots=True)
class Reading:
    """Documents on their way into streams, two appends at a time.

    Attributes:
        said: What was answered to each document's question.
    """

    client: AsyncClient
    report: Report
    said: dict[Document, Said] = field(default_factory=dict)
    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))
    names: "itertools.count[int]" = field(default_factory=itertools.count)

    async def read(self, name: str, num_read: int, documents: Sequence[Document]) -> None:
        """Have a stream that holds the first `num_read` bytes of all these documents go on to their ends."""
        common = common_length([document.text for document in documents], num_read)
        async with self.turns:
            self.report.progress(f"{name}: bytes {num_read:,} to {common:,} of {len(documents)} documents")
            stream = await self.client.append(name, documents[0].text[num_read:common])
        longer: dict[int, list[Document]] = {}
        for document in documents:
            if len(document.text) == common:
                self.said[document] = Said(await answer(self.client, name), name, stream.state_digest)
            else:
                longer.setdefault(document.text[common], []).append(document)
        forks = [f"passkey-{next(self.names)}" for _ in range(len(longer) - 1)]
        for fork in forks:
            await self.client.fork_stream(name, fork)
        await asyncio.gather(
            *(self.read(each, common, rest) for each, rest in zip([name, *forks], longer.values(), strict=False))
        )


async def ask_platform(report: Report, options: argparse.Namespace, platform: Platform) -> None:
    """Every cell; then what is only measured once."""
    longest = max(options.lengths, key=LENGTHS.__getitem__)
    documents = list(documents_of(options, options.lengths, options.cases))
    async with AsyncClient(platform.address) as client:
        reading = Reading(client, report)
        await client.create_stream("passkey", settings=StreamSettings(retain_log=True))
        start = time.perf_counter()
        await reading.read("passkey", 0, documents)
        report.say(f"  {len(documents)} documents read and asked about in {time.perf_counter() - start:.0f} s")
        num_verified = 0
        for length, depth in itertools.product(options.lengths, options.depths):
            asked = [document for document in documents if (document.length, document.depth) == (length, depth)]
            said = [reading.said[document] for document in asked]
            cell = [(each.case, its.answer) for each, its in zip(asked, said, strict=True)]
            add_cell(report, f"passkey_{length}_{depth}", cell)
            report.say(f"    digests {', '.join(each.digest for each in said)}")
            if length == longest:
                # Nobody reads on after the longest: the stream is as it was when it was asked.
                assert (await client.get_stream(said[0].name)).state_digest == said[0].digest
                num_verified += (await client.verify_stream(said[0].name)).verdict == api.VERDICT_VERIFIED
        report.add("digests_verified", num_verified, f"of {len(options.depths)}, one stream a depth")
        await time_alone(report, client, platform, longest, options)
        await move(report, client, platform, longest, options)


def common_length(texts: Sequence[bytes], start: int) -> int:
    """How many bytes all texts begin with, if they are known to begin with the same `start` bytes."""
    arrays = [np.frombuffer(text, np.uint8) for text in texts]
    common = min(map(len, arrays))
    for array in arrays[1:]:
        differences = np.flatnonzero(array[start:common] != arrays[0][start:common])
        common = start + int(differences[0]) if len(differences) else common
    return common


def documents_of(options: argparse.Namespace, lengths: Sequence[str], num_cases: int) -> Iterator[Document]:
    """All documents, `num_cases` a cell; a case is the same whatever other cells are asked for."""
    for length, depth, index in itertools.product(lengths, options.depths, range(num_cases)):
        generator = np.random.default_rng((options.seed, list(DEPTHS).index(depth), index))
        haystack = options.seed + index % options.haystacks
        case = passkey_case(LENGTHS[length], DEPTHS[depth], generator, options.filler, filler_seed=haystack)
        yield Document(length, depth, case, case.prompt.removesuffix(question().encode()))


async def answer(client: AsyncClient, name: str) -> bytes:
    """What the model says to the question, greedily."""
    summary = await client.generate(name, question(), max_tokens=NUM_ANSWER_BYTES).finish()
    return summary.text.encode()


async def time_alone(
    report: Report, client: AsyncClient, platform: Platform, length: str, options: argparse.Namespace
) -> None:
    """How long one document takes that has the platform for itself, and the size of its checkpoint."""
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
    window = f"a window of {stream.settings.kv_budget_tokens} bytes, float32"
    report.add(f"state_bytes_{length}", await checkpoint_bytes(platform, stream.name), f"of the checkpoint: {window}")
    points = [(start, 0), *samples, (end, len(document))]
    first, last = seconds_between(points, 0.0, 0.1), seconds_between(points, 0.9, 1.0)
    report.add(f"flatness_{length}", first / last, "speed of the last tenth over that of the first")
    await client.create_stream("short")
    short = await client.append("short", document[: LENGTHS["10k"]])
    report.add("state_bytes_10k", await checkpoint_bytes(platform, short.name), f"after {LENGTHS['10k']:,} bytes")


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


async def checkpoint_bytes(platform: Platform, name: str) -> int:
    """What a stream's newest checkpoint takes in the state store."""
    return sum(chunk.length for chunk in (await stored(platform, name)).manifest.chunks)


async def stored(platform: Platform, name: str) -> pb.StreamRecord:
    """What the state store knows of a stream."""
    async with open_channel(platform.state_store_address) as channel:
        return (await StateStoreClient(channel).get_stream(pb.GetStreamRequest(name=name))).record


async def owner(platform: Platform, name: str) -> psutil.Process:
    """The process of the worker that holds a stream's lease."""
    record = await stored(platform, name)
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
