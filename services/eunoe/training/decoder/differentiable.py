"""A decoder with Infini-attention's compressive memory that gradients flow through.

Infini-attention is arXiv 2404.07143, with the local path carried over one segment: segment s attends to the segments
s - 1 and s, and retrieves from a memory of all segments up to s - 2, so that every token is seen exactly once. A layer
computes all segments of a sequence at once; only the update rules that read the memory they write to run segment by
segment.

Axes: B batch, S segments, N bytes of a segment, H KV heads, G query heads a KV head, D head dimension, E hidden size.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

UpdateRule = Literal["linear", "delta"]

NORMALIZER_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class NanoConfig:
    """Shape of the model and of its memory.

    Raises:
        ValueError: If the heads do not divide, or if there is no such memory.
    """

    num_layers: int = 8
    hidden_size: int = 128
    num_query_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 352
    vocab_size: int = 256
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    update_rule: UpdateRule = "linear"
    has_write_gate: bool = True
    uses_gamma: bool = False

    def __post_init__(self) -> None:
        if self.num_query_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_query_heads} query heads do not share {self.num_kv_heads} KV heads evenly")
        if self.update_rule not in ("linear", "delta"):
            raise ValueError(f"update rule {self.update_rule!r} is neither linear nor delta")
        if self.uses_gamma and self.update_rule != "delta":
            raise ValueError("gamma corrects the delta rule's count, not the linear one's")


@dataclass(slots=True)
class LayerState:
    """What a layer carries from one segment to the next.

    Attributes:
        keys, values: The newest segment, before RoPE, `[B, H, N, D]`.
        write_weights: What of it will be written when it leaves the window, `[B, H, N, 1]`.
        memory: M and z side by side, `[B, H, D, D + 1]`.
    """

    keys: Tensor
    values: Tensor
    write_weights: Tensor
    memory: Tensor

    def picked(self, rows: Tensor) -> "LayerState":
        """The states of some sequences, in the order of their indices `rows`."""
        return LayerState(self.keys[rows], self.values[rows], self.write_weights[rows], self.memory[rows])


class CompressiveAttention(nn.Module):
    """One layer's local attention and compressive memory, mixed by a gate a query head (eq. 10)."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.config = config
        query_size = config.num_query_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.memory_gate = nn.Parameter(torch.zeros(config.num_query_heads))
        if config.has_write_gate:
            self.write_gate = WriteGate(config.num_kv_heads, config.head_dim)

    def project(self, hidden: Tensor, segment_length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, S, H, G, N, D]`, keys and values `[B, S, H, N, D]` of `hidden` `[B, S * N, E]`, before RoPE."""
        config = self.config
        batch, length, _ = hidden.shape
        num_segments = length // segment_length
        groups = config.num_query_heads // config.num_kv_heads
        queries = self.q_proj(hidden).view(
            batch, num_segments, segment_length, config.num_kv_heads, groups, config.head_dim
        )
        kv_shape = (batch, num_segments, segment_length, config.num_kv_heads, config.head_dim)
        keys = self.k_proj(hidden).view(kv_shape).transpose(2, 3)
        values = self.v_proj(hidden).view(kv_shape).transpose(2, 3)
        return queries.permute(0, 1, 3, 4, 2, 5), keys, values

    def write_weights(self, keys: Tensor) -> Tensor:
        """How much of a token is written, in (0, 1): `[..., H, N, 1]` for keys `[..., H, N, D]`."""
        if not self.config.has_write_gate:
            return keys.new_ones(*keys.shape[:-1], 1)
        weights: Tensor = self.write_gate(keys)
        return weights

    def forward(self, hidden: Tensor, plan: "SegmentPlan", past: LayerState | None) -> tuple[Tensor, LayerState]:
        """Attend in all segments of `hidden` `[B, S * N, E]`; returns the same shape, and the state after them."""
        batch, length, _ = hidden.shape
        queries, keys, values = self.project(hidden, plan.segment_length)
        local = local_attention(queries, keys, values, plan, past)
        before, state = self._scan(keys, values, plan, past)
        retrieved, is_written = retrieve(queries, before)
        # A memory that holds nothing has nothing to say: the gate is shut until the first write.
        gate = torch.sigmoid(self.memory_gate).view(1, 1, self.config.num_kv_heads, -1, 1, 1) * is_written
        if not plan.uses_memory:
            gate = torch.zeros_like(gate)
        mixed = torch.lerp(local, retrieved, gate)
        # Spelt out, not -1: a worker may have no sample.
        query_size = self.config.num_query_heads * self.config.head_dim
        return self.o_proj(mixed.permute(0, 1, 4, 2, 3, 5).reshape(batch, length, query_size)), state

    def _scan(
        self, keys: Tensor, values: Tensor, plan: "SegmentPlan", past: LayerState | None
    ) -> tuple[Tensor, LayerState]:
        """The memory that each segment retrieves from, `[B, S, H, D, D + 1]`, and the state after all of them."""
        batch, num_segments, num_heads, _, head_dim = keys.shape
        written_keys, written_values, weights = keys, values, self.write_weights(keys)
        weights = (weights * plan.write_scale).expand(batch, num_segments, num_heads, -1, 1)
        if past is None:
            carried = 0
            memory = keys.new_zeros(batch, num_heads, head_dim, head_dim + 1)
        else:
            carried = 1
            memory = past.memory
            written_keys = torch.cat([past.keys[:, None], keys], dim=1)
            written_values = torch.cat([past.values[:, None], values], dim=1)
            weights = torch.cat([past.write_weights[:, None], weights], dim=1)
        features = elu_features(written_keys)
        # The last segment stays in the window, and so is not yet in the memory.
        num_written = num_segments - 1 + carried
        if self.config.update_rule == "linear":
            extended = torch.cat([written_values, torch.ones_like(written_values[..., :1])], dim=-1)
            updates = (features * weights)[:, :num_written].transpose(-1, -2) @ extended[:, :num_written]
            history = torch.cat([memory[:, None], memory[:, None] + updates.cumsum(dim=1)], dim=1)
        else:
            steps = [memory]
            for index in range(num_written):
                memory = update_delta(
                    memory, features[:, index], written_values[:, index], weights[:, index],
                    uses_gamma=self.config.uses_gamma,
                )  # fmt: skip
                steps.append(memory)
            history = torch.stack(steps, dim=1)
        if not carried:
            history = torch.cat([history[:, :1], history], dim=1)
        return history[:, :num_segments], LayerState(keys[:, -1], values[:, -1], weights[:, -1], history[:, -1])


class WriteGate(nn.Module):
    """How much of a token the memory takes, from the token's key alone, so that it can be decided when it leaves."""

    def __init__(self, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_kv_heads, head_dim))
        self.bias = nn.Parameter(torch.full((num_kv_heads,), 2.0))

    def forward(self, keys: Tensor) -> Tensor:
        return torch.sigmoid(keys @ self.weight.unsqueeze(-1) + self.bias.view(-1, 1, 1))


def elu_features(x: Tensor) -> Tensor:
    """sigma(x) = elu(x) + 1, always positive."""
    # elu(x) + 1 has lost 7% of exp(x) at -14, and all of it at -17: filler that a passkey must outweigh lies there.
    return x.clamp(max=0).exp() + functional.relu(x)


def update_delta(memory: Tensor, features: Tensor, values: Tensor, weights: Tensor, *, uses_gamma: bool) -> Tensor:
    """Write one batch of tokens by the delta rule (eq. 9, weighted).

    Args:
        memory: `[B, H, D, D + 1]`, M and z.
        features, values: `[B, H, N, D]`.
        weights: `[B, H, N, 1]`.
        uses_gamma: Do not count in z what is already stored there (arXiv 2407.04841), but no less than this batch:
            else batches that write more than the first did would make M grow without end.
    """
    stored = features @ memory
    stored_count = stored[..., -1:]
    is_written = (stored_count > 0).to(values.dtype)
    values = values - is_written * stored[..., :-1] / (stored_count + NORMALIZER_EPSILON)
    counts = torch.ones_like(weights)
    if uses_gamma:
        norm = features.square().sum(-1, keepdim=True) + 1e-5
        counts = (1.0 - stored_count / norm).clamp(0.0, 1.0).detach()
    written = features * weights
    memory = memory + written.transpose(-1, -2) @ torch.cat([values, counts], dim=-1)
    if uses_gamma:
        normalizer = memory[..., -1:].maximum(written.sum(-2)[..., None])
        memory = torch.cat([memory[..., :-1], normalizer], dim=-1)
    return memory


def retrieve(queries: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Read the memory (eq. 7).

    Args:
        queries: `[B, S, H, G, N, D]` before RoPE.
        memory: `[B, S, H, D, D + 1]`.

    Returns:
        What was read, shaped as the queries, and whether anything was ever written, `[B, S, H, 1, 1, 1]`.
    """
    batch, num_segments, num_heads, groups, length, head_dim = queries.shape
    read = elu_features(queries).reshape(batch, num_segments, num_heads, groups * length, head_dim) @ memory
    retrieved = (read[..., :-1] / (read[..., -1:] + NORMALIZER_EPSILON)).view_as(queries)
    is_written = (memory[..., -1].sum(-1) > 0).to(queries.dtype)
    return retrieved, is_written[:, :, :, None, None, None]


def local_attention(
    queries: Tensor, keys: Tensor, values: Tensor, plan: "SegmentPlan", past: LayerState | None
) -> Tensor:
    """Causal attention to this segment and the one before it; shapes as `CompressiveAttention.project` returns."""
    batch, num_segments, num_heads, groups, length, head_dim = queries.shape
    if past is None:
        previous_keys, previous_values = torch.zeros_like(keys[:, :1]), torch.zeros_like(values[:, :1])
    else:
        previous_keys, previous_values = past.keys[:, None], past.values[:, None]
    keys_before = torch.cat([previous_keys, keys[:, :-1]], dim=1)
    values_before = torch.cat([previous_values, values[:, :-1]], dim=1)
    # Positions count from the start of the window, so that no angle grows with the stream.
    window_keys = rotate(torch.cat([keys_before, keys], dim=3), plan.cosine, plan.sine)
    window_values = torch.cat([values_before, values], dim=3)
    turned = rotate(queries, plan.cosine[length:], plan.sine[length:])
    attended = functional.scaled_dot_product_attention(
        turned.reshape(batch * num_segments, num_heads, groups * length, head_dim),
        window_keys.view(batch * num_segments, num_heads, 2 * length, head_dim),
        window_values.view(batch * num_segments, num_heads, 2 * length, head_dim),
        attn_mask=plan.local_mask(batch, num_segments, groups, has_past=past is not None),
    )
    return attended.view_as(queries)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """RoPE in Llama's half-split layout; `cosine` and `sine` are `[N, D]`, `x` is `[..., N, D]`."""
    half = x.shape[-1] // 2
    return x * cosine + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sine


class SegmentPlan:
    """What all layers share in one pass: the cut into segments, the angles, the mask and what may be written."""

    def __init__(
        self,
        config: NanoConfig,
        segment_length: int,
        write_scale: Tensor | float = 1.0,
        *,
        uses_memory: bool = True,
        recomputes: bool = False,
    ) -> None:
        """Cut into segments of `segment_length` bytes.

        Args:
            config: Of the model that runs.
            segment_length: Bytes of a segment.
            write_scale: Multiplies what a token adds to M and z; broadcast to `[B, S, H, N, 1]`. 0 for padding.
            uses_memory: False answers from the window alone.
            recomputes: Layers keep only their inputs for the gradient, and compute the rest again.
        """
        self.recomputes = recomputes
        self.segment_length = segment_length
        self.write_scale = write_scale
        self.uses_memory = uses_memory
        inverse = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        angles = torch.outer(torch.arange(2 * segment_length).float(), inverse).repeat(1, 2)
        self.cosine, self.sine = angles.cos(), angles.sin()
        self._masks: dict[tuple[int, int, int, bool], Tensor] = {}

    def local_mask(self, batch: int, num_segments: int, groups: int, *, has_past: bool) -> Tensor:
        """True where a query may look: `[B * S, 1, G * N, 2 * N]`, queries of a group below one another."""
        key = (batch, num_segments, groups, has_past)
        if key not in self._masks:
            length = self.segment_length
            causal = torch.ones(length, 2 * length, dtype=torch.bool).tril(length)
            mask = causal.repeat(num_segments, groups, 1)
            if not has_past:
                mask[0, :, :length] = False
            self._masks[key] = mask.repeat(batch, 1, 1).unsqueeze(1)
        return self._masks[key]


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        projected: Tensor = self.down_proj(functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return projected


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind an RMSNorm."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = CompressiveAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, hidden: Tensor, plan: SegmentPlan, past: LayerState | None) -> tuple[Tensor, LayerState]:
        attended, state = self.self_attn(self.input_layernorm(hidden), plan, past)
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), state


class NanoDecoder(nn.Module):
    """Bytes to logits over bytes; module names are those of Hugging Face's Llama, below `model.`."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def initialize(self, generator: torch.Generator) -> None:
        """Draw all weights; half of a layer's heads lean on the memory, half on the window."""
        for name, parameter in self.named_parameters():
            if name.endswith("memory_gate"):
                count = parameter.numel()
                signs = torch.tensor([1.0, -1.0]).repeat(count // 2 + 1)[:count]
                parameter.data.copy_(signs * 2.0 * torch.rand(count, generator=generator))
            elif parameter.dim() == 2 and "write_gate" not in name:
                deviation = parameter.shape[1] ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    deviation *= (2 * self.config.num_layers) ** -0.5
                parameter.data.normal_(0.0, deviation, generator=generator)

    def forward(
        self, tokens: Tensor, plan: SegmentPlan, past: list[LayerState] | None = None
    ) -> tuple[Tensor, list[LayerState]]:
        """Run whole segments.

        Args:
            tokens: `[B, S * N]` int64.
            past: The states that an earlier call returned, to go on from there.

        Returns:
            Hidden states after the last norm, `[B, S * N, E]`, and the layers' states.

        Raises:
            ValueError: If the tokens are not whole segments.
        """
        if tokens.shape[1] % plan.segment_length:
            raise ValueError(f"{tokens.shape[1]} tokens are not whole segments of {plan.segment_length}")
        hidden = self.embed_tokens(tokens)
        states = []
        for index, layer in enumerate(self.layers):
            given = (hidden, plan, None if past is None else past[index])
            hidden, state = checkpoint(layer, *given, use_reentrant=False) if plan.recomputes else layer(*given)
            states.append(state)
        return self.norm(hidden), states

    def memory_gates(self) -> list[list[float]]:
        """The share that each query head takes from the memory, a list a layer."""
        return [torch.sigmoid(attention.memory_gate.detach()).tolist() for attention in self.attentions()]

    def attentions(self) -> list[CompressiveAttention]:
        """Of all layers, from the first to the last."""
        return [module for module in self.modules() if isinstance(module, CompressiveAttention)]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[..., vocab_size]` by the tied embedding."""
        return functional.linear(hidden, self.embed_tokens.weight)
