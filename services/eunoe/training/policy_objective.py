"""How well a model answers, and reads on, when a policy decides what a bounded memory keeps: what evolution maximises.

    fitness = min(0, answer - answer_full) + w min(0, reading - reading_full)

`answer` is the log-likelihood a token of a case's answer, `reading` that of the context's tokens after its last segment
boundary; the full ones are those of a cache from which nothing is evicted. Doing better than the full cache is not
rewarded: that would be learning the cases.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MemorySettings, MemoryState
from eunoe.eviction import EvictionPolicy, SinksRecent, Statistics, Window
from eunoe.eviction.spectrogram import AttentionSpectrogram
from eunoe.training.spectrogram_moments import Moments
from eunoe.training.tasks.case import Case, TokenIds

# Memories before the first eviction that one worker keeps: SmolLM2's take 62 MB each at the default budget.
_MAX_PREPARED = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveSettings:
    """What fitness means."""

    memory: MemorySettings = field(default_factory=MemorySettings)
    """The bounded memory, as it will be served."""
    reading_weight: float = 0.1
    """w: what ordinary reading counts beside answers."""

    def __post_init__(self) -> None:
        if not self.reading_weight >= 0:
            raise ValueError(f"{self.reading_weight=} is below 0")


class Likelihoods(NamedTuple):
    """Log-likelihoods a token; `reading` is 0 where no token counts."""

    answer: float
    reading: float


@dataclass(frozen=True, slots=True)
class _KeepAll:
    """Evicts nothing, and has the state remember what another policy needs."""

    statistics: Statistics | None
    name: str = "keep-all"

    def keep(self, window: Window, budget: int) -> torch.Tensor:
        return torch.arange(window.num_slots).expand_as(window.positions_LHS).contiguous()


class PolicyObjective:
    """Cases, and the model that answers them. Deterministic on one machine, whatever was asked before.

    Args:
        decoder: The model.
        cases: Prompt i is case i.
        statistics: Of the policies that are judged.
        settings: What fitness means.

    Raises:
        ValueError: If a case's context is so short that nothing is evicted, or it has no question or answer.
    """

    def __init__(
        self, decoder: Decoder, cases: Sequence[Case], statistics: AttentionSpectrogram, settings: ObjectiveSettings
    ) -> None:
        self._decoder = decoder
        self._cases = cases
        self._statistics = statistics
        self._settings = settings
        self._full: dict[int, Likelihoods] = {}
        self._prepared: OrderedDict[int, MemoryState] = OrderedDict()
        memory = settings.memory
        # At the first boundary with more slots than the budget.
        self._first_eviction = (memory.kv_budget_tokens // memory.segment_length + 1) * memory.segment_length
        for index, case in enumerate(cases):
            if len(case.context) < self._first_eviction:
                raise ValueError(
                    f"case {index} has a context of {len(case.context)} tokens: nothing is evicted before "
                    f"{self._first_eviction}"
                )
            if not len(case.question) or not len(case.answer):
                raise ValueError(f"case {index} has no question or no answer")

    def fitness(self, policy: EvictionPolicy, prompt: int) -> float:
        """At most 0.

        Args:
            policy: With this objective's statistics, or none.
            prompt: Number of the case.
        """
        case, full = self._cases[prompt], self._full_likelihoods(prompt)
        state = self._prepared_state(prompt).copy()
        state.evict(policy.keep(state, self._settings.memory.kv_budget_tokens))
        bounded = self._read(state, policy, case)
        reading = min(0.0, bounded.reading - full.reading)
        return min(0.0, bounded.answer - full.answer) + self._settings.reading_weight * reading

    def moments(self, prompt: int) -> Moments:
        """Of the spectrograms of all slots at every boundary of a case's context, with a full cache."""
        context = self._cases[prompt].context
        keep_all = _KeepAll(self._statistics)
        state = self._decoder.new_state(self._full_memory(len(context)), keep_all)
        parts = []
        length = self._settings.memory.segment_length
        for start in range(0, len(context) - length + 1, length):
            self._decoder.prefill(state, context[start : start + length], keep_all)
            assert state.statistics_LHSB is not None
            spectrogram, _ = self._statistics.unpack(state.statistics_LHSB)
            parts.append(Moments.of(spectrogram.flatten(0, -2)))
        return reduce(Moments.merged, parts)

    def _prepared_state(self, prompt: int) -> MemoryState:
        """The memory when the first eviction is due. No policy has had an influence on it."""
        if prompt not in self._prepared:
            keep_all = _KeepAll(self._statistics)
            state = self._decoder.new_state(self._settings.memory, keep_all)
            self._decoder.prefill(state, self._cases[prompt].context[: self._first_eviction], keep_all)
            self._prepared[prompt] = state
            if len(self._prepared) > _MAX_PREPARED:
                self._prepared.popitem(last=False)
        self._prepared.move_to_end(prompt)
        return self._prepared[prompt]

    def _full_likelihoods(self, prompt: int) -> Likelihoods:
        if prompt not in self._full:
            case, policy = self._cases[prompt], SinksRecent()
            num_tokens = len(case.context) + len(case.question) + len(case.answer)
            state = self._decoder.new_state(self._full_memory(num_tokens))
            self._decoder.prefill(state, case.context[: self._first_eviction], policy)
            self._full[prompt] = self._read(state, policy, case)
        return self._full[prompt]

    def _full_memory(self, num_tokens: int) -> MemorySettings:
        return replace(self._settings.memory, kv_budget_tokens=num_tokens)

    def _read(self, state: MemoryState, policy: EvictionPolicy, case: Case) -> Likelihoods:
        """Read on from the first eviction to the answer's end."""
        length = self._settings.memory.segment_length
        last_boundary = max(self._first_eviction, (len(case.context) - 1) // length * length)
        self._decoder.prefill(state, case.context[self._first_eviction : last_boundary], policy)
        rest = case.context[last_boundary:]
        reading = 0.0
        if len(rest) > 1 and self._settings.reading_weight:
            logits = self._decoder.prefill(state, rest, policy, logits="all")
            assert logits is not None
            reading = _mean_log_likelihood(logits[:-1], rest[1:])
        else:
            self._decoder.prefill(state, rest, policy)
        told = np.concatenate([case.question, case.answer[:-1]])
        logits = self._decoder.prefill(state, told, policy, logits="all")
        assert logits is not None
        return Likelihoods(_mean_log_likelihood(logits[-len(case.answer) :], case.answer), reading)


class ObjectiveWorker(PolicyObjective):
    """A `PolicyObjective` in a process of its own, which loads its model from a directory."""

    def __init__(
        self,
        model_path: Path,
        cases: Sequence[Case],
        statistics: AttentionSpectrogram,
        settings: ObjectiveSettings,
        num_threads: int,
    ) -> None:
        super().__init__(Decoder.load(model_path, num_threads=num_threads), cases, statistics, settings)


def _mean_log_likelihood(logits_TV: torch.Tensor, token_ids: TokenIds) -> float:
    log_likelihoods = logits_TV.log_softmax(dim=-1).gather(1, torch.from_numpy(token_ids.astype(np.int64))[:, None])
    return float(log_likelihoods.double().mean())
