"""Learn what novelty is by imitating an oracle: the tokens that a question will need, where the answers are known.

Gradients only, and none through the model: numbers of tokens in contexts that a full cache has read go in, whether a
token is part of what is asked for comes out, by logistic regression. The rest of the start is set by hand: the score is
`attention` times the normalised logarithm of the spectrogram's constant bin plus `novelty` times the novelty.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812

from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MemorySettings, MemoryState
from eunoe.eviction.backward_attention import NUM_FEATURES, BackwardAttention, num_parameters, slices
from eunoe.eviction.namm import NUM_AGE_FEATURES, Namm, Normalization, log_bins
from eunoe.eviction.novelty import NUM_NUMBERS, NovelSpectrogram, Novelty, numbers
from eunoe.eviction.spectrogram import AttentionSpectrogram
from eunoe.training.evaluation import KeepAll
from eunoe.training.tasks.case import Case

_NUM_STEPS = 600
_LEARNING_RATE = 0.03
_DECAY = 1e-3
# Every so many-th slot is enough for moments.
_STRIDE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class NoveltyTraining:
    """What a start is made from.

    Attributes:
        attention: What the spectrogram counts in the score, for a standard deviation.
        novelty: The same of novelty.
        num_observed_queries: As in `AttentionSpectrogram`.
        num_recent_tokens: As in `Namm`; the default is half of any budget, whose loss costs the next words more than
            the other half's (perplexity 7.77 against 7.94 with 64, on 2,048 tokens at a quarter of the bytes).
        num_unlearned_tokens: So many at each end of a context are protected anyway, and teach nothing.
    """

    attention: float = 0.25
    novelty: float = 1.0
    segment_length: int = 512
    num_observed_queries: int | None = 64
    num_recent_tokens: int = 1 << 20
    num_unlearned_tokens: int = 64

    def __post_init__(self) -> None:
        if not (math.isfinite(self.attention) and math.isfinite(self.novelty)):
            raise ValueError(f"attention={self.attention} and novelty={self.novelty} are not both finite")
        if self.num_unlearned_tokens < 0:
            raise ValueError(f"num_unlearned_tokens={self.num_unlearned_tokens} is below 0")


def train_novelty(decoder: Decoder, cases: Iterable[Case], training: NoveltyTraining) -> Namm:
    """A NAMM that keeps what is unlike its surroundings and what receives attention.

    Args:
        decoder: The model.
        cases: With needles; each is read with a full cache.
        training: See there.

    Raises:
        ValueError: If no case has a needle among the tokens that teach something, or they are nothing else.
    """
    spectrogram = AttentionSpectrogram(training.num_observed_queries)
    inputs, targets, bins = [], [], []
    for case in cases:
        state = _read(decoder, case, spectrogram, training.segment_length)
        inputs.append(_numbers(state, training.segment_length))
        targets.append(_needed(case))
        assert state.statistics_LHSB is not None
        bins.append(spectrogram.unpack(state.statistics_LHSB)[0][:, :, ::_STRIDE].flatten(0, 2))
    if not inputs:
        raise ValueError("there is no case to learn from")
    novelty = _fitted(inputs, targets, training.num_unlearned_tokens)
    bins_SF = log_bins(torch.cat(bins))
    parameters = torch.zeros(num_parameters(NUM_FEATURES + 1))
    weight = parameters[slices(NUM_FEATURES + 1)["score_weight"]]
    weight[NUM_AGE_FEATURES], weight[NUM_FEATURES] = training.attention, training.novelty
    return Namm(
        BackwardAttention(parameters, "blocks"),
        Normalization(bins_SF.mean(dim=0), bins_SF.var(dim=0), is_logarithmic=True),
        NovelSpectrogram(novelty, spectrogram),
        num_recent_tokens=training.num_recent_tokens,
    )


def _read(decoder: Decoder, case: Case, spectrogram: AttentionSpectrogram, segment_length: int) -> MemoryState:
    """The memory state of a context of which nothing was evicted."""
    settings = MemorySettings(kv_budget_tokens=len(case.context), segment_length=segment_length)
    keeping = KeepAll(spectrogram)
    state = decoder.new_state(settings, keeping)
    with torch.inference_mode():
        decoder.prefill(state, case.context, keeping)
    return state


def _numbers(state: MemoryState, segment_length: int) -> torch.Tensor:
    """Of each token, in the passes that it was read in, float32 [T, N]."""
    starts = range(0, state.num_slots, segment_length)
    passes = [slice(start, start + segment_length) for start in starts]
    return torch.cat([numbers(state.keys_LHSD[:, :, p], state.values_LHSD[:, :, p]) for p in passes])


def _needed(case: Case) -> torch.Tensor:
    """1 for each token of a needle, float32 [T]."""
    needed = torch.zeros(len(case.context))
    for start, stop in case.needles:
        needed[start:stop] = 1
    return needed


def _fitted(inputs: list[torch.Tensor], targets: list[torch.Tensor], num_unlearned: int) -> Novelty:
    """Logistic regression, both classes of equal weight; over all tokens the sum has mean 0 and deviation 1."""
    every = torch.cat(inputs)
    mean, scale = every.mean(dim=0), every.std(dim=0).clamp_min(1e-6)
    learned = [slice(num_unlearned, len(each) - num_unlearned) for each in inputs]
    x = torch.cat([(each[part] - mean) / scale for each, part in zip(inputs, learned, strict=True)])
    y = torch.cat([each[part] for each, part in zip(targets, learned, strict=True)])
    if not 0 < y.sum() < len(y):
        raise ValueError(
            f"no case has tokens that a question needs, and others, beyond the {num_unlearned} at each of its ends"
        )
    weight = torch.zeros(NUM_NUMBERS, requires_grad=True)
    bias = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=_LEARNING_RATE)
    balance = (1 - y).sum() / y.sum()
    for _ in range(_NUM_STEPS):
        loss = F.binary_cross_entropy_with_logits(x @ weight + bias, y, pos_weight=balance)
        optimizer.zero_grad()
        (loss + _DECAY * weight.square().sum()).backward()
        optimizer.step()
    sums = ((every - mean) / scale) @ weight.detach()
    return Novelty(weight.detach() / sums.std(), mean, scale)
