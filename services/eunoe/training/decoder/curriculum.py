"""From needles just outside the window to the longest sequence that is trained on."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from eunoe.training.decoder.passkey import PLAIN, PasskeyTask, Sample, draw


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One part of a run.

    Attributes:
        bytes_per_step: Of all samples of a step together.
        shortest: Share of the task's length that the shortest samples have.
        far_accuracy: The stage ends when answers beyond the window reach this, as a mean of 50 steps.
        max_dilution: Segments of filler alone are written up to this many times (log-uniform, a sample's own).
        diluted_share: Share of samples that are diluted at all.
        carried_bytes: State passing: samples begin with the memory and window of up to so many bytes of filler, read
            before without gradients. 0: they begin with none.
        final_rate: Factor that the learning rate falls to, along a cosine over `max_steps`.
    """

    task: PasskeyTask
    segment_length: int
    bytes_per_step: int
    max_steps: int
    min_steps: int = 50
    far_accuracy: float = 0.98
    max_dilution: float = 1.0
    diluted_share: float = 1.0
    carried_bytes: int = 0
    rate: float = 1.0
    final_rate: float = 1.0
    shortest: float = 1.0

    def rate_factor(self, step: int) -> float:
        """What the learning rate is multiplied by."""
        share = 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / self.max_steps))
        return self.rate * (self.final_rate + (1.0 - self.final_rate) * share)

    def draw_task(self, generator: np.random.Generator) -> PasskeyTask:
        """The task of a step: its number of segments varies, so that no length is special."""
        low = math.ceil(self.shortest * self.task.length / self.segment_length)
        num_segments = int(generator.integers(low, self.task.length // self.segment_length + 1))
        return replace(self.task, length=num_segments * self.segment_length)

    def draw_carried(self, task: PasskeyTask, count: int, generator: np.random.Generator) -> list[Sample]:
        """Filler that is read before `count` samples of a step; none where nothing is carried."""
        num_segments = int(generator.integers(0, self.carried_bytes // self.segment_length + 1))
        before = replace(task, length=num_segments * self.segment_length, plain_share=1.0)
        return [draw(before, generator) for _ in range(count if num_segments else 0)]

    def write_scale(self, kinds: Tensor, generator: np.random.Generator) -> Tensor | float:
        """The dilution of a step's samples, `[B, S, 1, N, 1]`, of kinds `[B, S * N]`."""
        if self.max_dilution <= 1.0:
            return 1.0
        factors = np.exp(generator.uniform(0.0, math.log(self.max_dilution), kinds.shape[0]))
        factors[generator.random(factors.shape) >= self.diluted_share] = 1.0
        return dilution(kinds, torch.from_numpy(factors).float(), self.segment_length)


def dilution(kinds: Tensor, factors: Tensor, segment_length: int) -> Tensor:
    """How often a byte counts in the memory, `[B, S, 1, N, 1]`: `factors` `[B]` in segments of filler alone, else 1.

    Args:
        kinds: `[B, S * N]`.
    """
    is_filler = (kinds.view(kinds.shape[0], -1, segment_length) == PLAIN).all(-1)
    # The bytes around a key lie in the neighbouring segments, and are part of what must be remembered.
    guarded = is_filler.clone()
    guarded[:, 1:] &= is_filler[:, :-1]
    guarded[:, :-1] &= is_filler[:, 1:]
    scale = torch.where(guarded, factors[:, None], torch.ones(()))
    return scale[:, :, None, None, None].expand(-1, -1, 1, segment_length, 1)
