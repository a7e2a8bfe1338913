"""How fast is a segment's attention? On the CUDA device if there is one, else on the CPU, against PyTorch's own.

The peer is `scaled_dot_product_attention` over past and segment in one tensor with a boolean mask, which is what
one would write without the kernel. A kernel that differs from its reference is not timed.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from _report import Report, arguments, interleaved

from eunoe_kernels.segment_attention import segment_attention, segment_attention_reference

# KV heads, query heads of each, head dim: SmolLM2-135M and Llama-3-8B.
SHAPES = {"smollm2": (3, 3, 64), "llama3_8b": (8, 4, 128)}
SEGMENT_LENGTH = 512
NUM_PAST_SLOTS = (1024, 8192)
TOLERANCE = 2e-2


def main() -> None:
    """Print TFLOP/s and the ratio to the peer for each shape."""
    options = arguments(__doc__ or "").parse_args()
    torch.set_num_threads(options.threads)
    report = Report("segment_attention", as_json=options.json)
    has_cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if has_cuda else ("cpu", torch.float32)
    report.say(f"  on {torch.cuda.get_device_name() if has_cuda else 'the CPU'}, {dtype}")
    for name, (num_heads, group_size, head_dim) in SHAPES.items():
        for num_slots in NUM_PAST_SLOTS[: 1 if options.quick else None]:
            given = _inputs(num_heads, group_size, head_dim, num_slots, device, dtype)
            expected = segment_attention_reference(*given)
            torch.testing.assert_close(segment_attention(*given), expected, atol=TOLERANCE, rtol=0)
            runs = {"ours": partial(segment_attention, *given), "peer": _peer(*given)}
            times = interleaved(report, 5 if options.quick else 20, {k: _timed(run) for k, run in runs.items()})
            num_pairs = SEGMENT_LENGTH * (num_slots + (SEGMENT_LENGTH + 1) / 2)
            num_flops = 4 * num_heads * group_size * head_dim * num_pairs
            report.add(f"tflops_{name}_{num_slots}", num_flops / times["ours"] / 1e12)
            report.add(f"ratio_{name}_{num_slots}", times["peer"] / times["ours"], "times the peer's speed")
    report.finish()


def _inputs(
    num_heads: int, group_size: int, head_dim: int, num_slots: int, device: str, dtype: torch.dtype
) -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    segment, past = (num_heads, SEGMENT_LENGTH, head_dim), (num_heads, num_slots, head_dim)
    shapes = ((num_heads, group_size, SEGMENT_LENGTH, head_dim), segment, segment, past, past)
    return [torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes]


def _peer(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, past_key: torch.Tensor, past_value: torch.Tensor
) -> Callable[[], torch.Tensor]:
    num_tokens, num_slots = key.shape[1], past_key.shape[1]
    is_visible = torch.ones(num_tokens, num_slots + num_tokens, dtype=torch.bool, device=key.device).tril(num_slots)
    keys, values = torch.cat([past_key, key], dim=1)[None], torch.cat([past_value, value], dim=1)[None]
    queries = query.flatten(0, 1)[None]
    return partial(F.scaled_dot_product_attention, queries, keys, values, attn_mask=is_visible, enable_gqa=True)


def _timed(run: Callable[[], torch.Tensor]) -> Callable[[], None]:
    def call() -> None:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return call


if __name__ == "__main__":
    with torch.inference_mode():
        main()
