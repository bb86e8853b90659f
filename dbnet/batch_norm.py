"""Batch norm over the micro-batches of all ranks together.

torch.nn.SyncBatchNorm would wait for ever for a rank that has run out of memory, and needs GPUs.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dbnet import distributed
from dbnet.memory import agree


class SynchronizedBatchNorm(nn.BatchNorm2d):
    """In training mode, normalizes by mean and variance over the ranks. A rank may have an empty batch, (0, C, H, W),
    but each has to call it as often as the others, forward and backward."""

    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training or distributed.world_size() == 1:
            return super().forward(inputs)
        values = inputs.float()
        sums = torch.cat([values.sum((0, 2, 3)), values.new_tensor([values.numel() / values.shape[1]])])
        *_, count = sums = _SumOverRanks.apply(sums)
        mean = (sums[:-1] / count).view(1, -1, 1, 1)
        centred = values - mean
        variance = _SumOverRanks.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = (self.weight / torch.sqrt(variance + self.eps)).view(1, -1, 1, 1)
        return (centred * scale + self.bias.view(1, -1, 1, 1)).to(inputs.dtype)


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over the ranks, and of its gradient."""

    @staticmethod
    def forward(_: Any, numbers: Tensor) -> Tensor:
        return _sum_over_ranks(numbers)

    @staticmethod
    @once_differentiable
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return _sum_over_ranks(gradient)


def _sum_over_ranks(numbers: Tensor) -> Tensor:
    summed = numbers.clone()
    agree(True)  # a rank that has run out of memory says so here, instead of letting the others wait
    distributed.all_reduce(summed)
    return summed


def synchronize_batch_norms(module: nn.Module) -> None:
    """Let every batch norm inside `module` work over all ranks, in place; the state_dict stays as it is."""
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = SynchronizedBatchNorm
