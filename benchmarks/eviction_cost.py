"""What does an eviction policy cost a segment? A random model of SmolLM2-135M's shape, its window full.

A pass over 512 tokens ends in an eviction from 1,536 slots to 1,024. Policies take turns; `sinks_recent` only moves
slots, so what another takes longer is the price of its choice: watching attention in every layer, and one scoring.
`throughput_cost` is what the shipped policy adds, in process. `--platform` also appends the book's beginning to streams
of SmolLM2 on platforms with each, sidecar included: `throughput_cost_platform`.

spectrogram_memory_ratio: bytes of the pass's attention, of all layers and query heads in float32, over the most memory
that watching it takes: the peak of what is allocated, layer by layer, and the statistics that it leaves of each slot.
"""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _book import its_beginning
from _peak_memory import peak_allocated_bytes
from _report import Report, arguments, interleaved

from eunoe.client import Client
from eunoe.decoder.config import DecoderConfig
from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MemorySettings, MemoryState
from eunoe.decoder.tokenizer import load_tokenizer
from eunoe.embedded.models import DEFAULT_MODEL, resolve_model
from eunoe.embedded.platform import Platform
from eunoe.eviction import EvictionPolicy, HeavyHitter, KeyNorm, Namm, SinksRecent, SnapKV
from eunoe.eviction.backward_attention import NUM_PARAMETERS, Attention, BackwardAttention
from eunoe.eviction.namm import Normalization
from eunoe.eviction.policy import score
from eunoe.eviction.policy_files import SHIPPED
from eunoe.eviction.spectrogram import AttentionSpectrogram

# Of two segments, about.
_WARM_UP_CHARACTERS = 4096
SETTINGS = MemorySettings(kv_budget_tokens=1024, segment_length=512)


