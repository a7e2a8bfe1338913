"""One decode step of a whole Llama-family decoder, for up to 16 streams, on the CPU.

Decoding reads every weight and every live slot once a token, so its limit is the memory's read bandwidth. The fast
path is one program for the whole step: weights and slots stay in bfloat16 in memory and are widened to float32 in
registers, all sums are float32, every weight is read once for all streams, and nothing is dispatched by Python between
the first layer and the logits. A step equals `decode_step_reference` up to the rounding of float32 sums.

Shape suffixes: B stream, L layer, H KV head, S slot, D head dim, P pair of rotary dims (D / 2), V vocabulary.
"""

import ctypes
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numba
import numpy as np
import torch

from eunoe_kernels import _decode_program, _vector_code
from eunoe_kernels._decode_program import CHUNK_SLOTS, HEAD_LANES, SIZES, decode_program

MAX_STREAMS = 16


class LayerWeights(Protocol):
    """One layer's tensors, contiguous, all of one dtype."""

    @property
    def attention_norm(self) -> torch.Tensor: ...  # [dim]
    @property
    def query_key_value(self) -> torch.Tensor: ...  # [(num_query_heads + 2 num_kv_heads) head_dim, dim]
    @property
    def attention_output(self) -> torch.Tensor: ...  # [dim, num_query_heads head_dim]
    @property
    def ffn_norm(self) -> torch.Tensor: ...  # [dim]
    @property
    def gate_up(self) -> torch.Tensor: ...  # [2 ffn_dim, dim]
    @property
    def ffn_down(self) -> torch.Tensor: ...  # [dim, ffn_dim]


class DecodeWeights(Protocol):
    """A decoder's tensors, contiguous, all float32 or all bfloat16."""

    @property
    def embedding(self) -> torch.Tensor: ...  # [V, dim]
    @property
    def layers(self) -> Sequence[LayerWeights]: ...
    @property
    def output_norm(self) -> torch.Tensor: ...  # [dim]
    @property
    def output(self) -> torch.Tensor: ...  # [V, dim]


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamSlots:
    """A stream's slabs, [L, H, capacity, D], float32 or bfloat16, contiguous; rotated keys are live like the others."""

    keys: torch.Tensor
    rotated_keys: torch.Tensor
    values: torch.Tensor
    num_slots: int
    """Live slots; the new token is written behind them."""


