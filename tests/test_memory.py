"""Out of memory: what shrinks, in which order, and that nothing of the optimizer step is lost."""

import copy
import weakref
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import CPU, fail_above, make_training, step_batches
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import train
from dbnet import memory
from dbnet.dataset import TextDataset
from dbnet.errors import UserError
from dbnet.memory import BatchPlan, is_out_of_memory, run_until_it_fits
from dbnet.training import RunningEpoch

TENSORS = ("image", "prob_map", "thresh_levels", "mask")


def test_a_tight_batch_keeps_its_shape_when_the_image_shrinks(small):
    config = small.changed(pad="tight")
    [batch] = step_batches(config)
    height, width = batch["image"].shape[1:3]
    plan = BatchPlan(config.batch_size, 1, config.image_size // 2)
    [micro] = train.micro_batches([batch], plan, CPU)
    assert (
        micro["image"].shape[1:3]
        == micro["mask"].shape[1:]
        == tuple(-(-length // 2 // 32) * 32 for length in (height, width))
    )
    assert micro["image"].dtype == torch.uint8 and micro["thresh_levels"].max() <= 255


@pytest.mark.parametrize(("limit", "in_force"), [(4, "4 x 4"), (2, "2 x 8"), (1, "1 x 16")])
def test_oom_halves_the_batch_and_keeps_the_effective_batch(limit, in_force, capsys):
    plan = BatchPlan(8, 2, 1024)

    def work():
        if plan.micro_batch > limit:
            raise torch.OutOfMemoryError("injected")
        return plan.in_force

    assert run_until_it_fits(work, plan) == in_force
    assert plan.image_size == 1024
    assert capsys.readouterr().err.count("out of memory: ") == len(plan.fallbacks)


def test_after_the_smallest_batch_the_image_shrinks_at_the_first_batch():
    plan, seen = BatchPlan(8, 2, 1024), []

    def work():
        seen.append((plan.in_force, plan.image_size))
        if plan.image_size > 800:
            raise torch.OutOfMemoryError("injected")

    run_until_it_fits(work, plan)
    batches = ["8 x 2", "4 x 4", "2 x 8", "1 x 16"]
    assert seen == [(batch, size) for size in (1024, 896) for batch in batches] + [("8 x 2", 800)]


def test_when_nothing_fits_the_error_says_what_was_tried():
    def work():
        raise torch.OutOfMemoryError("injected")

    with pytest.raises(UserError, match=r"8 x 2 at 1024 px -> 4 x 4.*896 px.*1 x 16 at 800 px does not fit"):
        run_until_it_fits(work, BatchPlan(8, 2, 1024))


def test_inference_halves_its_batch_but_never_changes_the_image():
    def work():
        raise MemoryError

    with pytest.raises(UserError, match="batch 4 -> batch 2; batch 2 -> batch 1; batch 1 does not fit"):
        run_until_it_fits(work, BatchPlan(4))


def test_an_error_that_is_not_out_of_memory_is_raised():
    with pytest.raises(RuntimeError, match="shapes"):
        run_until_it_fits(lambda: (_ for _ in ()).throw(RuntimeError("shapes")), BatchPlan(4))


def test_a_step_run_again_has_the_gradients_and_weights_of_one_that_started_small(small, device):
    config = small.changed(accumulate=2, batch_size=3)  # 6 samples a step: 3 x 2 -> 1 x 6
    batches = step_batches(config)
    retried = make_training(config, device=device)
    started_small = make_training(config, copy.deepcopy(retried.model), device)
    started_small.plan.halvings = 1
    fail_above(retried.model, 1)
    for training in (retried, started_small):
        train.optimizer_step(training, batches, config)
    assert retried.plan.in_force == started_small.plan.in_force == "1 x 6"
    for ours, theirs in zip(retried.model.parameters(), started_small.model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(retried.model.buffers(), started_small.model.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_fallback_moves_the_batch_norm_statistics_as_far_as_the_whole_batch(small):
    [batch] = step_batches(small)
    batch |= {name: batch[name][:1].repeat_interleave(4, dim=0) for name in TENSORS}  # so that all parts are alike
    statistics = []
    for limit in (4, 1):
        training = make_training(small)
        fail_above(training.model, limit)
        train.optimizer_step(training, [batch], small)
        norm = training.model.prob_branch[1]
        statistics.append((training.plan.in_force, norm.running_mean.clone(), norm.running_var.clone()))
    (whole, *ours), (parts, *theirs) = statistics
    assert whole == "4 x 1" and parts == "1 x 4" and ours[0].abs().max() > 0.01
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-4)
    training.plan.halvings = 0
    training.note_start()
    assert training.model.prob_branch[1].momentum == 0.1


def test_the_copy_made_ahead_is_freed_when_memory_runs_out(small, monkeypatch):
    config = small.changed(batch_size=2, accumulate=2)
    batches, training, copies, alive = step_batches(config), make_training(config), [], []
    original = memory._copies

    def note(*args):
        for micro, loaded_at in original(*args):
            copies.extend(weakref.ref(tensor) for tensor in micro.values())
            yield micro, loaded_at

    def shrink(self):
        alive.append([copy for copy in copies if copy() is not None])
        self.halvings += 1

    monkeypatch.setattr(memory, "_copies", note)
    monkeypatch.setattr(BatchPlan, "shrink", shrink)
    fail_above(training.model, 1)
    train.optimizer_step(training, batches, config)
    assert len(copies) == 4 * (2 + 4) and alive == [[]]  # one micro-batch and the one ahead of it, then four


class FakeStream:
    """A CUDA stream that notes what is asked of it."""

    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def __enter__(self):
        self.calls.append(f"on the {self.name} stream")

    def __exit__(self, *_):
        self.calls.append("copied")

    def wait_stream(self, other):
        self.calls.append(f"{self.name} waits for {other.name}")


def test_each_micro_batch_is_copied_beside_the_one_before_and_used_when_it_is_there(small, monkeypatch):
    """With streams that only note what happens, in place of those of a GPU."""
    config, calls = small.changed(batch_size=1, accumulate=3), []
    side, computing = FakeStream("side", calls), FakeStream("computing", calls)
    monkeypatch.setattr(memory, "_copy_stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: calls.append(f"kept for {stream.name}"))
    for _ in memory.micro_batches(step_batches(config), BatchPlan(1, 3, config.image_size), CPU):
        calls.append("used")
    copy, ready = ["on the side stream", "copied"], ["computing waits for side"] + 4 * ["kept for computing"]
    assert calls == [*copy, *ready, *copy, "used", *ready, *copy, "used", *ready, "used"]


class FailAt(TorchDispatchMode):
    """Runs out of memory at the operation of this number, counted from 1."""

    def __init__(self, number):
        super().__init__()
        self.number, self.count = number, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.number:
            raise torch.OutOfMemoryError(f"injected at {operation}")
        return operation(*args, **(kwargs or {}))


def step_that_fails_at(number, start, batches, config, halvings=0):
    """A step and its bookkeeping: all that it has changed, and the plan and operations at its end."""
    training = make_training(config, copy.deepcopy(start))
    training.plan.halvings = halvings
    training.running = RunningEpoch(config.image_size)
    torch.manual_seed(1)
    with FailAt(number) as mode:
        losses, norm = train.optimizer_step(training, batches, config)
        training.running.note(losses, norm)
    optimizer = training.optimizer.state_dict()["state"]
    tensors = [
        *training.model.state_dict().values(),
        *training.average.model.state_dict().values(),
        *(tensor for state in optimizer.values() for tensor in state.values()),
        *(losses, norm, training.running.losses, training.running.steps, torch.get_rng_state()),
        torch.tensor([training.average.steps, training.scaler.get_scale()]),
    ]
    return tensors, training.plan.halvings, mode.count


@pytest.mark.parametrize("count", [24, pytest.param(None, marks=pytest.mark.long)])
def test_out_of_memory_at_any_operation_of_a_step_leaves_what_a_smaller_plan_gives(small, count):
    """Or, where the weights change already, what the plan in force gives: no operation runs twice, none is missing."""
    backbone = "efficientnet_b0" if count else "resnet18"  # with random numbers, or with few enough operations for all
    config = small.changed(batch_size=2, accumulate=1, image_size=64, ema=0.9, backbone=backbone)
    batches = step_batches(config)
    start = make_training(config).model
    expected, _, operations = step_that_fails_at(0, start, batches, config)
    smaller, _, _ = step_that_fails_at(0, start, batches, config, halvings=1)
    assert operations > 500
    numbers = range(1, operations + 1)
    if count:  # of the last ones, which update the weights, all
        numbers = [*numbers[: -60 : operations // count], *numbers[-60:]]
    fallbacks = 0
    for number in numbers:
        tensors, halvings, _ = step_that_fails_at(number, start, batches, config)
        fallbacks += halvings
        for ours, theirs in zip(tensors, smaller if halvings else expected, strict=True):
            assert torch.equal(ours, theirs), number
    assert fallbacks > 10


class NoSync(TorchDispatchMode):
    """Fails on what would let the host wait for a device."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item", "masked_select", "unique")
        assert name.removeprefix("aten::") not in waits, name
        to = (kwargs or {}).get("device")
        assert name != "aten::_to_copy" or to in (None, args[0].device), "copied to another device"
        return operation(*args, **(kwargs or {}))


class StaysThere(TorchFunctionMode):
    """Fails on what brings a tensor to the host, which on a CPU is no operation."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        assert name not in ("cpu", "numpy", "tolist", "item", "__bool__", "__float__", "__int__", "__index__"), name
        return function(*args, **(kwargs or {}))


def test_a_step_and_its_bookkeeping_never_wait_for_the_device(small, device):
    config = small.changed(batch_size=2, accumulate=2, ema=0.9, amp="bf16")
    training, batches = make_training(config, device=device), step_batches(config)
    training.running = RunningEpoch(config.image_size).to(device)
    for batch in batches:
        sides = batch["side"].numpy()
        batch["side"] = SimpleNamespace(numpy=partial(np.copy, sides))  # these are on the host
    if device.type == "cuda":
        batches = [{name: pinned(value) for name, value in batch.items()} for batch in batches]
        train.optimizer_step(training, batches, config)  # the first one builds what the others use
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            with ExitStack() as modes:
                if device.type == "cpu":
                    modes.enter_context(NoSync())
                    modes.enter_context(StaysThere())
                losses, norm = train.optimizer_step(training, batches, config)
                training.running.note(losses, norm)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["item", "nonzero", "cpu", "numpy", "tolist", "__bool__", "__float__"])
def test_what_waits_for_the_device_is_seen(name):
    total = torch.zeros(3).sum()
    with NoSync(), StaysThere(), pytest.raises(AssertionError):
        getattr(total, name)()


def pinned(value):
    return value.pin_memory() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: out of memory",
        "could not create a primitive",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "NCCL error: unhandled cuda error. Last error: Failed to CUDA calloc async 608 bytes",
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
        "FIND was unable to find an engine to execute this computation",
        "Unable to find a valid cuDNN algorithm to run convolution",
        "std::bad_alloc",
    ],
)
def test_all_ways_to_say_out_of_memory_count(message):
    assert is_out_of_memory(RuntimeError(message))


@pytest.mark.parametrize(
    "message", ["mat1 and mat2 shapes cannot be multiplied", "could not create a primitive descriptor for convolution"]
)
def test_other_errors_do_not_count_as_out_of_memory(message):
    assert not is_out_of_memory(RuntimeError(message))


def test_an_epoch_with_fallbacks_has_the_same_steps_and_samples(small, monkeypatch):
    config = small.changed(batch_size=2, accumulate=2)  # 6 images: two steps of 4 and 2
    original, runs = train.step_batches, {}
    for limit in (2, 1):
        training, record, steps = make_training(config), [], []
        fail_above(training.model, limit, record)
        dataset = TextDataset(config, "train", train=True)
        seen = []

        def note(step_batches, accumulate, steps=steps, seen=seen):
            for group, death in original(step_batches, accumulate):
                steps.extend([len(group)] if group else [])
                seen.extend(index for batch in group for index in batch["index"].tolist())
                yield group, death

        with monkeypatch.context() as patch:
            patch.setattr(train, "step_batches", note)
            train.train_epoch(training, dataset, config)
        runs[limit] = (steps, sorted(seen), sum(count for count, _ in record))
    assert runs[2] == runs[1] == ([2, 1], list(range(6)), 6)


def test_after_a_fallback_of_the_image_the_loaded_samples_run_smaller(small):
    config = small.changed(image_size=1024, batch_size=1, data=small.data)
    batch = step_batches(config)
    training, sizes = make_training(config), []

    def check(_module, inputs):
        sizes.append(inputs[0].shape[1])
        if inputs[0].shape[1] > 896:
            raise torch.OutOfMemoryError("injected")

    training.model.register_forward_pre_hook(check)
    losses, _ = train.optimizer_step(training, batch, config)
    assert sizes == [1024, 896]
    assert training.plan.image_size == 896
    assert losses.isfinite().all()
