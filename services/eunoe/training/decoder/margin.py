"""How far a hidden key stands out from the filler in every head's memory: what decides how long it can be recalled.

A query reads a token in proportion to sigma(q) . sigma(k) times the token's write weight. T bytes of filler dilute a
key by T, so a head still reads the key after T bytes if its margin, in nats, is above ln T.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eunoe.training.decoder.differentiable import NanoDecoder, SegmentPlan, elu_features
from eunoe.training.decoder.passkey_evaluation import PasskeyCase, passkey_case

SHUT = -3.5
"""A memory gate's logit: 3% of what a head says."""


@dataclass(frozen=True, slots=True)
class HeadMargin:
    """One query head.

    Attributes:
        gate: The share of its output that it takes from the memory.
        margin: ln of the needle's whole weight over the mean weight of a byte of filler, the least over the digits.
        worst_margin: The same over the heaviest byte of filler.
    """

    layer: int
    query_head: int
    gate: float
    margin: float
    worst_margin: float

    def share_after(self, num_bytes: int) -> float:
        """The needle's share of what is read after `num_bytes` bytes of filler, under the linear rule."""
        return 1.0 / (1.0 + num_bytes * math.exp(-self.margin))


@torch.no_grad()
def head_margins(model: NanoDecoder, case: PasskeyCase, segment_length: int) -> list[HeadMargin]:
    """Margins of all query heads for one prompt and its answer, read in one pass."""
    text = case.prompt + case.answer
    needle_start = text.index(b"The pass key is ")
    needle_end = text.index(b" is the pass key. ") + len(b" is the pass key. ")
    question_start = text.rindex(b"What is the pass key?")
    answer_start = len(case.prompt)
    is_filler = torch.ones(len(text), dtype=torch.bool)
    is_filler[needle_start:needle_end] = False
    is_filler[question_start:] = False
    is_filler[:segment_length] = False
    padded = torch.tensor([list(text) + [0] * (-len(text) % segment_length)])
    inputs: list[Tensor] = []
    attentions = model.attentions()
    handles = [
        attention.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for attention in attentions
    ]
    try:
        model(padded, SegmentPlan(model.config, segment_length))
    finally:
        for handle in handles:
            handle.remove()
    found = []
    gates = model.memory_gates()
    for index, (attention, hidden) in enumerate(zip(attentions, inputs, strict=True)):
        queries, keys, _ = attention.project(hidden, padded.shape[1])
        written = (elu_features(keys) * attention.write_weights(keys))[0, 0, :, : len(text)]
        # The byte before a digit asks for it.
        asking = elu_features(queries)[0, 0, :, :, answer_start : answer_start + len(case.answer) - 2]
        read = torch.einsum("hgqd,htd->hgqt", asking, written)
        in_needle = read[..., needle_start:needle_end].sum(-1)
        filler = read[..., is_filler]
        margin = (in_needle.log() - filler.mean(-1).log()).amin(-1).flatten().tolist()
        worst = (in_needle.log() - filler.amax(-1).log()).amin(-1).flatten().tolist()
        found += [HeadMargin(index, head, gates[index][head], margin[head], worst[head]) for head in range(len(margin))]
    return found


def recalling_head(model: NanoDecoder, segment_length: int) -> HeadMargin:
    """The head that brings back most: what it reads of a needle counts as far as its gate is open."""
    case = passkey_case(16 * segment_length + 512, 0.5, np.random.default_rng(0))
    return max(head_margins(model, case, segment_length), key=lambda head: head.gate * head.margin)


@torch.no_grad()
def shut_gates(model: NanoDecoder) -> None:
    """Shut all memory gates for good: nothing that a head says is from the memory."""
    for attention in model.attentions():
        attention.memory_gate.fill_(-math.inf)


@torch.no_grad()
def shut_idle_gates(model: NanoDecoder, segment_length: int) -> None:
    """Shut the memory gates of all heads but the one that recalls."""
    kept = recalling_head(model, segment_length)
    for index, attention in enumerate(model.attentions()):
        is_idle = torch.ones_like(attention.memory_gate, dtype=torch.bool)
        if index == kept.layer:
            is_idle[kept.query_head] = False
        attention.memory_gate.masked_fill_(is_idle, SHUT)
