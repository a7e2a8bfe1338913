import hashlib

import numpy as np
import pytest
import torch

from eunoe.decoder.config import Dtypes
from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MemorySettings, MemoryState
from eunoe.decoder.state_codec import CHUNK_BYTES, decode, encode, state_digest, version
from eunoe.decoder.tiny import tiny_config
from eunoe.eviction import DEFAULT_POLICY, HeavyHitter
from eunoe.runtime.errors import CorruptState

SETTINGS = MemorySettings(kv_budget_tokens=48, segment_length=16)
DTYPES = Dtypes(weights=torch.bfloat16, kv=torch.bfloat16, compute=torch.float32)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder.random(tiny_config(), seed=0, dtypes=DTYPES)


def a_state(decoder: Decoder, num_tokens: int = 100, settings: MemorySettings = SETTINGS) -> MemoryState:
    state = decoder.new_state(settings)
    decoder.prefill(state, np.random.default_rng(0).integers(0, 512, num_tokens), DEFAULT_POLICY)
    return state


def read(decoder: Decoder, chunks: list[bytes], settings: MemorySettings = SETTINGS) -> MemoryState:
    return decode(chunks, decoder.config, settings, decoder.dtypes)


@pytest.mark.parametrize("num_tokens", [0, 1, 16, 100])
def test_a_state_survives_bit_for_bit(decoder: Decoder, num_tokens: int) -> None:
    state = a_state(decoder, num_tokens)

    restored = read(decoder, encode(state))

    assert (restored.num_tokens, restored.num_slots) == (state.num_tokens, state.num_slots)
    assert encode(restored) == encode(state)
    assert state_digest(restored, 7, 1) == state_digest(state, 7, 1)


def test_a_restored_state_goes_on_as_if_nothing_had_happened(decoder: Decoder) -> None:
    state = a_state(decoder, 100)
    restored = read(decoder, encode(state))

    for each in (state, restored):
        decoder.prefill(each, np.arange(60), DEFAULT_POLICY)

    assert state_digest(restored, 0, 0) == state_digest(state, 0, 0)


def test_chunks_are_at_most_one_mebibyte() -> None:
    decoder = Decoder.random(tiny_config(num_layers=8), seed=0, dtypes=DTYPES)
    settings = MemorySettings(kv_budget_tokens=2048, segment_length=512)

    chunks = encode(a_state(decoder, 2048, settings))

    assert len(chunks) > 1
    assert [len(chunk) for chunk in chunks[:-1]] == [CHUNK_BYTES] * (len(chunks) - 1)
    assert read(decoder, chunks, settings).num_slots == 2048


def test_every_flipped_byte_is_found(decoder: Decoder) -> None:
    (chunk,) = encode(a_state(decoder, 5))

    for index in [*range(120), *range(120, len(chunk), 97), len(chunk) - 1]:
        damaged = bytearray(chunk)
        damaged[index] ^= 0x10
        with pytest.raises(CorruptState):
            read(decoder, [bytes(damaged)])


def test_torn_chunks_are_found(decoder: Decoder) -> None:
    (chunk,) = encode(a_state(decoder, 5))

    for torn in ([], [b""], [chunk[:50]], [chunk[:-1]], [chunk, b"\0"], [chunk, chunk]):
        with pytest.raises(CorruptState):
            read(decoder, torn)


def test_a_state_of_other_settings_or_shape_is_refused(decoder: Decoder) -> None:
    chunks = encode(a_state(decoder))

    with pytest.raises(CorruptState, match="shape"):
        read(decoder, chunks, MemorySettings(kv_budget_tokens=64, segment_length=16))
    with pytest.raises(CorruptState, match="shape"):
        decode(chunks, tiny_config(num_layers=3), SETTINGS, decoder.dtypes)
    with pytest.raises(CorruptState, match="shape"):
        decode(chunks, decoder.config, SETTINGS, Dtypes.float32())


def test_the_digest_does_not_depend_on_the_capacity(decoder: Decoder) -> None:
    digests = {
        state_digest(a_state(decoder, 32, MemorySettings(kv_budget_tokens=budget, segment_length=16)), 0, 0)
        for budget in (48, 480)
    }

    assert len(digests) == 1


def test_the_digest_covers_the_place_in_the_log(decoder: Decoder) -> None:
    state = a_state(decoder)

    assert len({state_digest(state, *place) for place in ((0, 0), (1, 0), (0, 1))}) == 3


def test_a_state_without_statistics_is_encoded_as_ever(decoder: Decoder) -> None:
    state = MemoryState(decoder.config, MemorySettings(kv_budget_tokens=8, segment_length=4), torch.bfloat16)
    numbers = torch.arange(7 * 16.0).view(7, 16).expand(2, 7, 16)
    for layer in range(2):
        state.write(layer, numbers + layer, -numbers)
    state.append(torch.arange(7, dtype=torch.int32))

    encoded = hashlib.sha256(b"".join(encode(state))).hexdigest()

    assert version(state) == 1
    assert encoded == "cd8c95d452ebdff7740bf4767a1db94819ef2083030295edf6a481d2698d127d"
    assert state_digest(state, 5, 1) == "49b78edde8f632e6867d80bcee11da41"


def test_statistics_are_part_of_the_state(decoder: Decoder) -> None:
    policy = HeavyHitter()
    state = decoder.new_state(SETTINGS, policy)
    decoder.prefill(state, np.random.default_rng(0).integers(0, 512, 100), policy)

    chunks = encode(state)
    restored = read(decoder, chunks)

    assert version(state) == 2
    assert restored.statistics_name == policy.statistics.name
    assert restored.statistics_LHSB is not None
    assert state.statistics_LHSB is not None
    assert torch.equal(restored.statistics_LHSB, state.statistics_LHSB)
    assert encode(restored) == chunks
    assert len(b"".join(chunks)) > state.num_slots * 4 * (2 * 16 * 2 + 8 + 4)
    state.statistics_LHSB[0, 1, 2] += 1
    assert state_digest(state, 0, 0) != state_digest(restored, 0, 0)


def test_every_flipped_byte_of_a_state_with_statistics_is_found(decoder: Decoder) -> None:
    policy = HeavyHitter()
    state = decoder.new_state(SETTINGS, policy)
    decoder.prefill(state, range(5), policy)
    (chunk,) = encode(state)

    for index in [*range(180), *range(180, len(chunk), 97), len(chunk) - 1]:
        damaged = bytearray(chunk)
        damaged[index] ^= 0x10
        with pytest.raises(CorruptState):
            read(decoder, [bytes(damaged)])
    for length in range(0, 180, 7):
        with pytest.raises(CorruptState):
            read(decoder, [chunk[:length]])
