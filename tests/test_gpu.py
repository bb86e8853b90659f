"""What a GPU needs, tried without one: on fake CUDA tensors, which have shapes and layouts and no numbers."""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dbnet.config import Config
from dbnet.loss import db_loss
from dbnet.model import DBNet

PRESETS = ["v0", "v1", "v2", "v3", "lite"]


class Layouts(TorchDispatchMode):
    """Counts convolutions, and those of their inputs that are not in channels_last order."""

    def __init__(self):
        super().__init__()
        self.convolutions, self.others = 0, Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten.convolution.default:
            self.convolutions += 1
            for tensor in args[:2]:
                if not tensor.is_contiguous(memory_format=torch.channels_last):
                    self.others[tuple(tensor.shape)] += 1
        return operation(*args, **(kwargs or {}))


def fake_network(config):
    """The network on a GPU that is not there, its kernels in channels_last order."""
    with torch.device("cuda"):
        model = DBNet(config).train()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 4:
                kernel = parameter.detach().to(memory_format=torch.channels_last)
                module.register_parameter(name, nn.Parameter(kernel))
    return model


@contextmanager
def autocast():
    """torch.autocast("cuda"), which turns itself off where there is no GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


def fake_inputs():
    """Images and target maps."""
    maps = torch.zeros(2, 128, 128, dtype=torch.uint8, device="cuda")
    return torch.zeros(2, 128, 128, 3, dtype=torch.uint8, device="cuda"), maps


@pytest.mark.parametrize("preset", PRESETS)
def test_forward_and_loss_in_mixed_precision_never_wait_for_the_gpu(preset):
    config = Config.from_preset(preset, weights="none")
    with FakeTensorMode():
        model, (images, maps) = fake_network(config), fake_inputs()
        with autocast():
            found = model(images)
        losses = db_loss(found, maps, maps, maps, config)  # a fake tensor raises where its number is asked for
    assert found.prob_logits.dtype == torch.bfloat16
    assert losses.total.device.type == "cuda" and losses.total.dtype == torch.float32


@pytest.mark.parametrize("preset", PRESETS)
def test_the_network_stays_in_channels_last_order(preset):
    # In float32: without cuDNN, PyTorch picks kernels for 16 bits that have another order.
    with FakeTensorMode():
        model, (images, _) = fake_network(Config.from_preset(preset, weights="none")), fake_inputs()
        with Layouts() as layouts:
            model(images)
    assert layouts.convolutions > 20 and not layouts.others


def test_a_fake_tensor_raises_where_the_host_would_wait():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.zeros(3, device="cuda").sum().item()
