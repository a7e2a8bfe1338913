"""Memory states as bytes: a checkpoint's chunks, and the digest that two equal states share.

Encoding, version 1: a header, then the live slots of keys, values, positions and token ids, each row-major and
little-endian, cut into chunks of at most 1 MiB. The header holds its own digest and that of everything behind it. Every
version begins with magic and version.

Version 2 is that of states with a policy's statistics: their name and bytes a slot follow the header, under its digest;
the statistics of live slots come last. A state without any is written in version 1, the same bytes as ever.

Version 3 is that of states with a compressive memory: a version 2 whose statistics may be none (no name, 0 bytes), and
behind all slots M and z.
"""

import struct
from collections.abc import Sequence

import torch
import xxhash

from eunoe.decoder.config import DecoderConfig, Dtypes
from eunoe.decoder.memory_state import MemorySettings, MemoryState
from eunoe.runtime.errors import CorruptState, UnknownVersion

CHUNK_BYTES = 1 << 20
_MAGIC = b"EUNOEMEM"
_VERSION_PLAIN, _VERSION_STATISTICS, _VERSION_COMPRESSED = 1, 2, 3
VERSIONS = (_VERSION_PLAIN, _VERSION_STATISTICS, _VERSION_COMPRESSED)
# Magic, version, KV dtype, positions, KV source layers, KV heads, head dim, budget, segment length, sink tokens,
# tokens, slots, payload bytes, payload digest; then the digest of all these.
_HEADER = struct.Struct("<8sHBBIIIIIIQIQ16s")
# Name, padded with zeros, and bytes a slot.
_STATISTICS = struct.Struct("<48sI")
_MAX_STATISTICS_BYTES = 1024
_DIGEST_BYTES = 16
_KV_DTYPES = (torch.bfloat16, torch.float32)
_POSITIONS = ("original", "compact")


def encode(state: MemoryState) -> list[bytes]:
    """A state as chunks of at most 1 MiB, in order. Independent of slab capacity and machine."""
    payload = b"".join(map(_bytes_of, _content(state)))
    fields = (*_identity(state.keys, state.settings), state.num_tokens, state.num_slots)
    header = _HEADER.pack(_MAGIC, version(state), *fields, len(payload), xxhash.xxh3_128_digest(payload))
    if version(state) != _VERSION_PLAIN:
        num_bytes = 0 if state.statistics is None else state.statistics.shape[-1]
        header += _STATISTICS.pack(state.statistics_name.encode(), num_bytes)
    whole = memoryview(header + xxhash.xxh3_128_digest(header) + payload)
    return [bytes(whole[start : start + CHUNK_BYTES]) for start in range(0, len(whole), CHUNK_BYTES)]


def version(state: MemoryState) -> int:
    """The encoding that `encode` writes a state in."""
    if state.compressed:
        return _VERSION_COMPRESSED
    return _VERSION_PLAIN if state.statistics is None else _VERSION_STATISTICS


