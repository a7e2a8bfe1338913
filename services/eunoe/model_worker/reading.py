"""Engine jobs that read tokens into a copy of a memory state, and score them."""

from collections.abc import Callable

import numpy as np
import torch

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MAX_TOKENS, MemoryState
from eunoe.eviction.policy import EvictionPolicy
from eunoe.model_worker.engine import Job
from eunoe.model_worker.fold import EphemeralCopy
from eunoe.runtime.errors import FailedPrecondition

# Logits of one pass while scoring take 4 bytes a row and word of the vocabulary: 50 MB at 49,152 words.
_SCORED_ROWS = 256


def check_room(decoder: Decoder, state: MemoryState, num_context: int, num_needed: int) -> int:
    """How many positions are left behind `num_context` more tokens.

    Raises:
        FailedPrecondition: If there is no token at all to go on from, or fewer than `num_needed` positions are left.
    """
    num_read = state.num_tokens + num_context
    if not num_read:
        raise FailedPrecondition("the stream's memory and the prompt are both empty: there is nothing to go on from")
    is_compact = state.settings.positions == "compact"
    limit = MAX_TOKENS if is_compact else decoder.config.max_positions
    if limit - num_read < num_needed:
        hint = "" if is_compact else " with compact positions"
        raise FailedPrecondition(
            f"{state.settings.positions} positions end at {limit}, and the call needs {num_read + num_needed}: make a"
            f" new stream{hint}"
        )
    return limit - num_read


def read_tokens(
    decoder: Decoder, policy: EvictionPolicy, state: MemoryState, token_ids: np.ndarray
) -> Job[torch.Tensor]:
    """Append tokens, a segment's pass a turn; returns the logits after the last one, float32 [vocab].

    Without tokens these are the logits after the state's own last token, which is read once more for them.
    """
    if not len(token_ids):
        token_ids = np.asarray([_step_back(state)])
    logits: torch.Tensor | None = None
    while len(token_ids):
        num_now = min(len(token_ids), state.num_tokens_to_boundary)
        is_last = num_now == len(token_ids)
        logits = decoder.prefill(state, token_ids[:num_now], policy, logits="last" if is_last else "none")
        token_ids = token_ids[num_now:]
        yield None
    assert logits is not None
    return logits


def score_tokens(
    decoder: Decoder,
    policy: EvictionPolicy,
    copy: EphemeralCopy,
    text_ids: list[int],
    send: Callable[[api.ScoredTokens], None],
) -> Job[None]:
    """Score each token of a text given all before it."""
    state = copy.state
    check_room(decoder, state, len(copy.tail), num_needed=len(text_ids))
    last_V = yield from read_tokens(decoder, policy, state, copy.tail)
    ids = np.asarray(text_ids, dtype=np.int64)
    for start in range(0, len(ids), _SCORED_ROWS):
        scored = ids[start : start + _SCORED_ROWS]
        logits_TV = decoder.prefill(state, scored, policy, logits="all")
        assert logits_TV is not None
        before_TV = torch.cat([last_V[None], logits_TV[:-1]])
        last_V = logits_TV[-1]
        log_probs = torch.log_softmax(before_TV, dim=-1).gather(1, torch.from_numpy(scored)[:, None])[:, 0]
        send(api.ScoredTokens(token_ids=scored.tolist(), log_probs=log_probs.tolist()))
        yield None


def _step_back(state: MemoryState) -> int:
    """Take the last token out of a copy, to be read again; policies keep the newest token of every head."""
    token_id = int(state.token_ids[0, 0, state.num_slots - 1])
    state.num_slots -= 1
    state.num_tokens -= 1
    state.num_rotated = min(state.num_rotated, state.num_slots)
    return token_id
