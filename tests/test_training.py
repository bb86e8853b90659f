"""The training loop: schedule, precision, steps that are not finite, and learning at all."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from support import make_training, step_batches
from torch import nn

import train
from dbnet.annotations import Annotation
from dbnet.config import PRESETS
from dbnet.dataset import TextDataset
from dbnet.device import pick_amp_dtype
from dbnet.errors import UserError
from dbnet.evaluation import Evaluation, advise_on_collapse
from dbnet.training import WeightAverage, learning_rate


def run_epoch(training, config):
    training.running = None
    return train.train_epoch(training, TextDataset(config, "train", train=True), config)


def poison(model, steps):
    """Let the network's logits overflow in those of its calls whose number is in `steps`."""
    calls = iter(range(1000))

    def overflow(_module, _inputs, maps):
        return maps._replace(prob_logits=maps.prob_logits * float("inf")) if next(calls) in steps else None

    model.register_forward_hook(overflow)


def test_schedules_by_epoch():
    step = PRESETS["baseline"].changed(step_epochs=2)
    assert [learning_rate(step, epoch) for epoch in range(5)] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-5])
    cosine = PRESETS["v0"]
    assert learning_rate(cosine, 0) == 1e-3
    assert learning_rate(cosine, 10) == pytest.approx((1e-3 + 1e-6) / 2)
    assert learning_rate(cosine, 20) == pytest.approx(1e-6)


