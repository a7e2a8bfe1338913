"""How fast is a long text taken in? Prefill against `transformers`, against its own arithmetic, and by the platform.

The peer keeps its full cache, as it must; ours keeps 1,024 slots a head. The goals of the prefill rows are for
machines with AMX; elsewhere the same rows are printed with both sides in their faster dtype. `--long` streams the whole
book through the public API and watches that neither speed nor memory change.
"""

import itertools
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from _book import the_book
from _peer import Peer
from _report import Report, arguments, has_amx, interleaved, seconds
from _worker_process import worker_process

from eunoe.client import AppendProgress, Client
from eunoe.decoder.config import Dtypes
from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MemorySettings
from eunoe.decoder.tokenizer import Tokenizer, load_tokenizer
from eunoe.embedded.models import DEFAULT_MODEL, resolve_model
from eunoe.embedded.platform import Platform
from eunoe.eviction import DEFAULT_POLICY
from eunoe_kernels.segment_attention import segment_attention

SETTINGS = MemorySettings(kv_budget_tokens=1024, segment_length=512)
SAMPLE_SECONDS = 0.5


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--long", action="store_true", help="also stream the whole book through the public API")
    parser.add_argument("--platform-tokens", type=int, default=16_384, help="of the text that the platform takes in")
    options = parser.parse_args()
    # A benchmark that is told to end must still stop the platform that it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    torch.set_num_threads(options.threads)
    report = Report("ingest", as_json=options.json)
    if not has_amx():
        report.say("  no AMX here: the prefill goals do not apply, both dtypes are shown")
    _, directory = resolve_model(DEFAULT_MODEL, on_step=report.say)
    tokenizer = load_tokenizer(directory)
    book = the_book().encode()
    decoder = Decoder.load(directory, num_threads=options.threads)

    token_ids = tokenizer.encode(book[: 16_384 * 6].decode(errors="ignore"))
    compare_prefill(report, decoder, directory, token_ids, is_quick=options.quick)
    roofline(report, decoder, token_ids, num_repeats=3 if options.quick else 9)
    with tempfile.TemporaryDirectory(prefix="eunoe-bench-") as home:
        platform = Platform(home=Path(home), model=directory, threads=options.threads, on_step=report.progress)
        with platform, Client(platform.address) as client:
            text = _text_of(tokenizer, book, 4_096 if options.quick else options.platform_tokens)
            compare_platform(report, decoder, tokenizer, client, text)
            if options.long:
                whole_book(report, client, platform, book)
    report.finish()


def compare_prefill(report: Report, decoder: Decoder, directory: Path, token_ids: list[int], *, is_quick: bool) -> None:
    """prefill_ratio_*: the peer's time over ours, from an empty stream to the logits of the last token."""
    peers = {name: Peer(directory, getattr(torch, name)) for name in ("float32", "bfloat16")}
    ours = {"float32": Decoder.load(directory, Dtypes.float32()), "bfloat16": decoder}
    trial = torch.tensor(token_ids[:1024])
    times = interleaved(
        report,
        1,
        {f"transformers {name}": lambda peer=peer: peer.prefill(trial) for name, peer in peers.items()}
        | {f"eunoe {name}": lambda own=own: _prefill(own, token_ids[:1024]) for name, own in ours.items()},
    )
    for who, elapsed in times.items():
        report.say(f"  {who:24} {1024 / elapsed:8.0f} tokens/s over 1,024 tokens")
    peer = peers[min(peers, key=lambda name: times[f"transformers {name}"])]
    own = ours[min(ours, key=lambda name: times[f"eunoe {name}"])]
    peers.clear()
    ours.clear()

    chunk_tokens = None
    for label, length, num_repeats in (("2k", 2048, 5), ("8k", 8192, 3), ("16k", 16_384, 1)):
        ids = token_ids[:length]
        whole = torch.tensor(ids)
        runs = {
            "eunoe": lambda ids=ids: _prefill(own, ids),
            "peer": lambda whole=whole, chunk=chunk_tokens: peer.prefill(whole, chunk),
        }
        if label == "8k":
            runs["peer in chunks"] = lambda whole=whole: peer.prefill(whole, 2048)
        medians = interleaved(report, 1 if is_quick else num_repeats, runs, num_warmups=0)
        if label == "8k" and medians["peer in chunks"] < medians["peer"]:
            chunk_tokens, medians["peer"] = 2048, medians["peer in chunks"]
        how = "in chunks of 2,048" if chunk_tokens else "in one call"
        rates = f"{length / medians['eunoe']:.0f} against {length / medians['peer']:.0f} tokens/s ({peer.dtype}, {how})"
        report.add(f"prefill_ratio_{label}", medians["peer"] / medians["eunoe"], f"times transformers: {rates}")


