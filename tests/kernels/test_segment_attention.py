import math
import os
import subprocess
import sys

import pytest
import torch

from eunoe_kernels.segment_attention import (
    _segment_attention_triton,
    segment_attention,
    segment_attention_reference,
)

# KV heads, group size, tokens, past slots, head dim.
SHAPES = [(1, 1, 1, 0, 16), (3, 3, 37, 100, 64), (2, 1, 64, 1, 64), (1, 4, 5, 129, 80), (2, 3, 65, 0, 32)]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def an_input(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype = torch.float32, past_dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, ...]:
    """Query, key, value, and a past that is the live part of a slab with NaN behind it."""
    num_heads, group_size, num_tokens, num_slots, head_dim = shape
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator)

    past = []
    for _ in range(2):
        slab = torch.full((num_heads, num_slots + 7, head_dim), math.nan, dtype=past_dtype or dtype)
        slab[:, :num_slots] = random(num_heads, num_slots, head_dim)
        past.append(slab[:, :num_slots])
    return (
        random(num_heads, group_size, num_tokens, head_dim).to(dtype),
        random(num_heads, num_tokens, head_dim).to(dtype),
        random(num_heads, num_tokens, head_dim).to(dtype),
        *past,
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpu_path_equals_the_reference(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    given = an_input(shape, dtype)

    out = segment_attention(*given)

    assert out.is_contiguous()
    torch.testing.assert_close(out, segment_attention_reference(*given), atol=TOLERANCE[dtype], rtol=0)


def test_a_bfloat16_past_is_widened() -> None:
    given = an_input((3, 3, 37, 100, 64), torch.float32, torch.bfloat16)

    torch.testing.assert_close(segment_attention(*given), segment_attention_reference(*given), atol=2e-6, rtol=0)


def test_scores_of_any_size_do_not_overflow() -> None:
    query, *rest = an_input((1, 2, 8, 24, 16))

    out = segment_attention(query * 1e4, *rest)

    torch.testing.assert_close(out, segment_attention_reference(query * 1e4, *rest), atol=1e-4, rtol=0)


def test_keys_of_another_shape_are_refused() -> None:
    query, key, value, past_key, past_value = an_input((2, 2, 8, 4, 16))

    with pytest.raises(ValueError, match="must be"):
        segment_attention(query, key[:, :-1], value, past_key, past_value)
    with pytest.raises(ValueError, match="past"):
        segment_attention(query, key, value, past_key, past_value[:, 1:])


def test_segments_of_two_dtypes_are_refused() -> None:
    query, key, *rest = an_input((2, 2, 8, 4, 16))

    with pytest.raises(ValueError, match="dtypes"):
        segment_attention(query, key.bfloat16(), *rest)


# Triton's interpreter multiplies bfloat16 bits as integers: half precision stands in for it here.
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernel itself")
@pytest.mark.parametrize(
    ("dtype", "past_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 2e-6),
        (torch.float32, torch.bfloat16, 2e-6),
        (torch.float16, torch.float16, 3e-3),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_kernel_equals_the_reference(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, past_dtype: torch.dtype, tolerance: float
) -> None:
    given = an_input(shape, dtype, past_dtype)

    out = _segment_attention_triton(*given)

    torch.testing.assert_close(out, segment_attention_reference(*given), atol=tolerance, rtol=0)


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from eunoe_kernels.segment_attention import segment_attention_kernel as kernel

pointers = ("query_pointer", "key_pointer", "value_pointer", "past_key_pointer", "past_value_pointer", "out_pointer")
sizes = ("past_key_head_stride", "past_value_head_stride", "num_heads", "num_tokens", "num_slots")
constants = {"group_size": 3, "head_dim": 64, "padded_dim": 64, "block_rows": 64, "block_keys": 64}
signature = dict.fromkeys(pointers, "*bf16") | dict.fromkeys(sizes, "i32") | {"scale_log2": "fp32"}
signature |= dict.fromkeys(constants, "constexpr")
for capability in (80, 90, 100):
    source = ASTSource(kernel, signature, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
"""


@pytest.mark.timeout(240)
def test_triton_kernel_compiles_for_every_gpu_without_one() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)

    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gpu_equals_the_reference(dtype: torch.dtype) -> None:
    given = [tensor.cuda() for tensor in an_input((3, 3, 512, 1024, 64), dtype)]

    torch.testing.assert_close(
        segment_attention(*given), segment_attention_reference(*given), atol=TOLERANCE[dtype], rtol=0
    )
