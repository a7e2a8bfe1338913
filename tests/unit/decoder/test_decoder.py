import numpy as np
import pytest
import torch

from eunoe.decoder.config import Dtypes
from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MemorySettings, MemoryState
from eunoe.decoder.state_codec import state_digest
from eunoe.decoder.tiny import tiny_config
from eunoe.eviction import DEFAULT_POLICY

SETTINGS = MemorySettings(kv_budget_tokens=48, segment_length=16, num_sink_tokens=4)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    """The tiny model in the default binding."""
    return Decoder.random(tiny_config(), seed=0)


@pytest.fixture(scope="module")
def exact_decoder() -> Decoder:
    """The tiny model, everything in float32."""
    return Decoder.random(tiny_config(), seed=0, dtypes=Dtypes.float32())


def some_tokens(num_tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 512, num_tokens)


def a_state(decoder: Decoder, tokens: np.ndarray, settings: MemorySettings = SETTINGS) -> MemoryState:
    state = decoder.new_state(settings)
    decoder.prefill(state, tokens, DEFAULT_POLICY)
    return state


def test_logits_do_not_depend_on_the_segment_length(exact_decoder: Decoder) -> None:
    tokens = some_tokens(100)

    outputs = []
    for segment_length in (1, 37, 100):
        state = exact_decoder.new_state(MemorySettings(kv_budget_tokens=512, segment_length=segment_length))
        outputs.append(exact_decoder.prefill(state, tokens, DEFAULT_POLICY, logits="all"))

    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(outputs[2], outputs[0], atol=1e-4, rtol=0)


def test_the_same_tokens_fold_to_the_same_digest_however_calls_cut_them_at_boundaries(decoder: Decoder) -> None:
    tokens = some_tokens(160)
    whole = a_state(decoder, tokens)

    for cuts in ([16, 48], [80], [16, 32, 48, 64, 144]):
        state = decoder.new_state(SETTINGS)
        for part in np.split(tokens, cuts):
            decoder.prefill(state, part, DEFAULT_POLICY)

        assert state_digest(state, 0, 0) == state_digest(whole, 0, 0)


@pytest.mark.parametrize("logits", ["last", "all"])
def test_asking_for_logits_does_not_change_the_state(decoder: Decoder, logits: str) -> None:
    tokens = some_tokens(96)
    state = decoder.new_state(SETTINGS)

    decoder.prefill(state, tokens, DEFAULT_POLICY, logits=logits)  # type: ignore[arg-type]

    assert state_digest(state, 0, 0) == state_digest(a_state(decoder, tokens), 0, 0)


def test_last_logits_are_the_last_row_of_all_logits(exact_decoder: Decoder) -> None:
    tokens = some_tokens(50)

    last = exact_decoder.prefill(exact_decoder.new_state(SETTINGS), tokens, DEFAULT_POLICY, logits="last")
    all_logits = exact_decoder.prefill(exact_decoder.new_state(SETTINGS), tokens, DEFAULT_POLICY, logits="all")

    assert last is not None
    assert all_logits is not None
    assert all_logits.shape == (50, 512)
    torch.testing.assert_close(last, all_logits[-1], atol=1e-5, rtol=0)


def test_slots_never_exceed_budget_and_segment(decoder: Decoder) -> None:
    state = decoder.new_state(SETTINGS)

    for token in some_tokens(100):
        decoder.decode([state], [int(token)], DEFAULT_POLICY)

        assert state.num_slots <= SETTINGS.kv_budget_tokens + SETTINGS.segment_length
        if state.num_tokens % SETTINGS.segment_length == 0:
            assert state.num_slots <= SETTINGS.kv_budget_tokens


def test_sinks_and_the_newest_tokens_stay(decoder: Decoder) -> None:
    tokens = some_tokens(160)

    state = a_state(decoder, tokens)

    kept = [*range(4), *range(160 - 44, 160)]
    assert (state.positions_LHS == torch.tensor(kept)).all()
    assert (state.token_ids_LHS == torch.tensor(tokens[kept])).all()


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_decoding_a_token_gives_what_folding_it_gives(exact_decoder: Decoder, positions: str) -> None:
    settings = MemorySettings(kv_budget_tokens=48, segment_length=16, positions=positions)  # type: ignore[arg-type]
    tokens = some_tokens(130)
    folded = a_state(exact_decoder, tokens[:100], settings)
    decoded = folded.copy()

    for token in tokens[100:]:
        expected = exact_decoder.prefill(folded, [token], DEFAULT_POLICY, logits="last")
        got = exact_decoder.decode([decoded], [int(token)], DEFAULT_POLICY)[0]

        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert torch.equal(folded.positions_LHS, decoded.positions_LHS)


@pytest.mark.parametrize("num_streams", [1, 2, 3, 5, 16])
def test_streams_decoded_together_get_what_each_gets_alone(exact_decoder: Decoder, num_streams: int) -> None:
    states = [a_state(exact_decoder, some_tokens(3 + 9 * index, seed=index)) for index in range(num_streams)]
    alone = [exact_decoder.decode([state.copy()], [7], DEFAULT_POLICY)[0] for state in states]

    together = exact_decoder.decode(states, [7] * num_streams, DEFAULT_POLICY)

    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=0)


