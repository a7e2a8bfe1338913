"""Compaction of slabs: the slots of each head that stay move to its front, in place.

Kept indices ascend, so the slot that comes to place i stands at i or behind it: moved in this order, no slot is written
over before it was moved, and nothing needs a second slab.

Shape suffixes: L KV source layer, H KV head, C slot of a slab, K kept slot.
"""

from collections.abc import Sequence
from typing import Any

import numba
import torch
import triton
import triton.language as tl


def compact(slabs: Sequence[torch.Tensor], kept_LHK: torch.Tensor, num_kept_LH: torch.Tensor | None = None) -> None:
    """Move each head's kept slots to its front. What was behind them is undefined afterwards.

    Args:
        slabs: [L, H, C, ...] each, contiguous, any dtypes.
        kept_LHK: Which slots, ascending, int64.
        num_kept_LH: Where heads keep different numbers: how many of K count, int64.

    Raises:
        ValueError: If a slab is not contiguous or has other layers, heads or fewer slots than are kept.
    """
    num_layers, num_heads, num_kept = kept_LHK.shape
    for slab in slabs:
        if slab.shape[:2] != (num_layers, num_heads) or slab.shape[2] < num_kept or not slab.is_contiguous():
            raise ValueError(f"slab {tuple(slab.shape)} cannot keep {tuple(kept_LHK.shape)}, or is not contiguous")
    if not num_kept:
        return
    kept_LHK = kept_LHK.contiguous()
    if num_kept_LH is None:
        num_kept_LH = torch.full((num_layers, num_heads), num_kept, dtype=torch.int64, device=kept_LHK.device)
    move = _compact_triton if kept_LHK.is_cuda else _compact_cpu
    for slab in slabs:
        move(slab, kept_LHK, num_kept_LH)


def compact_reference(slab: torch.Tensor, kept_LHK: torch.Tensor, num_kept_LH: torch.Tensor) -> torch.Tensor:
    """The slab that `compact` leaves, as a new one: slots behind the kept ones as they were."""
    out = slab.clone()
    for layer in range(slab.shape[0]):
        for head in range(slab.shape[1]):
            kept = kept_LHK[layer, head, : num_kept_LH[layer, head]]
            out[layer, head, : len(kept)] = slab[layer, head, kept]
    return out


def _compact_cpu(slab: torch.Tensor, kept_LHK: torch.Tensor, num_kept_LH: torch.Tensor) -> None:
    _move_rows(_words(slab).numpy(), kept_LHK.flatten(0, 1).numpy(), num_kept_LH.flatten().numpy())


def _words(slab: torch.Tensor) -> torch.Tensor:
    """A slab's bytes as integers, [L H, C, words]: of 4 bytes if a slot has a multiple of that, so that one compiled
    program moves keys, positions and most statistics.
    """
    slots = slab.flatten(0, 1).flatten(2) if slab.dim() > 3 else slab.flatten(0, 1)[..., None]
    slot_bytes = slots.shape[2] * slots.element_size()
    words = {4: torch.int32, 2: torch.int16, 1: torch.uint8}
    return slots.view(next(dtype for size, dtype in words.items() if slot_bytes % size == 0))


@numba.njit(cache=True, nogil=True)
def _move_rows(rows: Any, kept: Any, num_kept: Any) -> None:
    num_words = rows.shape[2]
    for head in range(rows.shape[0]):
        for place in range(num_kept[head]):
            source = kept[head, place]
            if source != place:
                for word in range(num_words):
                    rows[head, place, word] = rows[head, source, word]


def _compact_triton(
    slab: torch.Tensor, kept_LHK: torch.Tensor, num_kept_LH: torch.Tensor, *, block_slots: int = 32
) -> None:
    words = _words(slab)
    num_heads, capacity, num_words = words.shape
    block_words = min(16, triton.next_power_of_2(num_words))
    kv_compaction_kernel[(triton.cdiv(num_words, block_words), num_heads)](
        words, kept_LHK, num_kept_LH, capacity, kept_LHK.shape[2], num_words,
        block_slots=block_slots, block_words=block_words,
    )  # fmt: skip


@triton.jit
def kv_compaction_kernel(
    slab_pointer, kept_pointer, num_kept_pointer, capacity, kept_stride, num_words,
    block_slots: tl.constexpr, block_words: tl.constexpr,
):  # fmt: skip
    """One program a head and block of a slot's words: blocks of slots in ascending order, each read before written."""
    head = tl.program_id(1).to(tl.int64)
    word = tl.program_id(0) * block_words + tl.arange(0, block_words)
    num_kept = tl.load(num_kept_pointer + head)
    slab = slab_pointer + head * capacity * num_words
    for first in range(0, num_kept, block_slots):
        place = first + tl.arange(0, block_slots)
        is_kept = place < num_kept
        source = tl.load(kept_pointer + head * kept_stride + place, mask=is_kept, other=0)
        is_live = is_kept[:, None] & (word < num_words)[None, :]
        moved = tl.load(slab + source[:, None] * num_words + word[None, :], mask=is_live)
        # A place of this block may be a source of another thread's; sources of later blocks lie behind all of them.
        tl.debug_barrier()
        tl.store(slab + place[:, None] * num_words + word[None, :], moved, mask=is_live)
