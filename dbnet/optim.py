"""What turns gradients into weights: optimizer, learning rate, loss scaler, and the average of the weights."""

import copy
import math
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dbnet.config import Config, TrainConfig
from dbnet.device import pick_amp_dtype


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Fused, because a fused step allocates nothing once its state exists: it cannot run out of memory half-way."""
    optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return optimizer(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)


@torch.no_grad()
def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the optimizer's state now, all zero, by a step that changes no weight; the first real one would do it when
    memory is at its fullest."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()


def make_scaler(config: Config, device: torch.device) -> torch.amp.GradScaler:
    """Scale the loss for fp16. In other types the scale is 1 and what is left is the scaler's other service: to skip,
    on the device and without asking the host, a step whose gradients are not finite."""
    if pick_amp_dtype(config, device) == torch.float16:
        return torch.amp.GradScaler(device.type)
    return torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=2**31 - 1)


def learning_rate(config: TrainConfig, epoch: int, progress: float = 1.0) -> float:
    """The learning rate of an epoch, counted from 0, when `progress` (0..1) of it is done.

    The schedule goes by whole epochs; within the first config.warmup_epochs the rate rises to it in proportion.
    """
    if config.schedule == "step":
        rate = config.lr * config.step_gamma ** (epoch // config.step_epochs)
    else:
        rate = config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * epoch / config.epochs)) / 2
    return rate * min(1.0, (epoch + progress) / config.warmup_epochs) if config.warmup_epochs else rate


class WeightAverage:
    """Exponential moving average of a network's weights and batch norm statistics, on the network's device.

    In the first steps the decay is (1 + n) / (10 + n) at step n, so that the average leaves the initial weights soon.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.model = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the weights after an optimizer step into the average."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        pairs = list(zip(_tensors(self.model), _tensors(model), strict=True))
        averages, current = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
        get_ema_multi_avg_fn(decay)(averages, current, None)
        for average, counter in (pair for pair in pairs if not pair[0].is_floating_point()):
            average.copy_(counter)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, for checkpoints."""
        return {"steps": self.steps, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        self.steps = state["steps"]
        self.model.load_state_dict(state["model"])


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    return chain(model.parameters(), model.buffers())
