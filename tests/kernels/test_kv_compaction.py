import pytest
import torch

from eunoe_kernels.kv_compaction import _compact_triton, compact, compact_reference

# Layers, heads, slots, kept at most.
SHAPES = [(1, 1, 1, 1), (2, 3, 200, 64), (1, 2, 63, 63), (3, 1, 100, 1), (2, 2, 150, 149)]
# What a slot holds, by dtype: keys, statistics of odd sizes, positions.
CONTENTS = [
    ((64,), torch.bfloat16),
    ((7,), torch.float32),
    ((52,), torch.uint8),
    ((3,), torch.uint8),
    ((), torch.int32),
]


def a_slab(shape: tuple[int, ...], content: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 120, (*shape[:3], *content), generator=generator).to(dtype)


def a_choice(shape: tuple[int, int, int, int], *, is_ragged: bool) -> tuple[torch.Tensor, torch.Tensor]:
    num_layers, num_heads, num_slots, num_kept = shape
    generator = torch.Generator().manual_seed(1)
    order = torch.rand(num_layers, num_heads, num_slots, generator=generator).argsort(dim=-1)
    kept = order[..., :num_kept].sort(dim=-1).values
    counts = torch.full((num_layers, num_heads), num_kept)
    if is_ragged:
        counts = torch.randint(0, num_kept + 1, (num_layers, num_heads), generator=generator)
    return kept, counts


@pytest.mark.parametrize("is_ragged", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize(("content", "dtype"), CONTENTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kept_slots_move_to_the_front(
    shape: tuple[int, int, int, int], content: tuple[int, ...], dtype: torch.dtype, is_ragged: bool
) -> None:
    kept, counts = a_choice(shape, is_ragged=is_ragged)
    slab = a_slab(shape, content, dtype)
    expected = compact_reference(slab, kept, counts)
    by_cpu, by_triton = slab.clone(), slab.clone()

    compact([by_cpu], kept, counts if is_ragged else None)
    _compact_triton(by_triton, kept, counts)

    assert torch.equal(by_cpu, expected)
    assert torch.equal(by_triton, expected)


def test_a_block_that_overlaps_its_own_sources_is_read_first() -> None:
    kept = torch.arange(1, 100).expand(2, 2, 99).contiguous()
    slab = a_slab((2, 2, 100), (16,), torch.float32)
    expected = slab[:, :, 1:].clone()

    _compact_triton(slab, kept, torch.full((2, 2), 99), block_slots=16)

    assert torch.equal(slab[:, :, :99], expected)


def test_all_slabs_of_a_state_move_together() -> None:
    kept, _ = a_choice((2, 3, 50, 20), is_ragged=False)
    slabs = [a_slab((2, 3, 50), content, dtype) for content, dtype in CONTENTS]
    expected = [compact_reference(slab, kept, torch.full((2, 3), 20)) for slab in slabs]

    compact(slabs, kept)

    assert all(torch.equal(slab, wanted) for slab, wanted in zip(slabs, expected, strict=True))


def test_slabs_that_do_not_fit_are_refused() -> None:
    kept, _ = a_choice((2, 3, 50, 20), is_ragged=False)

    for slab in (a_slab((2, 2, 50), (4,), torch.int32), a_slab((2, 3, 19), (4,), torch.int32)):
        with pytest.raises(ValueError, match="cannot keep"):
            compact([slab], kept)
    with pytest.raises(ValueError, match="contiguous"):
        compact([a_slab((2, 3, 50), (4,), torch.int32).mT.contiguous().mT], kept)


@pytest.mark.gpu
def test_gpu_moves_as_the_reference_does() -> None:
    kept, counts = a_choice((30, 3, 1536, 1024), is_ragged=True)
    slab = a_slab((30, 3, 1536), (64,), torch.bfloat16)
    moved = slab.cuda()

    compact([moved], kept.cuda(), counts.cuda())

    assert torch.equal(moved.cpu(), compact_reference(slab, kept, counts))