class DecodeStep:
    """A decode step over fixed weights and a fixed number of threads. Not safe for concurrent calls."""

    def __init__(
        self,
        weights: DecodeWeights,
        *,
        num_query_heads: int,
        num_kv_heads: int,
        head_dim: int,
        norm_eps: float,
        kv_dtype: torch.dtype,
        num_threads: int,
    ) -> None:
        """Keeps references to the weights and copies only the norms.

        Raises:
            ValueError: If a shape or dtype is one that the program does not take.
        """
        vocab_size, dim = weights.embedding.shape
        ffn_dim = weights.layers[0].ffn_down.shape[1]
        if head_dim % 16 or dim % 16 or ffn_dim % 16 or num_query_heads % num_kv_heads:
            raise ValueError(f"{head_dim=}, {dim=} and {ffn_dim=} must be multiples of 16, query heads of KV heads")
        self._weights, self._kv_dtype, self._num_threads = weights, kv_dtype, num_threads
        self._shape = (len(weights.layers), dim, num_query_heads, num_kv_heads, head_dim, ffn_dim, vocab_size)
        matrices: list[torch.Tensor] = []
        for layer in weights.layers:
            matrices += [layer.attention_norm.float(), layer.query_key_value, layer.attention_output]
            matrices += [layer.ffn_norm.float(), layer.gate_up, layer.ffn_down]
        matrices += [weights.output_norm.float(), weights.output]
        large = [matrix for matrix in matrices if matrix.dim() == 2]
        if not all(matrix.is_contiguous() and matrix.dtype == weights.output.dtype for matrix in large):
            raise ValueError("weights must be contiguous and of one dtype")
        # Held only so that the addresses stay valid: the float32 norms may belong to nobody else.
        self._matrices = matrices
        self._addresses = np.array([matrix.data_ptr() for matrix in matrices], dtype=np.int64)
        self._norm_eps = np.array([norm_eps], dtype=np.float32)
        self._program = _compiled_program(weights.output.dtype, kv_dtype)
        widest = max(dim, num_query_heads * head_dim)
        scratch = max(
            dim * MAX_STREAMS,
            2 * ffn_dim * MAX_STREAMS,
            96 * MAX_STREAMS,
            HEAD_LANES * (3 * head_dim + CHUNK_SLOTS + 2),
        )
        self._private = torch.empty(num_threads, widest * MAX_STREAMS + scratch + 16)
        self._hidden = torch.zeros(dim * MAX_STREAMS)
        self._qkv = torch.empty((num_query_heads + 2 * num_kv_heads) * head_dim * MAX_STREAMS)
        self._activation = torch.empty(ffn_dim * MAX_STREAMS)

    def __call__(
        self, token_ids: Sequence[int], streams: Sequence[StreamSlots], cosines_BP: torch.Tensor, sines_BP: torch.Tensor
    ) -> torch.Tensor:
        """Run each stream's next token and write its key, rotated key and value at slot `num_slots`.

        Args:
            token_ids: One a stream.
            streams: 1 to 16 streams.
            cosines_BP: Of each new token's rotary angles, float32; `sines_BP` likewise.

        Returns:
            Logits, float32 [B, V].

        Raises:
            ValueError: If the number of streams is wrong, or a slab is full, not contiguous or of another shape.
        """
        _, dim, num_query_heads, num_kv_heads, head_dim, _, vocab_size = self._shape
        num_streams = len(streams)
        if not 1 <= num_streams == len(token_ids) <= MAX_STREAMS:
            raise ValueError(f"{len(token_ids)} tokens for {num_streams} streams, of 1 to {MAX_STREAMS}")
        table = np.array([self._row(stream) for stream in streams], dtype=np.int64)
        angles = torch.stack([cosines_BP, sines_BP]).contiguous()
        if angles.shape != (2, num_streams, head_dim // 2) or angles.dtype != torch.float32:
            raise ValueError(f"cosines must be float32 {[num_streams, head_dim // 2]}, not {list(cosines_BP.shape)}")
        lanes = next(lanes for lanes in (1, 4, 8, 16) if num_streams <= lanes)
        # Enough parts for an even split over threads, and none where streams are plenty.
        num_parts = max(1, 8 * self._num_threads // (num_streams * num_kv_heads))
        parts = torch.empty(num_streams * num_query_heads * num_parts * (head_dim + 2))
        hidden = self._hidden[: dim * lanes].view(dim, lanes)
        hidden[:, num_streams:] = 0
        hidden[:, :num_streams] = self._weights.embedding[torch.as_tensor(token_ids)].T
        logits = torch.empty(num_streams, vocab_size)
        arrivals = np.zeros(1, dtype=np.int64)
        arguments = np.array(
            [*self._shape, num_streams, lanes, num_parts, self._addresses.ctypes.data, table.ctypes.data,
             self._norm_eps.ctypes.data, angles.data_ptr(), hidden.data_ptr(), self._qkv.data_ptr(), parts.data_ptr(),
             self._activation.data_ptr(), self._private.data_ptr(), self._private.stride(0) * 4, logits.data_ptr(),
             arrivals.ctypes.data],
            dtype=np.int64,
        )  # fmt: skip
        assert len(arguments) == len(SIZES)
        _openmp().GOMP_parallel(self._program, arguments.ctypes.data, self._num_threads, 0)
        return logits

    def _row(self, stream: StreamSlots) -> list[int]:
        slabs = (stream.keys, stream.rotated_keys, stream.values)
        num_layers, _, _, num_kv_heads, head_dim, _, _ = self._shape
        capacity = stream.keys.shape[2]
        if any(slab.shape != (num_layers, num_kv_heads, capacity, head_dim) for slab in slabs):
            raise ValueError(f"slabs {[tuple(slab.shape) for slab in slabs]} do not fit the weights")
        if any(slab.dtype != self._kv_dtype or not slab.is_contiguous() for slab in slabs):
            raise ValueError(f"slabs must be contiguous {self._kv_dtype}")
        if not 0 <= stream.num_slots < capacity:
            raise ValueError(f"no free slot behind {stream.num_slots} of {capacity}")
        return [*(slab.data_ptr() for slab in slabs), capacity, stream.num_slots]


def decode_step_reference(
    weights: DecodeWeights,
    token_ids: Sequence[int],
    streams: Sequence[StreamSlots],
    cosines_BP: torch.Tensor,
    sines_BP: torch.Tensor,
    *,
    num_query_heads: int,
    num_kv_heads: int,
    norm_eps: float,
) -> torch.Tensor:
    """As `DecodeStep`, stream by stream in float32."""

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean() + norm_eps).rsqrt() * weight.float()

    def rotate(x_HD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        a, b = x_HD.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    logits = []
    for token_id, stream, cos, sin in zip(token_ids, streams, cosines_BP, sines_BP, strict=True):
        hidden, slot = weights.embedding[token_id].float(), stream.num_slots
        for index, layer in enumerate(weights.layers):
            heads = layer.query_key_value.float() @ norm(hidden, layer.attention_norm)
            heads = heads.view(num_query_heads + 2 * num_kv_heads, -1)
            query, key, value = heads.split([num_query_heads, num_kv_heads, num_kv_heads])
            stream.keys[index, :, slot] = key
            stream.values[index, :, slot] = value
            stream.rotated_keys[index, :, slot] = rotate(stream.keys[index, :, slot].float(), cos, sin)
            past_keys = stream.rotated_keys[index, :, : slot + 1].float()
            grouped = rotate(query, cos, sin).view(num_kv_heads, -1, query.shape[-1])
            weight = (grouped @ past_keys.mT / math.sqrt(query.shape[-1])).softmax(dim=-1)
            attended = (weight @ stream.values[index, :, : slot + 1].float()).flatten()
            hidden = hidden + layer.attention_output.float() @ attended
            gate, up = (layer.gate_up.float() @ norm(hidden, layer.ffn_norm)).chunk(2)
            hidden = hidden + layer.ffn_down.float() @ (torch.nn.functional.silu(gate) * up)
        logits.append(weights.output.float() @ norm(hidden, weights.output_norm))
    return torch.stack(logits)


_EXEMPLARS = {torch.bfloat16: np.uint16(0), torch.float32: np.float32(0)}


def _program(weight_exemplar: Any, kv_exemplar: Any, digest: str) -> Callable[[Any], None]:
    def program(arguments: Any) -> None:
        _ = digest
        decode_program(arguments, weight_exemplar, kv_exemplar)

    return program


@cache
def _compiled_program(weight_dtype: torch.dtype, kv_dtype: torch.dtype) -> Any:
    """The program's C function, from numba's cache on disk after the first time on a machine."""
    if not {weight_dtype, kv_dtype} <= _EXEMPLARS.keys():
        raise ValueError(f"weights {weight_dtype} and KV {kv_dtype} must be float32 or bfloat16")
    # numba's cache only sees changes of the file that a function stands in, and of the values it encloses.
    sources = [Path(__file__), Path(_decode_program.__file__), Path(_vector_code.__file__)]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    program = _program(_EXEMPLARS[weight_dtype], _EXEMPLARS[kv_dtype], digest)
    signature = numba.types.void(numba.types.CPointer(numba.types.int64))
    return numba.cfunc(signature, cache=True)(program).ctypes


@cache
def _openmp() -> Any:
    """The OpenMP runtime that torch has loaded: its thread pool is shared, so no second pool fights for the cores."""
    library = ctypes.CDLL(None)
    library.GOMP_parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    library.GOMP_parallel.restype = None
    return library
