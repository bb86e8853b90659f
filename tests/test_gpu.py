"""What a GPU needs. Without one, on fake CUDA tensors, which have shapes and layouts and no numbers."""

import copy
from collections import Counter
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import torch
from support import CPU, make_training, step_batches
from torch import nn
from torch._subclasses.fake_tensor import (
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

import train
from dbnet.checkpoint import build_model
from dbnet.config import Config
from dbnet.dataset import TextDataset
from dbnet.device import pick_device
from dbnet.ensemble import Ensemble
from dbnet.errors import UserError
from dbnet.inference import Pipeline
from dbnet.loss import db_loss
from dbnet.model import DBNet
from dbnet.training import LastSave, Training, load_last

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


# ---- where there is one


def test_maps_losses_and_gradients_are_those_of_the_cpu(small, device):
    batches, found = step_batches(small), []
    for each in (CPU, device):
        training = make_training(small.changed(amp="off"), device=each)
        losses, norm = train.optimizer_step(training, batches, small.changed(amp="off"))
        training.model.eval()
        with torch.inference_mode():
            maps = training.model(batches[0]["image"].to(each))
        found.append([losses.cpu(), norm.cpu(), maps.cpu(), training.model.prob_branch[0].weight.grad.cpu()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-4)


def test_evaluation_finds_the_maps_of_the_cpu(small, device):
    dataset, maps = TextDataset(small, "val", train=False), []
    torch.manual_seed(0)
    model = DBNet(small).eval()
    for each in (CPU, device):
        pipeline = Pipeline(dataset, small.changed(amp="off"), each)
        network = Ensemble.of(copy.deepcopy(model), small.changed(amp="off"), each)
        maps.append({found.index: found.prob_map.astype(int) for found in pipeline.detect(network)})
    assert maps[0].keys() == maps[1].keys() == set(range(len(dataset)))
    assert all(np.abs(maps[0][index] - maps[1][index]).max() <= 1 for index in maps[0])


def test_a_resumed_training_takes_the_steps_of_one_that_was_not_interrupted(small, device, tmp_path):
    config = small.changed(batch_size=2, accumulate=1, ema=0.9, amp="bf16")
    batches = step_batches(config.changed(accumulate=3))
    whole = make_training(config, device=device)
    for batch in batches[:2]:
        train.optimizer_step(whole, [batch], config)
    LastSave(tmp_path, config).save(whole)
    train.optimizer_step(whole, batches[2:], config)
    saved = load_last(tmp_path)
    resumed = Training(build_model(config, tmp_path, saved, None), config, device)
    resumed.load_state(saved, config)
    train.optimizer_step(resumed, batches[2:], config)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert all(map(torch.equal, whole.average.model.parameters(), resumed.average.model.parameters()))


def test_cuda_1_is_the_second_gpu_throughout(small):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    device = pick_device("cuda:1")
    before = torch.cuda.memory_allocated(0)
    training = make_training(small.changed(amp="fp16"), device=device)
    losses, _ = train.optimizer_step(training, step_batches(small), small.changed(amp="fp16"))
    assert losses.device == device and losses.isfinite().all()
    assert torch.cuda.memory_allocated(0) == before


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("cuda:99", {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ("cuda:99", {"PYTORCH_CUDA_ALLOC_CONF": "a:1"}, {"PYTORCH_CUDA_ALLOC_CONF": "a:1"}),
        ("cuda:99", {"PYTORCH_ALLOC_CONF": "a:1"}, {"PYTORCH_ALLOC_CONF": "a:1"}),
        ("cpu", {}, {}),
    ],
)
def test_memory_of_a_gpu_is_in_segments_that_grow_unless_the_user_sets_it_up(monkeypatch, name, before, after):
    monkeypatch.setattr("os.environ", before)
    with suppress(UserError):  # there is no such GPU
        pick_device(name)
    assert before == after