def roofline(report: Report, decoder: Decoder, token_ids: list[int], *, num_repeats: int) -> None:
    """roofline_share: a full segment's matmuls and attention alone, over the engine's time for the segment."""
    state = decoder.new_state(SETTINGS)
    bound = Bound.of(decoder)
    segment = SETTINGS.segment_length
    decoder.prefill(state, token_ids[: 3 * segment], DEFAULT_POLICY)
    medians = interleaved(
        report,
        num_repeats,
        {"engine": lambda: decoder.prefill(state, token_ids[:segment], DEFAULT_POLICY), "bound": bound.run},
    )
    rate = f"{segment / medians['engine']:.0f} of at most {segment / medians['bound']:.0f} tokens/s"
    report.add("roofline_share", medians["bound"] / medians["engine"], rate)


@dataclass(slots=True)
class Bound:
    """The matmuls and the attention of one segment over a full budget, and nothing else."""

    layers: list[list[tuple[torch.Tensor, torch.Tensor]]]
    attention: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, decoder: Decoder) -> "Bound":
        """Random tensors of the decoder's shapes; each layer has weights of its own, as cold in the caches as real."""
        config, dtype, num_rows = decoder.config, decoder.dtypes.compute, SETTINGS.segment_length
        query_dim = config.num_query_heads * config.head_dim
        qkv_dim = query_dim + 2 * config.num_kv_heads * config.head_dim
        shapes = [(qkv_dim, config.dim), (config.dim, query_dim), (2 * config.ffn_dim, config.dim)]
        shapes.append((config.dim, config.ffn_dim))
        inputs = [torch.randn(num_rows, num_in).to(dtype) for _, num_in in shapes]
        # Nobody reads what the last layer computes beyond its keys and values.
        num_matmuls = [len(shapes)] * (config.num_layers - 1) + [1]
        layers = [
            [(x, torch.randn(shape).to(dtype)) for x, shape in zip(inputs[:count], shapes[:count], strict=True)]
            for count in num_matmuls
        ]
        heads, slots = (config.num_kv_heads, config.head_dim), SETTINGS.kv_budget_tokens
        query = torch.randn(heads[0], config.group_size, num_rows, heads[1])
        rest = [torch.randn(heads[0], count, heads[1]) for count in (num_rows, num_rows, slots, slots)]
        return cls(layers, tuple(tensor.to(dtype) for tensor in (query, *rest)))

    def run(self) -> None:
        """One segment."""
        for matmuls in self.layers:
            for x, weight in matmuls:
                x @ weight.T
            if len(matmuls) > 1:
                segment_attention(*self.attention)


