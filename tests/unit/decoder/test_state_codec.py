import hashlib
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch

from eunoe.decoder.config import CompressiveMemoryConfig, DecoderConfig, Dtypes
from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MemorySettings, MemoryState
from eunoe.decoder.state_codec import CHUNK_BYTES, VERSIONS, decode, encode, state_digest, version
from eunoe.decoder.tiny import tiny_config
from eunoe.eviction import DEFAULT_POLICY, EvictionPolicy, HeavyHitter
from eunoe.runtime.errors import CorruptState, UnknownVersion

SETTINGS = MemorySettings(kv_budget_tokens=48, segment_length=16)
DTYPES = Dtypes(weights=torch.bfloat16, kv=torch.bfloat16, compute=torch.float32)


GOLDEN_CONFIG = tiny_config(num_layers=1)
COMPRESSIVE_CONFIG = tiny_config(compressive_memory=CompressiveMemoryConfig(has_write_gate=True))


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
        with pytest.raises((CorruptState, UnknownVersion)):
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


@pytest.mark.parametrize(
    ("kv", "positions", "digest"),
    [
        (torch.bfloat16, "compact", "7a4cb2255ca7d92fef27d20c2d9d8407"),
        (torch.float32, "original", "b63a2aa9fe7af65453f9597504e86d70"),
    ],
    ids=["bfloat16", "float32"],
)
def test_version_1_reads_and_is_written_as_ever(
    golden: Callable[[str, bytes], bytes], kv: torch.dtype, positions: Literal["original", "compact"], digest: str
) -> None:
    settings = MemorySettings(kv_budget_tokens=4, segment_length=2, num_sink_tokens=1, positions=positions)
    state = a_known_state(settings, kv)

    (written,) = encode(state)
    kind = str(kv).removeprefix("torch.")
    chunk = golden(f"memory_state_1_{kind}.bin", written)
    restored = decode([chunk], GOLDEN_CONFIG, settings, Dtypes(weights=kv, kv=kv, compute=torch.float32))

    assert version(state) == 1
    assert (restored.num_tokens, restored.num_slots) == (6, 3)
    for name in ("keys_LHSD", "values_LHSD", "positions_LHS", "token_ids_LHS"):
        assert torch.equal(getattr(restored, name), getattr(state, name)), name
    assert state_digest(restored, 7, 1) == digest


def test_version_3_reads_and_is_written_as_ever(golden: Callable[[str, bytes], bytes]) -> None:
    config = replace(COMPRESSIVE_CONFIG, num_layers=1, kv_source=())
    settings = MemorySettings(kv_budget_tokens=4, segment_length=2, num_sink_tokens=1)
    state = a_known_state(settings, torch.float32, config)
    for tensor, step in zip(state.compressed, (0.125, 0.5), strict=True):
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) * step)

    (written,) = encode(state)
    restored = decode([golden("memory_state_3_float32.bin", written)], config, settings, Dtypes.float32())

    assert version(state) == 3
    assert encode(restored) == [written]
    for read_back, tensor in zip(restored.compressed, state.compressed, strict=True):
        assert torch.equal(read_back, tensor)
    assert state_digest(restored, 7, 1) == "c1060a7564ea1b1c007cbfbea2bc73bf"


def a_known_state(settings: MemorySettings, kv: torch.dtype, config: DecoderConfig = GOLDEN_CONFIG) -> MemoryState:
    """Three slots that no arithmetic was needed for: whole numbers, and quarters up to -47.75."""
    state = MemoryState(config, settings, kv)
    state.num_tokens, state.num_slots = 6, 3
    numbers = torch.arange(state.keys_LHSD.numel()).view(state.keys_LHSD.shape)
    state.keys_LHSD.copy_(numbers)
    state.values_LHSD.copy_(-numbers / 4 - 24)
    state.positions_LHS.copy_(torch.tensor([[[0, 4, 5], [0, 3, 5]]]))
    state.token_ids_LHS.copy_(torch.tensor([[[10, 511, 7], [10, 9, 7]]]))
    return state


def test_another_version_is_named_and_so_is_this_one(decoder: Decoder) -> None:
    (chunk,) = encode(a_state(decoder, 5))
    later = chunk[:8] + struct.pack("<H", VERSIONS[-1] + 1) + chunk[10:40]

    with pytest.raises(UnknownVersion) as error:
        read(decoder, [later + bytes(200)])

    assert (error.value.found, error.value.known) == (VERSIONS[-1] + 1, VERSIONS[-1])
    assert f"version {VERSIONS[-1] + 1}" in error.value.message
    assert f"versions up to {VERSIONS[-1]} are read" in error.value.message


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


@pytest.mark.parametrize("policy", [DEFAULT_POLICY, HeavyHitter()], ids=["no statistics", "statistics"])
def test_a_compressive_memory_is_part_of_the_state(policy: EvictionPolicy) -> None:
    compressive = Decoder.random(COMPRESSIVE_CONFIG, seed=0, dtypes=DTYPES)
    state = compressive.new_state(SETTINGS, policy)
    compressive.prefill(state, np.random.default_rng(0).integers(0, 512, 100), policy)

    restored = read(compressive, encode(state))

    assert version(state) == 3
    assert encode(restored) == encode(state)
    assert restored.normalizer is not None
    assert (restored.normalizer > 0).all()
    for each in (state, restored):
        compressive.prefill(each, np.arange(60), policy)
    assert state_digest(restored, 0, 0) == state_digest(state, 0, 0)
    restored.normalizer[1, 0, 3] += 1
    assert state_digest(restored, 0, 0) != state_digest(state, 0, 0)


def test_a_state_with_a_compressive_memory_is_none_of_a_plain_llama(decoder: Decoder) -> None:
    compressive = Decoder.random(COMPRESSIVE_CONFIG, seed=0, dtypes=DTYPES)

    with pytest.raises(CorruptState, match="version 3"):
        read(decoder, encode(a_state(compressive, 5)))
    with pytest.raises(CorruptState, match="version 1"):
        read(compressive, encode(a_state(decoder, 5)))


@pytest.mark.parametrize("config", [tiny_config(), COMPRESSIVE_CONFIG], ids=["plain", "compressive"])
def test_every_flipped_byte_of_a_state_with_statistics_is_found(config: DecoderConfig) -> None:
    decoder, policy = Decoder.random(config, seed=0, dtypes=DTYPES), HeavyHitter()
    state = decoder.new_state(SETTINGS, policy)
    decoder.prefill(state, range(5), policy)
    (chunk,) = encode(state)

    for index in [*range(180), *range(180, len(chunk), 97), len(chunk) - 1]:
        damaged = bytearray(chunk)
        damaged[index] ^= 0x10
        with pytest.raises((CorruptState, UnknownVersion)):
            read(decoder, [bytes(damaged)])
    for length in range(0, 180, 7):
        with pytest.raises(CorruptState):
            read(decoder, [chunk[:length]])
