"""Answering by greedy generation after streaming the whole prompt, many cases side by side."""

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


@dataclass(frozen=True, slots=True)
class PasskeyScore:
    """Shares of one depth's answers: of digits that are right, of answers that are right in every byte."""

    digit_accuracy: float
    exact_match: float
    num_cases: int


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
    """Greedy answers.

    Args:
        memory_use: `window_only` never mixes the memory in; `zeroed` forgets it just before the question's end.
    """
    given = [b""] * len(cases)
    left = sorted(range(len(cases)), key=lambda index: len(cases[index].prompt))
    while left:
        # Only prompts of about a length are read side by side: those of a book differ by a verse.
        limit = len(cases[left[0]].prompt) + segment_length
        group = [index for index in left if len(cases[index].prompt) < limit]
        left = left[len(group) :]
        found = _answers_side_by_side(model, [cases[index] for index in group], segment_length, memory_use)
        for index, answer in zip(group, found, strict=True):
            given[index] = answer
    return given


@torch.no_grad()
def _answers_side_by_side(
    model: NanoDecoder, cases: list[PasskeyCase], segment_length: int, memory_use: MemoryUse
) -> list[bytes]:
    """Answers to prompts whose lengths differ by less than a segment."""
    shortest = min(len(case.prompt) for case in cases)
    # They end together: of longer prompts a few leading bytes of the introduction go.
    prompts = np.stack([np.frombuffer(case.prompt[-shortest:], np.uint8) for case in cases])
    plan = SegmentPlan(model.config, segment_length, uses_memory=memory_use != "window_only")
    num_segments = (shortest - 1) // segment_length
    states: list[LayerState] | None = None
    # Prompts that have been the same so far are read once: `rows` says which state is whose.
    rows = np.zeros(len(cases), np.int64)
    for index in range(num_segments):
        block = prompts[:, index * segment_length : (index + 1) * segment_length]
        _, firsts, new_rows = np.unique(
            np.concatenate([rows[:, None], block], axis=1), axis=0, return_index=True, return_inverse=True
        )
        if states is not None and not np.array_equal(rows[firsts], np.arange(states[0].memory.shape[0])):
            states = _picked(states, rows[firsts])
        rows = new_rows.reshape(-1)
        _, states = model(torch.from_numpy(block[firsts].astype(np.int64)), plan, states)
    if states is not None:
        states = _picked(states, rows)
    if memory_use == "zeroed" and states is not None:
        for state in states:
            state.memory = torch.zeros_like(state.memory)
    tail = torch.from_numpy(prompts[:, num_segments * segment_length :].astype(np.int64))
    return _generate(model, plan, tail, states)


def _picked(states: list[LayerState], rows: np.ndarray) -> list[LayerState]:
    picked = torch.from_numpy(rows)
    return [LayerState(state.keys[picked], state.values[picked], state.memory[picked]) for state in states]


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
    by_depth: dict[float, list[tuple[int, bool]]] = {}
    for case, answer in zip(cases, given, strict=True):
        digits = sum(a == b for a, b in zip(answer[1:-1], case.answer[1:-1], strict=True))
        by_depth.setdefault(case.depth, []).append((digits, answer == case.answer))
    return {
        depth: PasskeyScore(
            sum(digits for digits, _ in rows) / (NUM_DIGITS * len(rows)),
            sum(is_exact for _, is_exact in rows) / len(rows),
            len(rows),
        )
        for depth, rows in sorted(by_depth.items())
    }
