"""A stream folded under each eviction policy, by the real fold over the tiny model."""

from pathlib import Path

import numpy as np
import pytest
import torch

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.decoder import state_codec
from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MAX_TOKENS, MemorySettings, MemoryState
from eunoe.decoder.tokenizer import Tokenizer
from eunoe.eviction import POLICIES, EvictionPolicy, Namm, SinksRecent
from eunoe.eviction.backward_attention import NUM_PARAMETERS, BackwardAttention
from eunoe.eviction.fallback import Fallback
from eunoe.eviction.namm import Normalization
from eunoe.eviction.spectrogram import AttentionSpectrogram
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.model_worker.fold import Snapshot, StreamFold
from eunoe.runtime.errors import FailedPrecondition
from eunoe.state_store.checkpoint_rules import MAX_DECISIONS

SETTINGS = MemorySettings(kv_budget_tokens=48, segment_length=32, num_sink_tokens=4)
TEXT = b" ".join(f"line {number} says {number * number} words and no more".encode() for number in range(60))


def random_namm(*, num_observed_queries: int | None = None, num_spare_slots: int = 0) -> Namm:
    parameters = 0.3 * torch.randn(NUM_PARAMETERS, generator=torch.Generator().manual_seed(0))
    return Namm(
        BackwardAttention(parameters),
        Normalization(torch.full((17,), 0.01), torch.full((17,), 0.02)),
        AttentionSpectrogram(num_observed_queries),
        num_recent_tokens=8,
        num_spare_slots=num_spare_slots,
    )


ALL: dict[str, EvictionPolicy] = {
    **POLICIES,
    "namm": random_namm(),
    "namm, few queries": random_namm(num_observed_queries=16),
    "namm, every second segment": random_namm(num_spare_slots=32),
}


@pytest.fixture(scope="module")
def parts(tiny_model: Path, tokenizer: Tokenizer) -> tuple[Decoder, Tokenizer]:
    return Decoder.load(tiny_model), tokenizer


def a_fold(
    parts: tuple[Decoder, Tokenizer],
    policy: EvictionPolicy,
    state: MemoryState | None = None,
    manifest: pb.Manifest | None = None,
) -> StreamFold:
    state = state or parts[0].new_state(SETTINGS, policy)
    return StreamFold(*parts, policy, state, manifest or pb.Manifest(), max_uncommitted_segments=1 << 20)


def take(fold: StreamFold, data: bytes) -> list[MemoryState]:
    """Fold what is full of `data`; a copy of the state after each turn."""
    fold.offer(pb.ReadLogResponse(offset=fold.read_offset, data=data))
    return [fold.boundary_copy().state for _ in fold.fold()]


def restored(parts: tuple[Decoder, Tokenizer], policy: EvictionPolicy, snapshot: Snapshot) -> StreamFold:
    decoder, _ = parts
    chunks = [data for _, data in snapshot.chunks]
    state = state_codec.decode(chunks, decoder.config, SETTINGS, decoder.dtypes)
    return a_fold(parts, policy, state, snapshot.manifest)


@pytest.mark.parametrize("policy", ALL.values(), ids=ALL)
def test_a_streamed_text_stays_within_the_budget(parts: tuple[Decoder, Tokenizer], policy: EvictionPolicy) -> None:
    fold = a_fold(parts, policy)

    states = take(fold, TEXT)

    assert len(states) > 10
    assert max(state.num_slots for state in states) <= SETTINGS.kv_budget_tokens
    assert states[-1].num_tokens > 10 * SETTINGS.kv_budget_tokens
    assert (states[-1].positions_LHS[..., :4] == torch.arange(4)).all()
    assert states[-1].resident_bytes == states[0].resident_bytes
    assert [run.policy for run in fold.snapshot().manifest.decisions] == [policy.name]


