"""How well does a policy remember, with how many bytes? Evolution's fitness and the benchmarks call the same functions.

A context is read in segments, with an eviction at each boundary and one more at its end; only then come question and
answer, into the memory as it is left. Budgets are bytes, so that a policy pays for what it remembers of each slot:

    full cache: 2 D itemsize bytes a slot,   a policy's: 2 D itemsize + 8 (position and token id) + its statistics
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from eunoe.decoder.config import DecoderConfig, Dtypes
from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MemorySettings, MemoryState, Positions
from eunoe.eviction import EvictionPolicy, Statistics, Window
from eunoe.training.tasks.case import Case, TokenIds

_PLACE_BYTES = 8


@dataclass(frozen=True, slots=True)
class Score:
    """What came of one case.

    Attributes:
        is_exact: Whether greedy decoding answers it.
        log_likelihood: Of the whole answer, in nats.
        num_slots: That a head had left when the question came.
    """

    is_exact: bool
    log_likelihood: float
    num_slots: int


def full_cache_bytes(num_tokens: int, config: DecoderConfig, dtypes: Dtypes) -> int:
    """Keys and values of one head's full cache."""
    return num_tokens * 2 * config.head_dim * dtypes.kv.itemsize


def slots_within(num_bytes: float, config: DecoderConfig, dtypes: Dtypes, statistics: Statistics | None) -> int:
    """How many slots of one head fit in so many bytes, with all that a policy must know of each."""
    slot_bytes = full_cache_bytes(1, config, dtypes) + _PLACE_BYTES
    if statistics is not None:
        slot_bytes += statistics.num_bytes
    return int(num_bytes // slot_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """A model, and what its memory may cost.

    Attributes:
        decoder: The model.
        share: Of the bytes that a full cache of the text has.
        segment_length: As of a stream, like the others.
    """

    decoder: Decoder
    share: float
    segment_length: int = 512
    num_sink_tokens: int = 4
    positions: Positions = "compact"

    def settings(self, num_tokens: int, policy: EvictionPolicy | None) -> MemorySettings:
        """Those of a text of so many tokens. Without a policy the cache is full.

        Raises:
            ValueError: If the share has no room for more than sink tokens.
        """
        budget = num_tokens
        if policy is not None:
            config, dtypes = self.decoder.config, self.decoder.dtypes
            num_bytes = self.share * full_cache_bytes(num_tokens, config, dtypes)
            budget = min(budget, slots_within(num_bytes, config, dtypes, policy.statistics))
        return MemorySettings(
            kv_budget_tokens=budget,
            segment_length=self.segment_length,
            num_sink_tokens=self.num_sink_tokens,
            positions=self.positions,
        )

    @torch.inference_mode()
    def score(self, case: Case, policy: EvictionPolicy | None, start: MemoryState | None = None) -> Score:
        """Read a context, then ask.

        Args:
            case: Question and answer are shorter than a segment.
            policy: None: nothing is evicted.
            start: A memory that has read the context's first segments and evicted nothing, which is left as it is.
        """
        evicting = policy or KeepAll()
        if start is not None:
            state = start.copy()
        else:
            state = self.decoder.new_state(self.settings(len(case.context), policy), evicting)
        _evict(state, evicting)
        self.decoder.prefill(state, case.context[state.num_tokens :], evicting)
        _evict(state, evicting)
        num_slots = state.num_slots
        # One pass instead of decoding: greedy decoding says the answer if each of its tokens is the likeliest after
        # those before it. Nothing is evicted from here on, so nothing is observed either.
        asked = np.concatenate([case.question, case.answer[:-1]])
        logits_TV = self.decoder.prefill(state, asked, KeepAll(), logits="all")
        assert logits_TV is not None
        log_probs = logits_TV[len(case.question) - 1 :].log_softmax(dim=-1)
        answer = torch.from_numpy(case.answer)
        return Score(
            is_exact=bool((log_probs.argmax(dim=-1) == answer).all()),
            log_likelihood=float(log_probs.gather(1, answer[:, None]).sum()),
            num_slots=num_slots,
        )

    @torch.inference_mode()
    def perplexity(self, token_ids: TokenIds, policy: EvictionPolicy | None) -> float:
        """Of a text as it streams through the memory; of the first segment, which every policy reads alike, not.

        Raises:
            ValueError: If the text has no more than a segment.
        """
        if len(token_ids) < self.segment_length + 2:
            raise ValueError(f"{len(token_ids)} tokens are no two more than a segment of {self.segment_length}")
        evicting = policy or KeepAll()
        state = self.decoder.new_state(self.settings(len(token_ids), policy), evicting)
        total = 0.0
        for start in range(0, len(token_ids) - 1, self.segment_length):
            segment = token_ids[start : start + self.segment_length]
            following = token_ids[start + 1 : start + 1 + len(segment)]
            logits_TV = self.decoder.prefill(state, segment, evicting, logits="all" if start else "none")
            if logits_TV is not None:
                target = torch.from_numpy(following)
                total += float(F.cross_entropy(logits_TV[: len(target)], target, reduction="sum"))
        num_predicted = len(token_ids) - self.segment_length - 1
        return math.exp(total / num_predicted)


@dataclass(frozen=True, slots=True)
class KeepAll:
    """Evicts nothing: for what must not change a memory's choice."""

    statistics: Statistics | None = None
    name: str = "keep-all/1"

    def keep(self, window: Window, budget: int) -> torch.Tensor:
        """See `EvictionPolicy.keep`; the budget does not count."""
        num_layers, num_heads, num_slots = window.positions_LHS.shape
        return torch.arange(num_slots).expand(num_layers, num_heads, num_slots)


def _evict(state: MemoryState, policy: EvictionPolicy) -> None:
    budget = state.settings.kv_budget_tokens
    if state.num_slots > budget:
        state.evict(policy.keep(state, budget))