def decode(chunks: Sequence[bytes], config: DecoderConfig, settings: MemorySettings, dtypes: Dtypes) -> MemoryState:
    """The state that `encode` was given.

    Raises:
        UnknownVersion: If another version of this encoding wrote them.
        CorruptState: If the chunks are torn, altered, or of another shape than config, settings and dtypes say.
    """
    whole = bytearray().join(chunks)
    if len(whole) < _HEADER.size + _DIGEST_BYTES:
        raise CorruptState(f"{len(whole)} bytes are no memory state")
    magic, found, *identity, num_tokens, num_slots, payload_bytes, payload_digest = _HEADER.unpack_from(whole)
    if magic == _MAGIC and found not in VERSIONS:
        raise UnknownVersion(
            f"the memory state has version {found}, and versions up to {VERSIONS[-1]} are read here",
            found=found,
            known=VERSIONS[-1],
        )
    header_bytes = _HEADER.size + (_STATISTICS.size if found != _VERSION_PLAIN else 0)
    payload_start = header_bytes + _DIGEST_BYTES
    header = bytes(whole[:header_bytes])
    if magic != _MAGIC or xxhash.xxh3_128_digest(header) != whole[header_bytes:payload_start]:
        raise CorruptState("the header of a memory state is damaged")
    state = MemoryState(config, settings, dtypes.kv)
    if tuple(identity) != _identity(state.keys, settings):
        raise CorruptState(f"a memory state of shape {identity} is not one of {_identity(state.keys, settings)}")
    if (found == _VERSION_COMPRESSED) != bool(state.compressed):
        raise CorruptState(f"a memory state of version {found} is not one of {config.name}")
    if num_slots > min(settings.capacity, num_tokens):
        raise CorruptState(f"{num_slots} slots of {num_tokens} tokens do not fit in {settings.capacity}")
    if found != _VERSION_PLAIN:
        state.set_statistics(*_statistics(header, may_be_none=found == _VERSION_COMPRESSED))
    state.num_tokens, state.num_slots = num_tokens, num_slots
    content = _content(state)
    sizes = [tensor.numel() * tensor.element_size() for tensor in content]
    payload = memoryview(whole)[payload_start:]
    if not len(payload) == payload_bytes == sum(sizes):
        raise CorruptState(f"a memory state of {sum(sizes)} bytes came as {len(payload)}")
    if xxhash.xxh3_128_digest(payload) != payload_digest:
        raise CorruptState("the bytes of a memory state do not have its digest")
    for tensor, size in zip(content, sizes, strict=True):
        if size:
            tensor.copy_(torch.frombuffer(payload[:size], dtype=tensor.dtype).view(tensor.shape))
        payload = payload[size:]
    return state


def state_digest(state: MemoryState, applied_offset: int, applied_pretoken_tokens: int) -> str:
    """Hex XXH3-128 of the canonical state and of the place in the log that it belongs to.

    Args:
        state: Only live slots count, so the digest does not depend on the slabs' capacity.
        applied_offset: Bytes of the log below the open pre-token.
        applied_pretoken_tokens: Tokens of the open pre-token that are folded.
    """
    shape = (state.keys.shape[0], state.keys.shape[1], state.keys.shape[3], _KV_DTYPES.index(state.keys.dtype))
    place = (state.num_tokens, state.num_slots, applied_offset, applied_pretoken_tokens)
    hasher = xxhash.xxh3_128(struct.pack("<4I4Q", *shape, *place))
    hasher.update(state.statistics_name.encode())
    for tensor in _content(state):
        hasher.update(_bytes_of(tensor))
    return hasher.hexdigest()


def _content(state: MemoryState) -> tuple[torch.Tensor, ...]:
    """Live slots, then M and z."""
    slabs = (state.keys_LHSD, state.values_LHSD, state.positions_LHS, state.token_ids_LHS)
    statistics = () if state.statistics_LHSB is None else (state.statistics_LHSB,)
    return (*slabs, *statistics, *state.compressed)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data.cast("B") if tensor.numel() else memoryview(b"")


def _statistics(header: bytes, *, may_be_none: bool) -> tuple[str, int]:
    """Name and bytes a slot, of a header of version 2 or 3."""
    padded, num_bytes = _STATISTICS.unpack_from(header, _HEADER.size)
    try:
        name = padded.rstrip(b"\0").decode()
    except UnicodeDecodeError as error:
        raise CorruptState("the name of a memory state's statistics is no text") from error
    if may_be_none and not name and not num_bytes:
        return name, num_bytes
    if not name or not 0 < num_bytes <= _MAX_STATISTICS_BYTES:
        raise CorruptState(f"statistics {name!r} of {num_bytes} bytes a slot cannot be")
    return name, num_bytes


def _identity(keys: torch.Tensor, settings: MemorySettings) -> tuple[int, ...]:
    """What a header says of dtype, shape and settings."""
    num_layers, num_heads, _, head_dim = keys.shape
    return (
        _KV_DTYPES.index(keys.dtype),
        _POSITIONS.index(settings.positions),
        num_layers,
        num_heads,
        head_dim,
        settings.kv_budget_tokens,
        settings.segment_length,
        settings.num_sink_tokens,
    )
