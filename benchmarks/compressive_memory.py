"""What is left of float32 after a million tokens? Digits of each update rule's M, z and retrievals, and times.

A stream's batches are written by the kernels and by the same rules in float64. Keys are repeated text's: variations of
64 keys a head, mean sigma(key) 1.35. `digits_*` is -log10 of the relative error in the Frobenius norm, the worst of
ten moments of the stream. Times are of one layer's segment, against the references.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _report import Report, arguments, interleaved

from eunoe_kernels.compressive_memory import (
    empty_memory,
    features_reference,
    retrieve,
    retrieve_reference,
    update,
    update_reference,
)
from eunoe_kernels.gated_delta import (
    gated_delta_retrieve,
    gated_delta_retrieve_reference,
    gated_delta_update,
    gated_delta_update_reference,
)

# Name: arguments of `update`, and whether tokens have write weights.
RULES: dict[str, tuple[dict[str, Any], bool]] = {
    "linear": ({"rule": "linear"}, False),
    "delta": ({"rule": "delta"}, False),
    "delta_weights": ({"rule": "delta"}, True),
    "delta_weights_gamma": ({"rule": "delta", "uses_gamma": True}, True),
}
# Layers, KV heads, query heads of each, head dim, tokens of a batch.
SHAPES = {"nano": (8, 2, 2, 32, 128), "smollm2": (30, 3, 3, 64, 512), "llama3_8b": (32, 8, 4, 128, 512)}
NUM_HEADS = 2
NUM_KEYS = 64
BATCH_TOKENS = 512
GOAL_DIGITS = 4
NUM_MOMENTS = 10


def main() -> None:
    """Print digits and times."""
    parser = arguments(__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tokens", type=int, help="of the stream (default: 1,000,000; with --quick 50,000)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = Report("compressive_memory", as_json=options.json)
    num_tokens = options.tokens or (50_000 if options.quick else 1_000_000)
    for head_dim in (32, 64):
        digits(report, head_dim, num_tokens)
    for name, shape in SHAPES.items():
        times(report, name, shape, 5 if options.quick else 20)
    report.finish()


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens that leave the window together; `decay` and `strength` are the gated delta rule's."""

    key: torch.Tensor
    value: torch.Tensor
    weight: torch.Tensor
    decay: torch.Tensor
    strength: torch.Tensor


def a_stream(head_dim: int, num_tokens: int) -> Iterator[Batch]:
    """Batches of variations of 64 keys a head with a value each; which keys come drifts through the stream."""
    generator = torch.Generator().manual_seed(head_dim)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator)

    keys, values = 1.6 * random(NUM_HEADS, NUM_KEYS, head_dim), random(NUM_HEADS, NUM_KEYS, head_dim)
    gate = random(NUM_HEADS, head_dim, 1) / math.sqrt(head_dim)
    head = torch.arange(NUM_HEADS)[:, None]
    for first in range(0, num_tokens, BATCH_TOKENS):
        size = min(BATCH_TOKENS, num_tokens - first)
        # Keys of the middle of the stream come more often there.
        likely = torch.exp(-torch.linspace(-1, 1, NUM_KEYS).sub(2 * first / num_tokens - 1).abs())
        chosen = torch.multinomial(likely, NUM_HEADS * size, replacement=True, generator=generator)
        chosen = chosen.view(NUM_HEADS, size)
        key = keys[head, chosen] + 0.4 * random(NUM_HEADS, size, head_dim)
        value = values[head, chosen] + 0.4 * random(NUM_HEADS, size, head_dim)
        weight = torch.sigmoid(2 * key @ gate)[..., 0]
        decay = torch.exp(-0.01 * torch.rand(NUM_HEADS, size, generator=generator))
        yield Batch(key, value, weight, decay, weight)


