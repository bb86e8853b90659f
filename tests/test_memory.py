"""Out of memory: what shrinks, in which order, and that nothing of the optimizer step is lost."""

import copy

import pytest
import torch
from support import CPU, fail_above, make_training, step_batches

import train
from dbnet.dataset import Batches, TextDataset, make_loader
from dbnet.errors import UserError
from dbnet.memory import BatchPlan, is_out_of_memory, run_until_it_fits


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


def test_host_memory_errors_count_and_other_errors_do_not():
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert is_out_of_memory(RuntimeError("FIND was unable to find an engine to execute this computation"))
    assert is_out_of_memory(RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        run_until_it_fits(lambda: (_ for _ in ()).throw(RuntimeError("shapes")), BatchPlan(4))


@pytest.mark.parametrize("limit", [2, 1])
def test_a_step_run_again_has_the_gradients_and_weights_of_one_that_started_small(small, limit):
    config = small.changed(accumulate=2, batch_size=3)  # 6 samples a step: 3 x 2 -> 1 x 6
    batches = step_batches(config)
    retried = make_training(config)
    started_small = make_training(config, copy.deepcopy(retried.model))
    started_small.plan.halvings = 1
    fail_above(retried.model, 1)
    for training in (retried, started_small):
        train.optimizer_step(training, batches, config, CPU)
    assert retried.plan.in_force == started_small.plan.in_force == "1 x 6"
    for ours, theirs in zip(retried.model.parameters(), started_small.model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(retried.model.buffers(), started_small.model.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("where", ["backward", "optimizer"])
def test_oom_in_backward_or_optimizer_runs_the_step_again_unharmed(small, where, monkeypatch):
    batches = step_batches(small)
    training = make_training(small)
    reference = make_training(small, copy.deepcopy(training.model))
    reference.plan.halvings = 1
    failures = iter([True])

    if where == "backward":

        def fail_once(_gradient):
            if next(failures, False):
                raise torch.OutOfMemoryError("injected")

        next(training.model.backbone.parameters()).register_hook(fail_once)
    else:
        step = training.optimizer.step

        def fail_first(*args, **kwargs):
            if next(failures, False):
                parameter = training.optimizer.param_groups[0]["params"][0]
                training.optimizer.state[parameter]["step"] = torch.tensor(0.0)  # an allocation cut short
                raise torch.OutOfMemoryError("injected")
            return step(*args, **kwargs)

        monkeypatch.setattr(training.optimizer, "step", fail_first)
    for each in (training, reference):
        train.optimizer_step(each, batches, small, CPU)
    for ours, theirs in zip(training.model.parameters(), reference.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_epoch_with_fallbacks_has_the_same_steps_and_samples(small, monkeypatch):
    config = small.changed(batch_size=2, accumulate=2)  # 6 images: two steps of 4 and 2
    original, runs = train.group_batches, {}
    for limit in (2, 1):
        training, record, steps = make_training(config), [], []
        fail_above(training.model, limit, record)
        dataset = TextDataset(config, "train", train=True)
        batches = Batches(dataset, config.batch_size, config.seed)
        seen = []

        def note(step_batches, accumulate, steps=steps, seen=seen):
            for group in original(step_batches, accumulate):
                steps.append(len(group))
                seen.extend(index for batch in group for index in batch["index"].tolist())
                yield group

        with monkeypatch.context() as patch:
            patch.setattr(train, "group_batches", note)
            train.train_epoch(training, make_loader(batches, 0, False), config, CPU, set())
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
    losses, _ = train.optimizer_step(training, batch, config, CPU)
    assert sizes == [1024, 896]
    assert training.plan.image_size == 896
    assert losses.isfinite().all()
