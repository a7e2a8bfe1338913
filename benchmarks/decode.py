"""How fast is one token? Decoding at 1,024 slots a head against `transformers`, and against the memory's bandwidth.

A decode step must read every weight once and every live key and value of each stream: those bytes over the read
bandwidth, measured in the same run with the same threads, are the least time it can take.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from _book import the_book
from _peer import Peer
from _report import Report, arguments, interleaved

from eunoe.decoder.config import Dtypes
from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MemorySettings, MemoryState
from eunoe.decoder.tokenizer import load_tokenizer
from eunoe.embedded.models import DEFAULT_MODEL, resolve_model
from eunoe.eviction import DEFAULT_POLICY

NUM_SLOTS = 1024
BANDWIDTH_BYTES = 512 << 20


@dataclass(slots=True)
class Ours:
    """A decoder with streams of NUM_SLOTS slots."""

    decoder: Decoder
    states: list[MemoryState]

    @classmethod
    def prepared(cls, directory: Path, dtypes: Dtypes, token_ids: list[int], num_streams: int) -> "Ours":
        """Streams that all hold the same prompt, each in slabs of its own."""
        decoder = Decoder.load(directory, dtypes, torch.get_num_threads())
        state = decoder.new_state(MemorySettings(kv_budget_tokens=NUM_SLOTS))
        decoder.prefill(state, token_ids[:NUM_SLOTS], DEFAULT_POLICY)
        return cls(decoder, [state.copy() for _ in range(num_streams)])

    def decode(self, num_streams: int, num_steps: int) -> None:
        """Decode greedily; the streams are cut back after."""
        states, token_ids = self.states[:num_streams], [1] * num_streams
        for _ in range(num_steps):
            logits = self.decoder.decode(states, token_ids, DEFAULT_POLICY)
            token_ids = logits.argmax(dim=-1).tolist()
        for state in states:
            state.num_slots = state.num_rotated = state.num_tokens = NUM_SLOTS

    def step_bytes(self, num_streams: int) -> int:
        """What a step must read: weights, and live keys and values."""
        config, dtypes = self.decoder.config, self.decoder.dtypes
        qkv_dim = (config.num_query_heads + 2 * config.num_kv_heads) * config.head_dim
        attention = config.dim * (qkv_dim + config.num_query_heads * config.head_dim)
        layer = attention + 3 * config.dim * config.ffn_dim + 2 * config.dim
        num_weights = config.num_layers * layer + config.vocab_size * config.dim + config.dim
        slots = 2 * config.num_kv_layers * config.num_kv_heads * NUM_SLOTS * config.head_dim
        return num_weights * dtypes.weights.itemsize + num_streams * slots * dtypes.kv.itemsize


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__.splitlines()[0] if __doc__ else "").parse_args()
    torch.set_num_threads(options.threads)
    report = Report("decode", as_json=options.json)
    _, directory = resolve_model(DEFAULT_MODEL, on_step=report.say)
    num_repeats, num_steps = (3, 8) if options.quick else (9, 16)

    text = the_book()[: 8 * NUM_SLOTS]
    token_ids = load_tokenizer(directory).encode(text)
    bindings = {"bfloat16": Dtypes.for_this_machine(), "float32": Dtypes.float32()}
    ours = {
        name: Ours.prepared(directory, dtypes, token_ids, 16 if name == "bfloat16" else 1)
        for name, dtypes in bindings.items()
    }
    peers = {name: Peer(directory, getattr(torch, name)) for name in bindings}
    for peer in peers.values():
        peer.prefill(torch.tensor(token_ids[:NUM_SLOTS]))
    buffer = torch.ones(BANDWIDTH_BYTES // 4)

    main_binding = ours["bfloat16"]
    runs = {f"eunoe {name} batch 1": lambda run=run: run.decode(1, num_steps) for name, run in ours.items()}
    runs |= {f"transformers {name}": lambda peer=peer: peer.decode(num_steps) for name, peer in peers.items()}
    runs |= {f"eunoe bfloat16 batch {n}": lambda n=n: main_binding.decode(n, num_steps) for n in (4, 16)}
    runs["bandwidth"] = buffer.sum
    medians = interleaved(report, num_repeats, runs)

    bandwidth = BANDWIDTH_BYTES / medians.pop("bandwidth")
    steps = {name: median / num_steps for name, median in medians.items()}
    report.say(f"  read bandwidth {bandwidth / 1e9:.1f} GB/s with {options.threads} threads")
    for name, step in steps.items():
        report.say(f"  {name:32} {step * 1e3:8.2f} ms a step")
    best_of_ours = min(steps[f"eunoe {name} batch 1"] for name in bindings)
    best_of_peer = min(steps[f"transformers {name}"] for name in bindings)
    report.add("decode_ratio_b1", best_of_peer / best_of_ours, "times transformers, both in their faster dtype")
    for n in (1, 16):
        limit = main_binding.step_bytes(n) / bandwidth
        share = limit / steps[f"eunoe bfloat16 batch {n}"]
        report.add(f"decode_limit_share_b{n}", share, f"of the limit, {limit * 1e3:.2f} ms a step")
    report.finish()


if __name__ == "__main__":
    main()
