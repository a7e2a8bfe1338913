"""A step's samples shared between the processes of `torch.distributed`: the sums that make many workers equal to one.

A process that is alone sends nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn


def rank_and_count() -> tuple[int, int]:
    """Which worker this is, and of how many."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def summed(values: Tensor) -> Tensor:
    """The sum of all workers' values; may overwrite them."""
    if rank_and_count()[1] > 1:
        distributed.all_reduce(values)
    return values


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Give every worker the sum of all gradients; one that it lacks counts as zero."""
    if rank_and_count()[1] == 1:
        return
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    total = summed(torch.cat([gradient.flatten() for gradient in gradients]))
    for parameter, part in zip(parameters, total.split([each.numel() for each in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
