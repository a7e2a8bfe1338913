"""The peer of the model benchmarks: `transformers` on the same weights, with its full cache.

It runs as its users would have it: SDPA, inference mode, and logits of the last token only.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()


class Peer:
    """A model of `transformers` in one dtype."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa").eval()
        self._cache = DynamicCache()

    @torch.inference_mode()
    def prefill(self, token_ids: torch.Tensor, chunk_tokens: int | None = None) -> None:
        """Run a prompt from nothing, in one call or in chunks over its cache."""
        self._cache = DynamicCache()
        for chunk in token_ids.split(chunk_tokens or len(token_ids)):
            self._model(chunk[None], past_key_values=self._cache, use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def decode(self, num_steps: int) -> None:
        """Decode greedily behind the prompt, as `generate` does without its overhead; the cache is cut back after."""
        token_ids = torch.tensor([[1]])
        for _ in range(num_steps):
            out = self._model(token_ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            token_ids = out.logits[:, -1:].argmax(dim=-1)
        self._cache.crop(-num_steps)
