"""How well a model answers when a policy decides what a bounded memory keeps: what evolution maximises.

    fitness = min(0, log-likelihood of the answer, a token, - the same with a full cache)

Doing better than the full cache is not rewarded: that would be learning the cases. Cases that only go on reading
(`continuation`) count by a weight.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

from eunoe.decoder.config import DecoderConfig, Dtypes
from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MemoryState
from eunoe.eviction import EvictionPolicy
from eunoe.eviction.novelty import NovelSpectrogram
from eunoe.eviction.spectrogram import AttentionSpectrogram
from eunoe.training.evaluation import Evaluation, KeepAll, full_cache_bytes, slots_within
from eunoe.training.spectrogram_moments import Moments
from eunoe.training.tasks.case import Case
from eunoe.training.tasks.continuation import TASK as READING

# Memories before the first eviction that one worker keeps: SmolLM2's take 62 MB each with 1,024 slots and a segment.
_MAX_PREPARED = 16
_NUM_SINK_TOKENS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveSettings:
    """What fitness means."""

    share: float = 0.25
    """What the memory may have of a full cache's bytes, above 0 and at most 1; see `Evaluation`."""
    segment_length: int = 512
    """As of the streams that it will be used for."""
    reading_weight: float = 0.25
    """What a case that only goes on reading counts."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} is not above 0 and at most 1")
        if not 0 <= self.reading_weight < math.inf:
            raise ValueError(f"reading_weight={self.reading_weight} is no finite number from 0")


def check_cases(
    cases: Sequence[Case],
    statistics: AttentionSpectrogram | NovelSpectrogram,
    settings: ObjectiveSettings,
    config: DecoderConfig,
    dtypes: Dtypes,
) -> None:
    """Whether cases can be asked of a model's bounded memory; takes the model's shape and binding, not its weights.

    Raises:
        ValueError: If a case's budget has no room for more than sink tokens, or its question and answer do not fit
            into a segment.
    """
    for index, case in enumerate(cases):
        num_bytes = settings.share * full_cache_bytes(len(case.context), config, dtypes)
        num_slots = slots_within(num_bytes, config, dtypes, statistics)
        if num_slots <= _NUM_SINK_TOKENS:
            raise ValueError(
                f"case {index} has room for {num_slots} slots with share={settings.share}, {_NUM_SINK_TOKENS} of them "
                "for sink tokens"
            )
        num_asked = len(case.question) + len(case.answer)
        if num_asked > settings.segment_length:
            raise ValueError(f"case {index} asks {num_asked} tokens, a segment has {settings.segment_length}")


class PolicyObjective:
    """Cases, and the model that answers them. Deterministic on one machine, whatever was asked before.

    Args:
        decoder: The model.
        cases: Prompt i is case i.
        statistics: Of the policies that are judged.
        settings: What fitness means.

    Raises:
        ValueError: As `check_cases`.
    """

    def __init__(
        self,
        decoder: Decoder,
        cases: Sequence[Case],
        statistics: AttentionSpectrogram | NovelSpectrogram,
        settings: ObjectiveSettings,
    ) -> None:
        check_cases(cases, statistics, settings, decoder.config, decoder.dtypes)
        self._decoder = decoder
        self._cases = cases
        self._keep_all = KeepAll(statistics)
        self._statistics = statistics
        self._settings = settings
        self._evaluation = Evaluation(
            decoder=decoder,
            share=settings.share,
            segment_length=settings.segment_length,
            num_sink_tokens=_NUM_SINK_TOKENS,
        )
        self._full: dict[int, float] = {}
        self._prepared: OrderedDict[int, MemoryState] = OrderedDict()

    def fitness(self, policy: EvictionPolicy, prompt: int) -> float:
        """At most 0.

        Args:
            policy: With this objective's statistics.
            prompt: Number of the case.
        """
        case = self._cases[prompt]
        if prompt not in self._full:
            self._full[prompt] = self._evaluation.score(case, None).log_likelihood
        bounded = self._evaluation.score(case, policy, start=self._unevicted(prompt, policy)).log_likelihood
        weight = self._settings.reading_weight if case.task == READING else 1.0
        return weight * min(0.0, bounded - self._full[prompt]) / len(case.answer)

    def moments(self, prompt: int) -> Moments:
        """Of the spectrograms of all slots at every boundary of a case's context, with a full cache."""
        context, length = self._cases[prompt].context, self._settings.segment_length
        state = self._decoder.new_state(self._evaluation.settings(len(context), None), self._keep_all)
        parts = []
        for start in range(0, len(context), length):
            self._decoder.prefill(state, context[start : start + length], self._keep_all)
            assert state.statistics_LHSB is not None
            spectrogram, _ = self._statistics.unpack(state.statistics_LHSB)
            parts.append(Moments.of(spectrogram.flatten(0, -2)))
        return reduce(Moments.merged, parts)

    def _unevicted(self, prompt: int, policy: EvictionPolicy) -> MemoryState:
        """A case's memory when the first eviction at a boundary is due: no policy has had an influence on it."""
        if prompt not in self._prepared:
            context, length = self._cases[prompt].context, self._settings.segment_length
            settings = self._evaluation.settings(len(context), policy)
            first_eviction = (settings.kv_budget_tokens // length + 1) * length
            state = self._decoder.new_state(settings, policy)
            self._decoder.prefill(
                state, context[: min(first_eviction, len(context) // length * length)], self._keep_all
            )
            self._prepared[prompt] = state
            if len(self._prepared) > _MAX_PREPARED:
                self._prepared.popitem(last=False)
        self._prepared.move_to_end(prompt)
        return self._prepared[prompt]


class ObjectiveWorker(PolicyObjective):
    """A `PolicyObjective` in a process of its own, which loads its model from a directory."""

    def __init__(
        self,
        model_path: Path,
        cases: Sequence[Case],
        statistics: AttentionSpectrogram | NovelSpectrogram,
        settings: ObjectiveSettings,
        num_threads: int,
    ) -> None:
        super().__init__(Decoder.load(model_path, num_threads=num_threads), cases, statistics, settings)
