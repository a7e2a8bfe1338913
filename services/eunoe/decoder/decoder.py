"""A Llama-family decoder over bounded memory states: `prefill` for segments of one stream, `decode` for many streams.

Shape suffixes: L KV source layer, H KV head, G query head of a KV head's group, T token, S slot, D head dim,
E model dim.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812

from eunoe.decoder.checkpoint import load_config, load_dtypes, load_weights
from eunoe.decoder.compressive_memory import CompressiveMemory
from eunoe.decoder.config import DecoderConfig, Dtypes
from eunoe.decoder.memory_state import MemorySettings, MemoryState
from eunoe.decoder.numerics import numerics_id
from eunoe.decoder.rotary import Rotary, rotate
from eunoe.decoder.weights import LayerWeights, Weights, random_weights, weights_digest
from eunoe.eviction import EvictionPolicy, Statistics
from eunoe_kernels.decode_step import MAX_STREAMS, DecodeStep, StreamSlots
from eunoe_kernels.segment_attention import segment_attention

Logits = Literal["none", "last", "all"]


class Decoder:
    """One model, ready to run. Not thread-safe: one thread runs it.

    The first one on a machine compiles the decode step, which takes some 20 seconds; later ones find it on disk.

    Attributes:
        config: The shape.
        dtypes: The binding.
        model_digest: Hex digest of shape and weights; a memory state is only valid for the model it was made by.
        numerics_id: Within one, equal logs fold to equal states, byte for byte.
    """

    def __init__(self, config: DecoderConfig, weights: Weights, dtypes: Dtypes, num_threads: int | None = None) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self.config = config
        self.dtypes = dtypes
        self.model_digest = weights_digest(config, weights)
        self.numerics_id = numerics_id(dtypes, torch.get_num_threads())
        self._weights = weights.to(dtypes.compute)
        self._rotary = Rotary(config.rope, config.head_dim)
        self._compressive_memory: CompressiveMemory | None = None
        self._decode_step: DecodeStep | None = None
        if config.compressive_memory is not None:
            self._compressive_memory = CompressiveMemory(config, weights.memory_gates)
        else:
            # Prefill is bound by arithmetic; decoding is bound by reading, so it reads the weights as they are stored.
            self._decode_step = DecodeStep(
                weights,
                num_query_heads=config.num_query_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                norm_eps=config.norm_eps,
                kv_dtype=dtypes.kv,
                num_threads=torch.get_num_threads(),
            )

    @classmethod
    def load(cls, directory: Path | str, dtypes: Dtypes | None = None, num_threads: int | None = None) -> Self:
        """A model from a Hugging Face directory.

        Args:
            directory: With config.json and safetensors.
            dtypes: Default: what the model is bound to (`Dtypes.from_hf`).
            num_threads: Of torch, for the whole process; default: as it is.

        Raises:
            ValueError: If the directory holds no model of the Llama family.
        """
        dtypes = dtypes or load_dtypes(directory)
        return cls(load_config(directory), load_weights(directory, dtypes.weights), dtypes, num_threads)

    @classmethod
    def random(cls, config: DecoderConfig, seed: int, dtypes: Dtypes | None = None) -> Self:
        """A model of seeded random weights."""
        dtypes = dtypes or Dtypes.for_this_machine()
        return cls(config, random_weights(config, seed).to(dtypes.weights), dtypes)

    @property
    def memory_gates_LHG(self) -> torch.Tensor | None:
        """The share that each query head takes from the compressive memory, 0 to 1, float32; None if there is none."""
        return None if self._compressive_memory is None else self._compressive_memory.gates_LHG

    def new_state(self, settings: MemorySettings, policy: EvictionPolicy | None = None) -> MemoryState:
        """The memory state of a stream of which nothing is folded yet, with room for what the policy remembers."""
        return MemoryState(self.config, settings, self.dtypes.kv, policy.statistics if policy is not None else None)

    def prefill(
        self,
        state: MemoryState,
        token_ids: npt.ArrayLike,
        policy: EvictionPolicy,
        *,
        logits: Logits = "none",
    ) -> torch.Tensor | None:
        """Fold tokens into a state, in passes cut at the stream's segment boundaries; evict at each boundary.

        A segment folded from boundary to boundary is one pass of `segment_length` rows, however the calls are cut at
        boundaries: its result is the same bit for bit. Any other cut changes last bits.

        Args:
            state: Changed in place.
            token_ids: [n] integers below `vocab_size`.
            policy: What to keep when the budget is exceeded. If it remembers other things of a slot than the state
                has, those start from zero.
            logits: Of no token, of the last, or of all of them (4 vocab_size bytes a token).

        Returns:
            None, or float32 [vocab_size], or float32 [n, vocab_size].

        Raises:
            ValueError: If a token id is outside the vocabulary, or logits are asked for and there is no token.
        """
        ids = self._checked(token_ids)
        if logits != "none" and not len(ids):
            raise ValueError("there are no logits without tokens")
        parts = []
        state.use_statistics(policy.statistics)
        while len(ids):
            num_now = min(state.num_tokens_to_boundary, len(ids))
            wanted: Logits = "none" if logits == "last" and num_now < len(ids) else logits
            part = self._run_pass(state, ids[:num_now], policy.statistics, wanted)
            if part is not None:
                parts.append(part)
            ids = ids[num_now:]
            self._evict_at_boundary(state, policy)
        if logits == "none":
            return None
        return parts[0][0] if logits == "last" else torch.cat(parts)

    def decode(
        self,
        states: Sequence[MemoryState],
        token_ids: Sequence[int],
        policy: EvictionPolicy | Sequence[EvictionPolicy],
    ) -> torch.Tensor:
        """Fold one token into each of several states and return what follows, float32 [len(states), vocab_size].

        Args:
            states: 1 to 16 different states, changed in place.
            token_ids: One for each state.
            policy: As in `prefill`; for all states, or one for each.

        Raises:
            ValueError: If there are no or too many states, one comes twice, or a token id is outside the vocabulary.
        """
        num_streams = len(states)
        if not 1 <= num_streams <= MAX_STREAMS or len({id(state) for state in states}) < num_streams:
            raise ValueError(f"a decode step takes 1 to {MAX_STREAMS} different states, not {num_streams}")
        policies = policy if isinstance(policy, Sequence) else [policy] * num_streams
        if not len(token_ids) == len(policies) == num_streams:
            raise ValueError(f"{len(token_ids)} tokens and {len(policies)} policies for {num_streams} states")
        ids = self._checked(token_ids)
        for state, each in zip(states, policies, strict=True):
            state.use_statistics(each.statistics)
        logits = self._decode_alone(states, ids) if self._decode_step is None else self._decode_together(states, ids)
        for state, each in zip(states, policies, strict=True):
            self._evict_at_boundary(state, each)
        return logits

    def _decode_alone(self, states: Sequence[MemoryState], ids: torch.Tensor) -> torch.Tensor:
        """One pass of one token a state: the decode step knows no compressive memory."""
        logits = (
            self._run_pass(state, token_id[None], None, "last") for state, token_id in zip(states, ids, strict=True)
        )
        return torch.cat([each for each in logits if each is not None])

    def _decode_together(self, states: Sequence[MemoryState], ids: torch.Tensor) -> torch.Tensor:
        assert self._decode_step is not None
        for state in states:
            state.clear_statistics(1)
            state.rotate_pending(self._rotary)
        cos, sin = self._rotary.rows(torch.tensor([state.next_position for state in states]))
        streams = [
            StreamSlots(
                keys=state.keys, rotated_keys=state.rotated_keys, values=state.values, num_slots=state.num_slots
            )
            for state in states
        ]
        logits = self._decode_step(ids.tolist(), streams, cos, sin)
        for state, token_id in zip(states, ids, strict=True):
            state.append(token_id[None])
            state.num_rotated = state.num_slots
        return logits

    def _checked(self, token_ids: npt.ArrayLike) -> torch.Tensor:
        ids = np.asarray(token_ids, dtype=np.int64).reshape(-1)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.config.vocab_size:
            raise ValueError(f"token ids {ids.min()}..{ids.max()} are not all in 0..{self.config.vocab_size - 1}")
        return torch.from_numpy(ids.astype(np.int32))

    def _run_pass(
        self, state: MemoryState, ids: torch.Tensor, statistics: Statistics | None, logits: Logits
    ) -> torch.Tensor | None:
        """All layers over consecutive tokens of one stream; logits [n, vocab] or [1, vocab] or none."""
        state.clear_statistics(len(ids))
        state.rotate_pending(self._rotary)
        cos, sin = self._rotary.rows(torch.arange(state.next_position, state.next_position + len(ids)))
        last = len(self._weights.layers) - 1
        x_TE = self._embed(ids)
        for index, layer in enumerate(self._weights.layers):
            unrotated_HGTD, query_HGTD, key_HTD, value_HTD = self._project(x_TE, state, index, layer, cos, sin)
            if statistics is not None:
                state.observe(statistics, index, query_HGTD, key_HTD)
            if index == last and logits == "none":
                # Nobody reads what the last layer computes beyond its keys and values.
                break
            past = slice(0, state.num_slots)
            attended_THGD = segment_attention(
                query_HGTD, key_HTD, value_HTD, state.rotated_keys[index, :, past], state.values[index, :, past]
            )
            if self._compressive_memory is not None:
                attended_THGD = self._compressive_memory.mixed_in(state, index, unrotated_HGTD, attended_THGD)
            attended = attended_THGD.flatten(1)
            if index == last and logits == "last":
                x_TE, attended = x_TE[-1:], attended[-1:]
            x_TE.addmm_(attended, layer.attention_output.T)
            self._add_ffn(x_TE, layer)
        if statistics is not None:
            state.finish_observation(statistics, len(ids))
        state.append(ids)
        return None if logits == "none" else self._logits(x_TE)

    def _project(
        self,
        x_TE: torch.Tensor,
        state: MemoryState,
        index: int,
        layer: LayerWeights,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries before and after rotary positions, rotated keys, and values, of a pass.

        Keys and values are written behind the live slots.
        """
        config, num_tokens = self.config, len(x_TE)
        qkv = self._normed(x_TE, layer.attention_norm) @ layer.query_key_value.T
        heads = qkv.view(num_tokens, -1, config.head_dim).transpose(0, 1)
        unrotated, key, value = heads.split([config.num_query_heads, config.num_kv_heads, config.num_kv_heads])
        state.write(index, key, value)
        rotated = torch.empty(
            config.num_query_heads + config.num_kv_heads, num_tokens, config.head_dim, dtype=torch.float32
        )
        rotate(heads[: len(rotated)].float(), cos, sin, out=rotated)
        query, key = rotated.to(qkv.dtype).split([config.num_query_heads, config.num_kv_heads])
        groups = (config.num_kv_heads, config.group_size)
        return unrotated.unflatten(0, groups), query.unflatten(0, groups), key, value

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self._weights.embedding)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.norm_eps)

    def _add_ffn(self, x: torch.Tensor, layer: LayerWeights) -> None:
        gate, up = (self._normed(x, layer.ffn_norm) @ layer.gate_up.T).chunk(2, dim=-1)
        x.addmm_(F.silu(gate).mul_(up), layer.ffn_down.T)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        return (self._normed(x, self._weights.output_norm) @ self._weights.output.T).float()

    def _evict_at_boundary(self, state: MemoryState, policy: EvictionPolicy) -> None:
        budget = state.settings.kv_budget_tokens
        if state.num_tokens % state.settings.segment_length or state.num_slots <= budget:
            return
        # Of a budget of 0 there is nothing to choose.
        kept_LHS = (
            policy.keep(state, budget) if budget else torch.empty(*state.positions.shape[:2], 0, dtype=torch.int64)
        )
        if self._compressive_memory is not None:
            self._compressive_memory.write(state, kept_LHS)
        state.evict(kept_LHS)