def compare_platform(report: Report, decoder: Decoder, tokenizer: Tokenizer, client: Client, text: str) -> None:
    """platform_ratio: tokens/s through the public client over those of the bare engine on the same text."""
    token_ids = tokenizer.encode(text)
    num_tokens = len(token_ids) // SETTINGS.segment_length * SETTINGS.segment_length
    own = decoder.new_state(SETTINGS)
    _stream_in(client, "warm-up", text[: len(text) // 8])

    def bare() -> None:
        decoder.prefill(own, token_ids[:num_tokens], DEFAULT_POLICY)

    bare_seconds = seconds(bare)
    report.progress("the platform takes the same text in")
    num_applied, platform_seconds = _stream_in(client, "book", text)
    bare_seconds = (bare_seconds + seconds(bare)) / 2
    bare_rate, platform_rate = num_tokens / bare_seconds, num_applied / platform_seconds
    rates = f"{platform_rate:.0f} of {bare_rate:.0f} tokens/s, {num_applied} tokens"
    report.add("platform_ratio", platform_rate / bare_rate, rates)


def whole_book(report: Report, client: Client, platform: Platform, book: bytes) -> None:
    """flatness_1m, rss_growth_1m, checkpoint_growth_1m: the first tenth of the book, the last, and what lies between.

    Retained checkpoints are what a stream takes in the state store: three of equal size once the budget is full.
    """
    worker = worker_process(platform)
    samples: list[tuple[float, float, int]] = []
    checkpoint_bytes: list[int] = []

    def on_progress(progress: AppendProgress) -> None:
        now = time.perf_counter()
        if samples and now - samples[-1][0] < SAMPLE_SECONDS:
            return
        share = progress.folded_offset / len(book)
        samples.append((now, share, worker.memory_info().rss))
        report.progress(f"the whole book: {share:.1%}, {(now - start) / 60:.1f} minutes")
        if share >= 0.1 and not checkpoint_bytes:
            checkpoint_bytes.append(observer.get_usage().checkpoint_bytes)

    client.create_stream("whole-book")
    others = client.get_usage().checkpoint_bytes
    start = time.perf_counter()
    # A client of its own: progress is reported on the first one's event loop.
    with Client(platform.address) as observer:
        stream = client.append("whole-book", book, on_progress=on_progress)
    elapsed = time.perf_counter() - start
    samples.append((start + elapsed, 1.0, worker.memory_info().rss))
    samples.insert(0, (start, 0.0, samples[0][2]))
    checkpoint_bytes.append(client.get_usage().checkpoint_bytes)
    first, last = _seconds_between(samples, 0.0, 0.1), _seconds_between(samples, 0.9, 1.0)
    rss_at_tenth = next(rss for _, share, rss in samples if share >= 0.1)
    at_tenth, at_end = (count - others for count in checkpoint_bytes)
    report.add("flatness_1m", first / last, "speed of the last tenth over that of the first")
    report.add("rss_growth_1m", samples[-1][2] / rss_at_tenth - 1, "growth of the worker from 10% to 100%")
    report.add("checkpoint_growth_1m", at_end / at_tenth - 1, f"from 10% to 100%; {at_end} bytes retained")
    report.add("tokens_per_second_1m", stream.tokens / elapsed, f"{stream.tokens} tokens in {elapsed / 60:.1f} minutes")
    report.add("state_bytes_1m", stream.state_bytes, "of the committed memory state")


def _prefill(decoder: Decoder, token_ids: list[int]) -> None:
    decoder.prefill(decoder.new_state(SETTINGS), token_ids, DEFAULT_POLICY, logits="last")


def _stream_in(client: Client, stream_id: str, text: str) -> tuple[int, float]:
    """Tokens that the stream's memory took in, and the seconds until it had."""
    client.create_stream(stream_id)
    start = time.perf_counter()
    stream = client.append(stream_id, text)
    return stream.tokens, time.perf_counter() - start


def _text_of(tokenizer: Tokenizer, book: bytes, num_tokens: int) -> str:
    """The start of the book, of about that many tokens."""
    return tokenizer.decode(tokenizer.encode(book[: 6 * num_tokens].decode(errors="ignore"))[:num_tokens])


def _seconds_between(samples: list[tuple[float, float, int]], low: float, high: float) -> float:
    """Time from one share of the book to another, interpolated between samples."""

    def when(share: float) -> float:
        for (t0, s0, _), (t1, s1, _) in itertools.pairwise(samples):
            if s1 >= share > s0 or s0 == share:
                return t0 + (t1 - t0) * (share - s0) / (s1 - s0) if s1 > s0 else t0
        return samples[-1][0]

    return when(high) - when(low)


if __name__ == "__main__":
    main()