def test_warm_up_rises_step_by_step_to_the_schedule():
    config = PRESETS["v0"].changed(warmup_epochs=2.0)
    rates = [learning_rate(config, epoch, progress) for epoch in range(3) for progress in (0.5, 1.0)]
    without = [learning_rate(PRESETS["v0"], epoch) for epoch in range(3)]
    assert rates == pytest.approx([rate * without[i // 2] for i, rate in enumerate((0.25, 0.5, 0.75, 1, 1, 1))])


def test_frozen_batch_norm_statistics_stay_while_the_weights_move(small):
    config = small.changed(freeze_batch_norm=True, batch_size=2)
    training = make_training(config)
    before = copy.deepcopy(training.model.state_dict())
    run_epoch(training, config)
    moved = {name for name, tensor in training.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name, _ in training.model.named_parameters()}


def test_the_average_follows_the_weights_and_is_what_is_scored(small):
    config = small.changed(ema=0.9, batch_size=2)
    training = make_training(config)
    training.average = WeightAverage(training.model, config.ema)
    run_epoch(training, config)
    assert training.scored_model is training.average.model and training.average.steps == 3
    ours, theirs = training.average.model.state_dict(), training.model.state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in ours.values())
    assert not torch.equal(ours["pyramid.smooth.0.weight"], theirs["pyramid.smooth.0.weight"])

    average = WeightAverage(nn.Linear(1, 1, bias=False), 0.5)
    average.model.weight.fill_(0.0)
    one = nn.Linear(1, 1, bias=False)
    nn.init.ones_(one.weight)
    expected = 0.0
    for step in range(1, 13):
        average.update(one)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + 1 - decay
        assert average.model.weight.item() == pytest.approx(expected)
    again = WeightAverage(nn.Linear(1, 1, bias=False), 0.5)
    again.load_state_dict(average.state_dict())
    assert again.steps == 12 and torch.equal(again.model.weight, average.model.weight)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_few_steps_lower_the_loss_in_every_precision(small, amp):
    config = small.changed(amp=amp, batch_size=2, flip_p=0.0, brightness_contrast_p=0.0, clahe_p=0.0)
    training = make_training(config)
    losses = []
    for epoch in range(4):
        training.epoch = epoch
        losses.append(run_epoch(training, config)["total_loss"])
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_a_gpu_that_only_emulates_bfloat16_takes_float16(small, monkeypatch, capability, dtype):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert pick_amp_dtype(small.changed(amp="auto"), torch.device("cuda:1")) == dtype


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(small):
    training = make_training(small)
    poison(training.model, {0})
    before = copy.deepcopy(training.model.state_dict())
    train.optimizer_step(training, step_batches(small), small)
    for name, tensor in training.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name

    training = make_training(small)
    poison(training.model, {0})
    row = run_epoch(training, small)  # two steps
    assert row["skipped_steps"] == 1
    assert row["total_loss"] > 0


def test_training_stops_when_the_loss_stays_not_finite(small):
    config = small.changed(batch_size=1)
    training = make_training(config)
    poison(training.model, set(range(1000)))
    with pytest.raises(UserError, match=r"not finite for \d steps in a row.*--lr"):
        run_epoch(training, config)


def test_steps_that_are_not_finite_are_counted_over_the_ends_of_epochs(small):
    training = make_training(small)
    poison(training.model, set(range(1000)))
    with pytest.raises(UserError, match=r"not finite for 6 steps in a row in epoch 3"):
        for training.epoch in range(9):  # of two steps each
            training.running = None
            run_epoch(training, small)


@pytest.mark.parametrize("clip", [0.0, 5.0])
def test_gradients_whose_norm_alone_is_not_finite_change_nothing(small, clip):
    config = small.changed(clip_grad_norm=clip)
    training = make_training(config)
    next(training.model.parameters()).register_hook(lambda gradient: torch.full_like(gradient, 1e22))
    before = copy.deepcopy(training.model.state_dict())
    _, norm = train.optimizer_step(training, step_batches(config), config)
    assert not norm.isfinite()
    for name, tensor in training.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for moments in training.optimizer.state.values():
        assert not moments["exp_avg"].any()


def test_steps_that_are_not_finite_are_counted_over_a_resume(small):
    training = make_training(small)
    poison(training.model, {0, 1})
    run_epoch(training, small)
    training.running = None  # the epoch is over
    again = make_training(small)
    again.load_state(training.state() | {"config": small}, small)
    poison(again.model, set(range(1000)))
    with pytest.raises(UserError, match=r"not finite for 6 steps in a row in epoch 3"):
        for again.epoch in (1, 2):
            again.running = None
            run_epoch(again, small)


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_without_fp16_skipped_steps_leave_the_loss_scale_alone(small, amp):
    config = small.changed(amp=amp, image_size=64, batch_size=1)
    training, batches = make_training(config), step_batches(config)
    poison(training.model, {0, 1, 2})
    for _ in range(3):
        train.optimizer_step(training, batches, config)
    assert training.scaler.get_scale() == 1
    before = [parameter.clone() for parameter in training.model.parameters()]
    train.optimizer_step(training, batches, config)
    assert not any(torch.equal(*pair) for pair in zip(before[-2:], list(training.model.parameters())[-2:], strict=True))


def test_training_stops_when_gradients_stay_not_finite_though_the_loss_is(small):
    config = small.changed(batch_size=1, image_size=64)
    training = make_training(config)
    next(training.model.backbone.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(UserError, match=r"not finite for \d steps in a row.*--lr"):
        run_epoch(training, config)


def test_accumulation_gives_the_gradient_of_the_whole_batch(small, device):
    """Four times the same sample, batch norm in eval mode: then every split has the same loss, and so the same mean."""
    [batch] = step_batches(small)
    maps = ("image", "prob_map", "thresh_levels", "mask", "side")
    batch = {name: batch[name][:1].repeat_interleave(4, dim=0) for name in maps}
    config = small.changed(clip_grad_norm=0.0)
    together, apart = make_training(config, device=device), make_training(config, device=device)
    apart.plan.halvings = 2
    for training in (together, apart):
        for layer in training.model.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.eval()
        train.optimizer_step(training, [batch], config)
    assert together.plan.in_force == "4 x 1" and apart.plan.in_force == "1 x 4"
    for ours, theirs in zip(together.model.parameters(), apart.model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


def test_a_validation_without_detections_says_what_to_look_at():
    word = [[0, 0], [40, 0], [40, 10], [0, 10]]
    config = PRESETS["v1"].changed(thresh=0.3, box_thresh=0.6)

    def advice(words, detections, highest):
        evaluation = Evaluation()
        evaluation.update("a.jpg", Annotation(words, [False] * len(words)), detections, highest=highest)
        return advise_on_collapse(evaluation, config)

    assert "0.12, and --thresh is 0.3" in advice([word], [], 0.12)
    assert "reach 0.55" in advice([word], [], 0.55) and "--box-thresh 0.6" in advice([word], [], 0.55)
    assert advice([word], [word], 0.9) is None
    assert advice([], [], 0.1) is None  # no text, none found


@pytest.mark.parametrize("preset", ["v2", "v3", pytest.param("best", marks=pytest.mark.long)])
def test_an_epoch_of_the_large_presets_on_real_receipts(receipts, preset, tmp_path, monkeypatch):
    """At 96 px, on four receipts; multi-scale where the preset is, with its accumulation, fusion and average."""
    if preset == "best":
        pytest.importorskip("timm")
    content = json.loads((receipts / "jsons" / "train.json").read_text())
    content["images"] = dict(list(content["images"].items())[:4])
    for split in ("train", "val"):
        (tmp_path / "data" / "images" / split).mkdir(parents=True)
        (tmp_path / "data" / "jsons").mkdir(exist_ok=True)
        (tmp_path / "data" / "jsons" / f"{split}.json").write_text(json.dumps(content))
        for name in content["images"]:
            shutil.copy(receipts / "images" / "train" / name, tmp_path / "data" / "images" / split)
    monkeypatch.chdir(tmp_path)
    config = PRESETS[preset].changed(
        data="data",
        weights="none",
        image_size=96,
        train_sizes=(64, 96) if PRESETS[preset].train_sizes else (),
        batch_size=1,
        epochs=1,
        workers=0,
    )
    train.train(config, Path("runs/tiny"))
    [row] = map(json.loads, Path("runs/tiny/log.jsonl").read_text().splitlines())
    assert row["epoch"] == 1 and row["total_loss"] > 0 and row["skipped_steps"] == 0
    assert row["batch"] == "1 x 4"
    assert Path("runs/tiny/best.pt").exists()