def test_original_and_compact_positions_are_equal_until_the_first_eviction(exact_decoder: Decoder) -> None:
    compact = MemorySettings(kv_budget_tokens=48, segment_length=16, positions="compact")
    original = MemorySettings(kv_budget_tokens=48, segment_length=16, positions="original")
    tokens = some_tokens(70)

    logits = [
        exact_decoder.prefill(exact_decoder.new_state(settings), tokens, DEFAULT_POLICY, logits="all")
        for settings in (compact, original)
    ]

    assert logits[0] is not None
    assert logits[1] is not None
    # The window of 48 overflows after token 64.
    assert torch.equal(logits[0][:64], logits[1][:64])
    assert not torch.allclose(logits[0][64:], logits[1][64:], atol=1e-3)


def test_original_positions_see_evicted_tokens_as_a_gap(exact_decoder: Decoder) -> None:
    """With one layer a slot depends on its token alone, so a window is worth what its tokens are at their places."""
    decoder = Decoder.random(tiny_config(num_layers=1), seed=0, dtypes=Dtypes.float32())
    settings = MemorySettings(kv_budget_tokens=32, segment_length=16, num_sink_tokens=0, positions="original")
    tokens = some_tokens(48)
    evicted = a_state(decoder, tokens, settings)
    fresh = decoder.new_state(settings)
    decoder.prefill(fresh, tokens[16:], DEFAULT_POLICY)

    # Rotary attention sees distances only, so 16 tokens that are gone from the front shift nothing.
    expected = decoder.prefill(fresh, [3], DEFAULT_POLICY, logits="last")
    got = decoder.prefill(evicted, [3], DEFAULT_POLICY, logits="last")

    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_a_copy_is_independent(decoder: Decoder) -> None:
    state = a_state(decoder, some_tokens(90))
    before = state_digest(state, 0, 0)

    copy = state.copy()
    decoder.prefill(copy, some_tokens(64, seed=1), DEFAULT_POLICY)

    assert state_digest(state, 0, 0) == before
    decoder.prefill(state, some_tokens(64, seed=1), DEFAULT_POLICY)
    assert state_digest(state, 0, 0) == state_digest(copy, 0, 0)


def test_decoding_on_a_copy_leaves_nothing_behind(decoder: Decoder) -> None:
    tokens = some_tokens(160)
    state = a_state(decoder, tokens[:96])
    for token in range(5):
        decoder.decode([state.copy()], [token], DEFAULT_POLICY)

    decoder.prefill(state, tokens[96:], DEFAULT_POLICY)

    assert state_digest(state, 0, 0) == state_digest(a_state(decoder, tokens), 0, 0)


def test_tokens_outside_the_vocabulary_are_refused(decoder: Decoder) -> None:
    state = decoder.new_state(SETTINGS)

    with pytest.raises(ValueError, match=r"not all in 0\.\.511"):
        decoder.prefill(state, [1, 512], DEFAULT_POLICY)
    with pytest.raises(ValueError, match=r"not all in 0\.\.511"):
        decoder.decode([state], [-1], DEFAULT_POLICY)
    assert state.num_tokens == 0


def test_a_state_cannot_be_decoded_twice_in_a_step(decoder: Decoder) -> None:
    state = decoder.new_state(SETTINGS)

    with pytest.raises(ValueError, match="different states"):
        decoder.decode([state, state], [1, 1], DEFAULT_POLICY)


def test_no_token_has_no_logits(decoder: Decoder) -> None:
    state = decoder.new_state(SETTINGS)

    assert decoder.prefill(state, [], DEFAULT_POLICY) is None
    with pytest.raises(ValueError, match="no logits"):
        decoder.prefill(state, [], DEFAULT_POLICY, logits="last")


def test_arithmetic_in_bfloat16_agrees_with_float32_to_its_precision() -> None:
    """What machines with AMX run, wherever this test runs."""
    bfloat16 = Dtypes(weights=torch.bfloat16, kv=torch.bfloat16, compute=torch.bfloat16)
    float32 = Dtypes(weights=torch.bfloat16, kv=torch.bfloat16, compute=torch.float32)
    tokens = some_tokens(100)

    outputs = []
    for dtypes in (bfloat16, float32):
        decoder = Decoder.random(tiny_config(), seed=0, dtypes=dtypes)
        outputs.append(decoder.prefill(decoder.new_state(SETTINGS), tokens, DEFAULT_POLICY, logits="all"))

    assert outputs[0] is not None
    assert outputs[1] is not None
    torch.testing.assert_close(outputs[0], outputs[1], atol=0.25, rtol=0)
    assert (outputs[0].argmax(-1) == outputs[1].argmax(-1)).float().mean() > 0.9


def test_other_weights_have_another_digest() -> None:
    digests = {Decoder.random(tiny_config(), seed=seed).model_digest for seed in (0, 0, 1)}

    assert len(digests) == 2
