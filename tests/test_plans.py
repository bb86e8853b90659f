"""benchmarks/plans.py: every plan of the fallback has its row, measured or with the reason why not."""

import pytest
import torch
from support import CPU, command

import train
from benchmarks import plans
from benchmarks.plans import fallback_cases, measure_case, print_plans, synthetic_batch
from dbnet.config import Config
from dbnet.dataset import Batches, TextDataset, make_loader
from dbnet.model import DBNet
from dbnet.training import Training


def test_the_command_measures_each_batch_of_the_fallback(rendered, tmp_path):
    flags = ["--preset", "lite", "--image-size", "64", "--batch-size", "2", "--accumulate", "3", "--epochs", "9"]
    result = command("benchmarks/plans.py", *flags, "--data", rendered, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if " px " in line]
    assert [" ".join(row[:5]) for row in rows] == ["64 px 2 x 3", "64 px 1 x 6"]
    for row in rows:
        memory, speed, minutes, unit = row[5:9]
        memory, speed, minutes = float(memory), float(speed), float(minutes)
        assert 0.01 < memory < 4 and unit == "min"
        assert minutes == pytest.approx(9 * 6 / speed / 60, abs=0.06)
    assert f"6 images each ({rendered})" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_cases_are_the_fallback_in_its_order():
    cases = fallback_cases(Config.from_preset("v1"))
    plans = [(case.image_size, case.batch_size, case.accumulate) for case in cases]
    assert plans == [(size, *plan) for size in (1024, 896, 800) for plan in ((8, 2), (4, 4), (2, 8), (1, 16))]
    assert len(fallback_cases(Config.from_preset("v0", batch_size=1))) == 1


def test_a_synthetic_batch_is_like_one_of_the_loader(small):
    [real, *_] = make_loader(Batches(TextDataset(small, "train", train=True), small.batch_size), 0, False)
    synthetic = synthetic_batch(small)
    for name in ("image", "prob_map", "thresh_levels", "mask", "side"):
        assert synthetic[name].shape == real[name].shape and synthetic[name].dtype == real[name].dtype, name
    assert 0.02 < synthetic["prob_map"].float().mean() < 0.5 and synthetic["thresh_levels"].max() == 255


def exhaust(training, batches, config):
    """A step that runs out of memory where the allocator notices: more than any machine has."""
    torch.empty(2**50, dtype=torch.uint8)


def die(training, batches, config):
    """A step during which the system ends the process, as it does when the host's memory is used up."""
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def grow(training, batches, config):
    """A step that takes 64 MiB an image and gives them back. (Not as a tensor: those are aligned, and the next one does
    not always fit where the last has been.)"""
    bytearray(len(batches) * config.batch_size * 2**26)


def test_steps_that_take_long_are_few_and_the_first_counts_only_where_it_is_alone(small, monkeypatch):
    steps = []

    def note(training, batches, config):
        steps.append(len(batches))

    config = small.changed(image_size=64, batch_size=2, accumulate=2)
    plans.run_steps(config, CPU, note)
    assert steps == [2] * 6
    monkeypatch.setattr(plans, "_CASE_SECONDS", 1e-9)
    assert plans.run_steps(config, CPU, note)[1] > 0
    assert steps == [2] * 7


@pytest.mark.parametrize("step", [exhaust, die])
def test_out_of_memory_is_a_row(small, step, capsys):
    print_plans("v1", small.changed(image_size=64, batch_size=1, accumulate=2), step)
    assert "  64 px   1 x 2        -         -  out of memory\n" in capsys.readouterr().out


def test_the_memory_of_a_case_is_the_growth_of_its_own_process(small):
    cases = [small.changed(image_size=64, batch_size=batch, accumulate=2) for batch in (2, 1)]
    two, one = [measure_case(case, CPU, grow)[0] for case in cases]
    assert two - one == pytest.approx(2 * 2**26 / 1e9, abs=0.04)


def test_a_micro_batch_that_does_not_fit_is_not_halved_while_it_is_measured(small):
    plan = plans._OnlyPlan(4, 1, 128)
    training = Training(DBNet(small), small, CPU, plan)
    training.model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("injected")))
    with pytest.raises(MemoryError, match="4 x 1 does not fit"):
        train.optimizer_step(training, [synthetic_batch(small)], small)
    assert plan.micro_batch == 4
