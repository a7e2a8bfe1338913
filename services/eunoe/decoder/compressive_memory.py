"""A decoder's compressive memory: every layer reads it beside its window, and what leaves the window goes into it.

After Infini-attention (Munkhdalai et al. 2024, arXiv:2404.07143). The equations are in the kernel's file.

Shape suffixes: L KV source layer, H KV head, G query head of its group, T token of a pass, S slot, D head dim.
"""

from collections.abc import Sequence

import torch

from eunoe.decoder.config import DecoderConfig
from eunoe.decoder.memory_state import MemoryState
from eunoe.decoder.weights import MemoryGates
from eunoe_kernels.compressive_memory import retrieve, update


class CompressiveMemory:
    """Reads and writes M and z of memory states, with one decoder's gates."""

    def __init__(self, config: DecoderConfig, gates: Sequence[MemoryGates]) -> None:
        """Take a decoder's gates.

        Raises:
            ValueError: If there is not one set of gates a layer.
        """
        assert config.compressive_memory is not None
        if len(gates) != config.num_layers:
            raise ValueError(f"{len(gates)} layers of {config.num_layers} have memory gates")
        self._config = config.compressive_memory
        groups = (config.num_kv_heads, config.group_size, 1)
        self._mixing_LHG1 = torch.stack([torch.sigmoid(each.mixing).view(groups) for each in gates])
        self._write_weight_LHD1 = torch.stack([each.write_weight[..., None] for each in gates])
        self._write_bias_LH1 = torch.stack([each.write_bias[:, None] for each in gates])

    @property
    def gates_LHG(self) -> torch.Tensor:
        """The share that each query head takes from what was written, 0 to 1, float32."""
        return self._mixing_LHG1[..., 0]

    def mixed_in(
        self, state: MemoryState, layer: int, query_HGTD: torch.Tensor, attended_THGD: torch.Tensor
    ) -> torch.Tensor:
        """What a layer attends to in all: g A_memory + (1 - g) A_window (eq. 10).

        Args:
            state: As it was before the pass: the memory holds no token that the window has.
            layer: Of the KV source layer.
            query_HGTD: Before rotary positions.
            attended_THGD: A_window.

        Returns:
            [T, H, G, D], in the dtype of `attended_THGD`.
        """
        assert state.memory is not None
        assert state.normalizer is not None
        normalizer_HD = state.normalizer[layer]
        retrieved_HGTD = retrieve(query_HGTD, state.memory[layer], normalizer_HD)
        # A memory that nothing was written to has nothing to say, whatever the gate.
        is_written_H11 = (normalizer_HD.sum(dim=1) > 0)[:, None, None]
        share_HG1 = self._mixing_LHG1[layer] * is_written_H11
        retrieved_THGD = retrieved_HGTD.permute(2, 0, 1, 3).to(attended_THGD.dtype)
        return torch.lerp(attended_THGD, retrieved_THGD, share_HG1.to(attended_THGD.dtype))

    def write(self, state: MemoryState, kept_LHS: torch.Tensor) -> None:
        """Write the slots that are about to be evicted, in one batch a head (eq. 8 and 9), each with its write weight.

        Args:
            state: Its M and z are changed in place, its slots are not.
            kept_LHS: What `MemoryState.evict` will be given.
        """
        assert state.memory is not None
        assert state.normalizer is not None
        key_LHSD, value_LHSD = state.leaving(kept_LHS)
        weight_LHS = None
        if self._config.has_write_gate:
            logit_LHS = (key_LHSD.float() @ self._write_weight_LHD1)[..., 0] + self._write_bias_LH1
            weight_LHS = torch.sigmoid(logit_LHS).flatten(0, 1)
        # Heads are independent, so those of all layers are one call.
        update(
            state.memory.flatten(0, 1),
            state.normalizer.flatten(0, 1),
            key_LHSD.flatten(0, 1),
            value_LHSD.flatten(0, 1),
            weight_LHS,
            rule=self._config.update_rule,
            uses_gamma=self._config.uses_gamma,
        )
