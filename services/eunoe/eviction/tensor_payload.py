"""Tensors as messages between worker and eviction sidecar."""

from pathlib import Path

import torch
import xxhash

from eunoe.internal.v1 import eviction_sidecar_pb2 as pb
from eunoe.runtime.payload_files import INLINE_BYTES, PayloadWriter, read_payload

_DTYPES = {
    pb.TENSOR_DTYPE_FLOAT32: torch.float32,
    pb.TENSOR_DTYPE_FLOAT16: torch.float16,
    pb.TENSOR_DTYPE_INT32: torch.int32,
}
_NUMBERS = {dtype: number for number, dtype in _DTYPES.items()}
# Against a message that would have gigabytes allocated for nothing.
_MAX_BYTES = 1 << 30


def to_message(tensor: torch.Tensor, writer: PayloadWriter | None) -> pb.Tensor:
    """A tensor's elements in row-major order, in the writer's file if they are many.

    Raises:
        OSError: If the file cannot be written.
    """
    data = tensor.contiguous().numpy().data.cast("B") if tensor.numel() else memoryview(b"")
    message = pb.Tensor(shape=tensor.shape, dtype=_NUMBERS[tensor.dtype])
    if data.nbytes <= INLINE_BYTES or writer is None:
        message.data = bytes(data)
    else:
        message.file.name, message.file.generation = writer.name, writer.write(data)
    return message


def scores_digest(policy: str, feature_LHSI: torch.Tensor, scores_LHS: torch.Tensor) -> bytes:
    """Digest by which a worker knows that scores are those that a policy gave to its features, and came whole."""
    digest = xxhash.xxh3_128(policy.encode())
    for tensor in (feature_LHSI, scores_LHS):
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy().data.cast("B") if tensor.numel() else b"")
    return digest.digest()


def from_message(message: pb.Tensor, directory: Path | None) -> torch.Tensor:
    """The tensor, in memory of its own: aligned as any other, whatever becomes of the file.

    Raises:
        ValueError: If it is none, or not the one that was meant.
    """
    dtype = _DTYPES.get(message.dtype)
    num_bytes = dtype.itemsize if dtype is not None else 0
    for size in message.shape:
        num_bytes *= size
    if dtype is None or not 0 < num_bytes <= _MAX_BYTES:
        raise ValueError(f"no tensor has shape {list(message.shape)} and dtype {message.dtype}")
    tensor = torch.empty(tuple(message.shape), dtype=dtype)
    into = tensor.numpy().data.cast("B")
    if message.HasField("file"):
        if directory is None:
            raise ValueError("there is no directory of payloads here")
        read_payload(directory, message.file.name, message.file.generation, into)
    elif len(message.data) != num_bytes:
        raise ValueError(f"{len(message.data)} bytes are no tensor of {num_bytes}")
    else:
        into[:] = message.data
    return tensor