def digits(report: Report, head_dim: int, num_tokens: int) -> None:
    """Write one stream by all rules, in float32 and float64.

    Raises:
        ValueError: If a rule has fewer digits than promised, or is infinite or NaN.
    """
    single = {rule: empty_memory(NUM_HEADS, head_dim, head_dim) for rule in RULES}
    double = {rule: tuple(state.double() for state in states) for rule, states in single.items()}
    gated_single, _ = empty_memory(NUM_HEADS, head_dim, head_dim)
    gated_double = gated_single.double()
    worst: dict[str, float] = {}
    total_feature, num_batches = 0.0, math.ceil(num_tokens / BATCH_TOKENS)
    for index, batch in enumerate(a_stream(head_dim, num_tokens)):
        total_feature += features_reference(batch.key).sum().item()
        for rule, (settings, has_weights) in RULES.items():
            weight = batch.weight if has_weights else None
            update(*single[rule], batch.key, batch.value, weight, **settings)
            update_reference(*double[rule], batch.key, batch.value, weight, **settings)
        gated_delta_update(gated_single, batch.key, batch.value, batch.decay, batch.strength)
        write_chunks(gated_double, batch)
        if not index:
            check_chunks(head_dim, batch)
        if (index + 1) % max(1, num_batches // NUM_MOMENTS) and index + 1 < num_batches:
            continue
        report.progress(f"head dim {head_dim}: batch {index + 1} of {num_batches}")
        query = batch.key[:, None]
        for rule in RULES:
            (memory, normalizer), (memory_64, normalizer_64) = single[rule], double[rule]
            found = {"M": (memory, memory_64), "z": (normalizer, normalizer_64)}
            found["A"] = (retrieve(query, *single[rule]), retrieve_reference(query, *double[rule]))
            note_errors(worst, rule, found)
        retrieved = gated_delta_retrieve(query, gated_single), gated_delta_retrieve_reference(query, gated_double)
        note_errors(worst, "gated_delta", {"M": (gated_single, gated_double), "A": retrieved})
    mean_feature = total_feature / (num_tokens * NUM_HEADS * head_dim)
    greatest = max(normalizer.max().item() for _, normalizer in single.values())
    report.say(
        f"  head dim {head_dim}, {num_tokens:,} tokens: mean sigma(key) {mean_feature:.3f}, max z {greatest:.3g}"
    )
    for name, error in worst.items():
        report.add(f"digits_{head_dim}_{name}", -math.log10(error), f"at least {GOAL_DIGITS}; error {error:.1e}")
        if not error < 10**-GOAL_DIGITS:
            raise ValueError(f"{name} has a relative error of {error}")


def note_errors(worst: dict[str, float], rule: str, found: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Keep the greatest relative error in the Frobenius norm of each; not finite is infinite."""
    for name, (got, expected) in found.items():
        error = ((got.double() - expected).norm() / expected.norm()).item()
        label = f"{rule}_{name}"
        worst[label] = max(worst.get(label, 0.0), error if math.isfinite(error) else math.inf)


def write_chunks(memory: torch.Tensor, batch: Batch, *, chunk_tokens: int = 64) -> None:
    """The gated delta rule in float64, another way: 64 tokens at a time, by one triangular system.

    With g_t the product of decays up to t, M_t = g_t M_0 + sum over s up to t of (g_t / g_s) k_s^T u_s, where
    u_t = b_t (v_t - g_t k_t M_0 - sum over s before t of (g_t / g_s) (k_t k_s) u_s).
    """
    key = torch.nn.functional.normalize(batch.key.double(), dim=-1)
    for first in range(0, key.shape[1], chunk_tokens):
        chunk = slice(first, first + chunk_tokens)
        k, v, b = key[:, chunk], batch.value[:, chunk].double(), batch.strength[:, chunk, None].double()
        log_g = batch.decay[:, chunk].double().log().cumsum(dim=1)
        fading = (log_g[:, :, None] - log_g[:, None]).tril(-1).exp()
        system = (b * fading * (k @ k.transpose(1, 2))).tril(-1)
        given = b * (v - log_g.exp()[..., None] * (k @ memory))
        u = torch.linalg.solve_triangular(system, given, upper=False, unitriangular=True)
        remaining = (log_g[:, -1:] - log_g).exp()[..., None]
        memory.mul_(log_g[:, -1].exp()[:, None, None]).add_((remaining * k).transpose(1, 2) @ u)


def check_chunks(head_dim: int, batch: Batch) -> None:
    """What the gated delta rule is measured against is itself equal to its reference."""
    by_chunks = torch.zeros(NUM_HEADS, head_dim, head_dim, dtype=torch.float64)
    expected = by_chunks.clone()
    write_chunks(by_chunks, batch)
    gated_delta_update_reference(expected, batch.key, batch.value, batch.decay, batch.strength)
    torch.testing.assert_close(by_chunks, expected, atol=1e-9, rtol=1e-9)


def times(report: Report, name: str, shape: tuple[int, int, int, int, int], num_repeats: int) -> None:
    """Microseconds of one layer's segment, and how many times as fast as the reference that is."""
    num_layers, num_heads, group_size, head_dim, num_tokens = shape
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(num_heads, group_size, num_tokens, head_dim, generator=generator)
    key, value = (torch.randn(num_heads, num_tokens, head_dim, generator=generator) for _ in range(2))
    weight = torch.rand(num_heads, num_tokens, generator=generator)
    state = empty_memory(num_heads, head_dim, head_dim)
    gated, _ = empty_memory(num_heads, head_dim, head_dim)
    update(*state, key, value, weight, rule="linear")
    settings = {"rule": "delta", "uses_gamma": True}
    runs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "retrieve": (partial(retrieve, query, *state), partial(retrieve_reference, query, *state)),
        "linear": (
            partial(update, *state, key, value, weight, rule="linear"),
            partial(update_reference, *state, key, value, weight, rule="linear"),
        ),
        "delta_gamma": (
            partial(update, *state, key, value, weight, **settings),
            partial(update_reference, *state, key, value, weight, **settings),
        ),
        "gated_delta": (
            partial(gated_delta_update, gated, key, value, 0 * weight + 1, weight),
            partial(gated_delta_update_reference, gated, key, value, 0 * weight + 1, weight),
        ),
    }
    for operation, (ours, reference) in runs.items():
        repeats = max(2, num_repeats // 10) if operation == "gated_delta" else num_repeats
        took = interleaved(report, repeats, {"ours": ours, "reference": reference})
        report.add(f"us_{operation}_{name}", 1e6 * took["ours"])
        report.add(f"ratio_{operation}_{name}", took["reference"] / took["ours"], "times the reference's speed")
    kib = num_layers * sum(tensor.nbytes for tensor in state) / 1024
    report.add(f"state_kib_{name}", kib, f"M and z of {num_layers} layers, however long the stream")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
