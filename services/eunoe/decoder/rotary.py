"""Rotary positions (Su et al. 2021, arXiv:2104.09864), with the frequency scalings of Llama 2 and 3.

Pairs are (i, i + head_dim / 2), as in Hugging Face's checkpoints.
"""

import math

import torch

from eunoe.decoder.config import RopeConfig


class Rotary:
    """Turns positions into the cosines and sines that `rotate` takes. Any position is fine: there is no table."""

    def __init__(self, config: RopeConfig, head_dim: int) -> None:
        self._inverse_frequency = _inverse_frequency(config, head_dim)

    def rows(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine for integer positions [...], each float32 [..., head_dim / 2]."""
        # The angle is rounded to float32 as Hugging Face's is; its cosine is then exact to the last bit.
        angle = (positions[..., None].float() * self._inverse_frequency).double()
        return angle.cos().float(), angle.sin().float()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs of the last dim of `x` into `out`, which has its shape and may not overlap it.

    Args:
        x: [..., head_dim], any strides, float32.
        cos: Of each row's position, broadcastable to [..., head_dim / 2], float32; `sin` likewise.
        out: Where to write, float32.
    """
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half], x[..., half:]
    torch.mul(x1, cos, out=out[..., :half]).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=out[..., half:]).addcmul_(x1, sin)
    return out


def _inverse_frequency(config: RopeConfig, head_dim: int) -> torch.Tensor:
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequency = 1.0 / (config.theta**exponent)
    if config.scaling == "linear":
        return frequency / config.factor
    if config.scaling == "llama3":
        wavelength = 2 * math.pi / frequency
        low, high = config.low_freq_factor, config.high_freq_factor
        blend = ((config.original_max_positions / wavelength - low) / (high - low)).clamp(0, 1)
        return (1 - blend) * frequency / config.factor + blend * frequency
    return frequency
