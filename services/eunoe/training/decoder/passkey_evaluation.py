"""Answering by greedy generation after streaming the whole prompt, many cases side by side."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from eunoe.training.decoder.corpus import FillerName, filler
from eunoe.training.decoder.differentiable import LayerState, NanoDecoder, SegmentPlan
from eunoe.training.decoder.passkey import INTRODUCTION, NUM_DIGITS, draw_key, needle, question

MemoryUse = Literal["all", "window_only", "zeroed"]
NUM_ANSWER_BYTES = NUM_DIGITS + 2


@dataclass(frozen=True, slots=True)
class PasskeyCase:
    """A prompt and its answer, as the paper's appendix B has them.

    Attributes:
        depth: Share of the filler that lies before the needle.
    """

    prompt: bytes
    answer: bytes
    depth: float


@dataclass(slots=True)
class PasskeyScore:
    """How well one depth was answered.

    Attributes:
        digit_shares: Of each answer, the share of its digits that are right.
        num_exact: Answers that are right in every byte.
    """

    digit_shares: list[float]
    num_exact: int

    @property
    def digit_accuracy(self) -> float:
        """The share of all digits that are right."""
        return sum(self.digit_shares) / len(self.digit_shares)


def passkey_case(
    num_bytes: int,
    depth: float,
    generator: np.random.Generator,
    filler_name: FillerName = "paper",
    *,
    filler_seed: int | None = None,
) -> PasskeyCase:
    """A prompt of at most `num_bytes` bytes, less than one sentence or verse short of it.

    Args:
        filler_seed: Cases of one seed have the same filler, the shorter of two the beginning of the longer one's.
    """
    key = draw_key(generator)
    fixed = len(INTRODUCTION) + len(needle(key)) + len(question())
    if num_bytes < fixed:
        raise ValueError(f"a prompt has at least {fixed} bytes, not {num_bytes}")
    drawn_by = generator if filler_seed is None else np.random.default_rng(filler_seed)
    pieces = filler(filler_name, num_bytes - fixed, "test", drawn_by)
    cut = round(depth * len(pieces))
    text = INTRODUCTION + "".join(pieces[:cut]) + needle(key) + "".join(pieces[cut:]) + question()
    return PasskeyCase(text.encode(), f" {key}.".encode(), depth)


def answers(
    model: NanoDecoder, cases: list[PasskeyCase], segment_length: int, memory_use: MemoryUse = "all"
) -> list[bytes]:
    """Greedy answers, in the order of the cases; see `answered`."""
    given = dict(answered(model, cases, segment_length, memory_use))
    return [given[index] for index in range(len(cases))]


@torch.no_grad()
def answered(
    model: NanoDecoder, cases: list[PasskeyCase], segment_length: int, memory_use: MemoryUse = "all"
) -> Iterator[tuple[int, bytes]]:
    """Read all prompts side by side; yields a case's index and its greedy answer as soon as its prompt is read.

    Args:
        memory_use: `window_only` never mixes the memory in; `zeroed` forgets it just before the question's end.
    """
    plan = SegmentPlan(model.config, segment_length, uses_memory=memory_use != "window_only")
    # At least a byte is left to ask with.
    num_segments = np.array([(len(case.prompt) - 1) // segment_length for case in cases])
    states: list[LayerState] | None = None
    # Prompts that have been the same so far are read once: `rows` says which state is whose.
    rows = np.zeros(len(cases), np.int64)
    for segment in itertools.count():
        start = segment * segment_length
        tails: dict[int, list[int]] = {}
        for index in np.flatnonzero(num_segments == segment):
            tails.setdefault(len(cases[index].prompt), []).append(int(index))
        for asked in tails.values():
            their = None if states is None else _picked(states, rows[asked])
            if memory_use == "zeroed" and their is not None:
                for state in their:
                    state.memory = torch.zeros_like(state.memory)
            tail = _bytes([cases[index].prompt[start:] for index in asked])
            yield from zip(asked, _generate(model, plan, tail, their), strict=True)
        reading = np.flatnonzero(num_segments > segment)
        if not len(reading):
            return
        block = _bytes([cases[index].prompt[start : start + segment_length] for index in reading])
        _, firsts, new_rows = np.unique(
            np.concatenate([rows[reading, None], block], axis=1), axis=0, return_index=True, return_inverse=True
        )
        if states is not None:
            states = _picked(states, rows[reading[firsts]])
        rows[reading] = new_rows.reshape(-1)
        _, states = model(block[firsts], plan, states)


def _bytes(texts: list[bytes]) -> Tensor:
    """Texts of one length, `[B, N]`."""
    return torch.from_numpy(np.stack([np.frombuffer(text, np.uint8) for text in texts]).astype(np.int64))


def _picked(states: list[LayerState], rows: np.ndarray) -> list[LayerState]:
    return [state.picked(torch.from_numpy(rows)) for state in states]


def _generate(model: NanoDecoder, plan: SegmentPlan, tail: Tensor, states: list[LayerState] | None) -> list[bytes]:
    generated = []
    for _ in range(NUM_ANSWER_BYTES):
        num_read = tail.shape[1]
        padded = functional.pad(tail, (0, plan.segment_length - num_read))
        # Padding comes after everything that is read, and a state that holds any is thrown away.
        hidden, after = model(padded, plan, states)
        chosen = model.logits(hidden[:, num_read - 1]).argmax(-1, keepdim=True)
        generated.append(chosen)
        if num_read == plan.segment_length:
            states, tail = after, chosen
        else:
            tail = torch.cat([tail, chosen], dim=1)
    return [bytes(row) for row in torch.cat(generated, dim=1).tolist()]


def scores(cases: list[PasskeyCase], given: list[bytes]) -> dict[float, PasskeyScore]:
    """How well each depth was answered."""
    by_depth: dict[float, PasskeyScore] = {}
    for case, answer in sorted(zip(cases, given, strict=True), key=lambda pair: pair[0].depth):
        score = by_depth.setdefault(case.depth, PasskeyScore([], 0))
        num_right = sum(a == b for a, b in zip(answer[1:-1], case.answer[1:-1], strict=True))
        score.digit_shares.append(num_right / NUM_DIGITS)
        score.num_exact += answer == case.answer
    return by_depth