@pytest.mark.parametrize("policy", ALL.values(), ids=ALL)
def test_a_stream_that_goes_on_from_a_checkpoint_ends_in_the_same_state(
    parts: tuple[Decoder, Tokenizer], policy: EvictionPolicy
) -> None:
    whole = a_fold(parts, policy)
    take(whole, TEXT)
    first = a_fold(parts, policy)
    take(first, TEXT[: len(TEXT) // 2])
    snapshot = first.snapshot()

    second = restored(parts, policy, snapshot)
    take(second, TEXT[snapshot.manifest.applied_offset :])

    assert snapshot.manifest.encoding_version == (1 if policy.statistics is None else 2)
    assert second.snapshot().manifest.state_digest == whole.snapshot().manifest.state_digest


def test_a_stream_ends_where_positions_do_and_stays_as_it_was(parts: tuple[Decoder, Tokenizer]) -> None:
    state = parts[0].new_state(SETTINGS, SinksRecent())
    state.num_tokens = MAX_TOKENS - SETTINGS.segment_length
    fold = a_fold(parts, SinksRecent(), state)

    with pytest.raises(FailedPrecondition, match="a stream ends at 2,147,483,648 tokens"):
        take(fold, TEXT)

    (position,) = fold.boundary_copy().state.positions_LHS[..., -1].unique().tolist()
    assert position == MAX_TOKENS - 1
    assert fold.num_tokens == MAX_TOKENS
    assert fold.snapshot().manifest.tokens == MAX_TOKENS


def test_policies_end_in_different_states(parts: tuple[Decoder, Tokenizer]) -> None:
    digests = set()
    for policy in ALL.values():
        fold = a_fold(parts, policy)
        take(fold, TEXT)
        digests.add(fold.snapshot().manifest.state_digest)

    assert len(digests) == len(ALL)


def test_an_answer_decoded_over_a_boundary_follows_the_policy(parts: tuple[Decoder, Tokenizer]) -> None:
    decoder, _ = parts
    policy = random_namm()
    fold = a_fold(parts, policy)
    take(fold, TEXT)
    before = fold.snapshot().manifest.state_digest
    copy = fold.accepted_copy()

    logits = decoder.prefill(copy.state, [*copy.tail, 5], policy, logits="last")
    for _ in range(100):
        assert logits is not None
        logits = decoder.decode([copy.state], [int(logits.argmax())], policy)[0]
        assert copy.state.num_slots <= SETTINGS.kv_budget_tokens + SETTINGS.segment_length

    assert logits is not None
    assert logits.isfinite().all()
    assert fold.snapshot().manifest.state_digest == before


def test_a_fallback_keeps_the_statistics_going(parts: tuple[Decoder, Tokenizer]) -> None:
    policy = random_namm()
    plain, fallback = a_fold(parts, SinksRecent()), a_fold(parts, Fallback("late", policy))
    *_, without = take(plain, TEXT)

    *_, state = take(fallback, TEXT)

    assert torch.equal(state.keys_LHSD, without.keys_LHSD)
    assert state.statistics_name == policy.statistics.name
    assert state.statistics_LHSB is not None
    assert state.statistics_LHSB[:, :, : SETTINGS.kv_budget_tokens - 1].any(dim=-1).all()


def test_a_thousand_changes_of_policy_leave_a_manifest_that_can_be_committed(parts: tuple[Decoder, Tokenizer]) -> None:
    fold = a_fold(parts, SinksRecent())
    fold.choose_policy = lambda segment: SinksRecent(f"sinks-recent/{segment}")
    ids = np.zeros(32 * 1100, dtype="<u4").tobytes()
    fold.offer(pb.ReadLogResponse(offset=0, data=ids, kind=api.RECORD_KIND_TOKEN_IDS))

    num_segments = sum(1 for _ in fold.fold())

    runs = fold.snapshot().manifest.decisions
    assert num_segments == 1100
    assert len(runs) == 1000 < MAX_DECISIONS
    assert (runs[0].policy, runs[-1].policy) == ("sinks-recent/100", "sinks-recent/1099")
