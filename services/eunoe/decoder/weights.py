"""The tensors of a decoder, laid out for use: fused projections, each matrix contiguous [out, in]."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
import xxhash

from eunoe.decoder.config import DecoderConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWeights:
    """One layer. Q rows are ordered by head, and query head h reads KV head h // group_size."""

    attention_norm: torch.Tensor
    """[dim]"""
    query_key_value: torch.Tensor
    """[(num_query_heads + 2 num_kv_heads) head_dim, dim]: queries, then keys, then values."""
    attention_output: torch.Tensor
    """[dim, num_query_heads head_dim]"""
    ffn_norm: torch.Tensor
    """[dim]"""
    gate_up: torch.Tensor
    """[2 ffn_dim, dim]: gate, then up."""
    ffn_down: torch.Tensor
    """[dim, ffn_dim]"""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryGates:
    """One layer's gates of its compressive memory, float32 whatever the other weights are."""

    mixing: torch.Tensor
    """[num_query_heads]: sigmoid of it is the share that a query head takes from the memory."""
    write_weight: torch.Tensor
    """[num_kv_heads, head_dim]; without a write gate [num_kv_heads, 0]."""
    write_bias: torch.Tensor
    """[num_kv_heads]: sigmoid of key . weight + bias is how much of a token is written; without a write gate [0]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """A whole decoder."""

    embedding: torch.Tensor
    """[vocab_size, dim]"""
    layers: tuple[LayerWeights, ...]
    output_norm: torch.Tensor
    """[dim]"""
    output: torch.Tensor
    """[vocab_size, dim]; the same tensor as `embedding` where the embeddings are tied."""
    memory_gates: tuple[MemoryGates, ...] = ()
    """One a layer where the decoder has a compressive memory."""

    def to(self, dtype: torch.dtype) -> "Weights":
        """These weights in another dtype; a tied output stays tied, and equal dtypes share memory."""
        embedding = self.embedding.to(dtype)
        return Weights(
            embedding=embedding,
            layers=tuple(
                LayerWeights(**{f.name: getattr(layer, f.name).to(dtype) for f in fields(LayerWeights)})
                for layer in self.layers
            ),
            output_norm=self.output_norm.to(dtype),
            output=embedding if self.output is self.embedding else self.output.to(dtype),
            memory_gates=self.memory_gates,
        )

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor, in a fixed order; a tied output once."""
        yield self.embedding
        for layer in self.layers:
            yield from (getattr(layer, f.name) for f in fields(LayerWeights))
        yield self.output_norm
        if self.output is not self.embedding:
            yield self.output
        for gates in self.memory_gates:
            yield from (getattr(gates, f.name) for f in fields(MemoryGates))


def weights_digest(config: DecoderConfig, weights: Weights) -> str:
    """Hex XXH3-128 of the shape and of every weight's bits: equal digests fold the same function."""
    shape = {f.name: getattr(config, f.name) for f in fields(DecoderConfig) if f.name != "name"}
    if config.compressive_memory is None:
        # A plain Llama has the digest that it had before there were others.
        del shape["compressive_memory"]
    hasher = xxhash.xxh3_128(repr(sorted(shape.items())).encode())
    for tensor in weights.tensors():
        hasher.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        hasher.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def random_weights(config: DecoderConfig, seed: int) -> Weights:
    """Seeded float32 weights whose activations keep their scale."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(num_out: int, num_in: int) -> torch.Tensor:
        return torch.randn(num_out, num_in, generator=generator) / math.sqrt(num_in)

    def norm() -> torch.Tensor:
        return 1 + 0.1 * torch.randn(config.dim, generator=generator)

    query_dim = config.num_query_heads * config.head_dim
    qkv_dim = query_dim + 2 * config.num_kv_heads * config.head_dim
    embedding = matrix(config.vocab_size, config.dim)
    return Weights(
        embedding=embedding,
        layers=tuple(
            LayerWeights(
                attention_norm=norm(),
                query_key_value=matrix(qkv_dim, config.dim),
                attention_output=matrix(config.dim, query_dim),
                ffn_norm=norm(),
                gate_up=matrix(2 * config.ffn_dim, config.dim),
                ffn_down=matrix(config.dim, config.ffn_dim),
            )
            for _ in range(config.num_layers)
        ),
        output_norm=norm(),
        output=embedding if config.ties_embeddings else matrix(config.vocab_size, config.dim),
        memory_gates=_random_gates(config, generator),
    )


def _random_gates(config: DecoderConfig, generator: torch.Generator) -> tuple[MemoryGates, ...]:
    memory = config.compressive_memory
    if memory is None:
        return ()
    num_heads, num_dims = config.num_kv_heads, config.head_dim if memory.has_write_gate else 0
    return tuple(
        MemoryGates(
            mixing=torch.randn(config.num_query_heads, generator=generator),
            write_weight=torch.randn(num_heads, num_dims, generator=generator),
            write_bias=torch.randn(num_heads if memory.has_write_gate else 0, generator=generator),
        )
        for _ in range(config.num_layers)
    )
