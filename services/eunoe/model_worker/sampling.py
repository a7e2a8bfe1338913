"""Choosing the next token from logits."""

import numpy as np
import torch

from eunoe.api.v1 import long_context_pb2 as api

MAX_TEMPERATURE = 10.0


class Sampler:
    """Chooses tokens one after the other: equal settings and equal logits, equal choices.

    Args:
        sampling: As in the public API; temperature 0 takes the likeliest token.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(self, sampling: api.Sampling) -> None:
        if not 0.0 <= sampling.temperature <= MAX_TEMPERATURE:
            raise ValueError(f"temperature={sampling.temperature} is not within 0 to {MAX_TEMPERATURE:g}")
        if not 0.0 <= sampling.top_p <= 1.0:
            raise ValueError(f"top_p={sampling.top_p} is not within 0 to 1")
        self._temperature = sampling.temperature
        self._top_k = sampling.top_k
        self._top_p = sampling.top_p or 1.0
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))

    def choose(self, logits_V: torch.Tensor) -> tuple[int, float]:
        """The next token and the natural logarithm of its probability under the model itself (temperature 1).

        Args:
            logits_V: float32 [vocab].
        """
        log_probs = log_softmax(logits_V.numpy())
        token_id = int(log_probs.argmax()) if self._temperature == 0.0 else self._draw(log_probs)
        return token_id, float(log_probs[token_id])

    def _draw(self, log_probs: np.ndarray) -> int:
        order = np.argsort(-log_probs, kind="stable")
        if self._top_k:
            order = order[: self._top_k]
        probabilities = np.exp(log_softmax(log_probs[order] / self._temperature))
        if self._top_p < 1.0:
            # The first token that reaches the sum still belongs to it.
            num_kept = int(np.searchsorted(np.cumsum(probabilities), self._top_p)) + 1
            order, probabilities = order[:num_kept], probabilities[:num_kept]
        draw = self._random.random() * probabilities.sum()
        return int(order[min(int(np.searchsorted(np.cumsum(probabilities), draw, side="right")), len(order) - 1)])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural logarithms of the softmax over the last axis, in float64: float32 sums lose digits at 49K words."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