def main() -> None:
    """Print seconds a segment, and of the scoring alone, for each policy."""
    parser = arguments(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--platform", type=int, metavar="TOKENS", default=0, help="also through a platform")
    options = parser.parse_args()
    # A benchmark that is told to end must still stop the platform that it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    report = Report("eviction_cost", as_json=options.json)
    torch.set_num_threads(options.threads)
    # The vocabulary is small because no logits are computed.
    config = DecoderConfig(
        name="smollm2-135m's shape", vocab_size=512, dim=576, num_layers=30, num_query_heads=9, num_kv_heads=3,
        head_dim=64, ffn_dim=1536, ties_embeddings=True,
    )  # fmt: skip
    decoder = Decoder.random(config, seed=0)
    policies: dict[str, EvictionPolicy] = {
        "sinks_recent": SinksRecent(),
        "key_norm": KeyNorm(),
        "snapkv": SnapKV(),
        "heavy_hitter": HeavyHitter(),
        "namm": a_namm(),
        "namm_128_queries": a_namm(128),
        "namm_64_queries": a_namm(64),
        "namm_64_queries_blocks": a_namm(64, "blocks"),
        "smollm2_namm": Namm.load(SHIPPED / "smollm2-namm.safetensors"),
    }
    num_repeats = 3 if options.quick else 10
    if options.quick:
        policies = {name: policies[name] for name in ("sinks_recent", "namm", "smollm2_namm")}
    segments: dict[str, Callable[[], object]] = {}
    scorings: dict[str, Callable[[], object]] = {}
    for name, policy in policies.items():
        state = a_full_state(decoder, policy)
        segments[name] = partial(decoder.prefill, state, some_tokens(), policy)
        if isinstance(policy, Namm):
            scorings[name] = partial(scored, policy, a_window_before_eviction(decoder, policy))
    seconds = interleaved(report, num_repeats, segments)
    for name, value in seconds.items():
        ratio = value / seconds["sinks_recent"]
        report.add(f"segment_seconds_{name}", value, f"{ratio:.2f} times sinks_recent's")
    report.add("throughput_cost", seconds["smollm2_namm"] / seconds["sinks_recent"] - 1, "of the shipped policy")
    for name, value in interleaved(report, num_repeats, scorings).items():
        report.add(f"scoring_seconds_{name}", value, "one call for all layers and heads")
    for name, policy in policies.items():
        num_bytes = policy.statistics.num_bytes if policy.statistics is not None else 0
        report.add(f"statistics_bytes_{name}", num_bytes, "a slot")
    report_spectrogram_memory(report, decoder, policies["namm"])
    if options.platform:
        report_platform_cost(report, options.platform, options.threads)
    report.finish()


def report_spectrogram_memory(report: Report, decoder: Decoder, policy: EvictionPolicy) -> None:
    """spectrogram_memory_ratio*, of a policy that watches every query: of all layers, and if there were but one."""
    config, length = decoder.config, SETTINGS.segment_length
    attention_bytes = config.num_query_heads * length * SETTINGS.capacity * 4
    state = decoder.new_state(SETTINGS, policy)
    state.append(torch.zeros(SETTINGS.kv_budget_tokens, dtype=torch.int32))
    group_size = config.num_query_heads // config.num_kv_heads
    query_HGTD = torch.randn(config.num_kv_heads, group_size, length, config.head_dim).to(decoder.dtypes.compute)
    statistics = policy.statistics
    assert statistics is not None
    assert state.statistics is not None

    def observe(num_layers: int) -> None:
        for layer in range(num_layers):
            state.observe(statistics, layer, query_HGTD, query_HGTD[:, 0])

    for suffix, num_layers in (("", config.num_layers), ("_one_layer", 1)):
        peak = peak_allocated_bytes(partial(observe, num_layers))
        left = state.statistics[:num_layers].nbytes
        stored = num_layers * attention_bytes
        text = f"{stored / 1e6:.1f} MB are {peak / 1e6:.1f} MB at the peak and {left / 1e6:.1f} MB of statistics"
        report.add(f"spectrogram_memory_ratio{suffix}", stored / (peak + left), text)


def report_platform_cost(report: Report, num_tokens: int, num_threads: int) -> None:
    """throughput_cost_platform, of the best of two runs each: the same text under either policy, in turns."""
    _, directory = resolve_model(DEFAULT_MODEL, on_step=report.say)
    text = its_beginning(load_tokenizer(directory), num_tokens)
    seconds: dict[str, list[float]] = {"sinks-recent/1": [], "smollm2-namm": []}
    for _ in range(2):
        for policy, found in seconds.items():
            with (
                tempfile.TemporaryDirectory(prefix="eunoe-bench-") as home,
                Platform(
                    home=Path(home), model=directory, threads=num_threads, policy=policy, on_step=report.progress
                ) as platform,
                Client(platform.address) as client,
            ):
                # The first segments of a worker wait for what it makes once.
                client.create_stream("warm-up")
                client.append("warm-up", text[:_WARM_UP_CHARACTERS])
                client.create_stream("book")
                start = time.perf_counter()
                client.append("book", text)
                found.append(time.perf_counter() - start)
    shown = ", ".join(
        f"{policy} {' and '.join(f'{each:.0f}' for each in found)} s" for policy, found in seconds.items()
    )
    cost = min(seconds["smollm2-namm"]) / min(seconds["sinks-recent/1"]) - 1
    report.add("throughput_cost_platform", cost, f"{num_tokens:,} tokens: {shown}")


def a_namm(num_observed_queries: int | None = None, attention: Attention = "dense") -> Namm:
    """Random parameters: they change what is kept, not what it costs."""
    parameters = 0.3 * torch.randn(NUM_PARAMETERS, generator=torch.Generator().manual_seed(0))
    normalization = Normalization(torch.full((17,), 0.01), torch.full((17,), 0.02))
    return Namm(BackwardAttention(parameters, attention), normalization, AttentionSpectrogram(num_observed_queries))


def some_tokens() -> np.ndarray:
    """A segment of them."""
    return np.random.default_rng(0).integers(0, 512, SETTINGS.segment_length)


def a_full_state(decoder: Decoder, policy: EvictionPolicy) -> MemoryState:
    """A state of as many slots as the budget has, at a segment boundary."""
    state = decoder.new_state(SETTINGS, policy)
    while state.num_slots < SETTINGS.kv_budget_tokens:
        decoder.prefill(state, some_tokens(), policy)
    return state


def scored(policy: Namm, window: MemoryState) -> torch.Tensor:
    """Features and scores, as for an eviction."""
    return score(policy, policy.features(window))


def a_window_before_eviction(decoder: Decoder, policy: EvictionPolicy) -> MemoryState:
    """A state with a segment more than the budget, as a policy sees it. What its statistics are costs nothing."""
    state = decoder.new_state(SETTINGS, policy)
    state.clear_statistics(SETTINGS.capacity)
    state.append(torch.zeros(SETTINGS.capacity, dtype=torch.int32))
    return state


if __name__ == "__main__":
    with torch.inference_mode():
        main()
