"""Presets, checks and flags."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbnet.config import PRESETS, ArgumentParser, Config
from dbnet.errors import UserError

ROOT = Path(__file__).resolve().parents[1]

TABLE = {
    "baseline": {
        "backbone": "resnet18", "image_size": 640, "batch_size": 16, "accumulate": 1, "use_polygon": False,
        "thresh": 0.3, "box_thresh": 0.4, "max_candidates": 300, "prob_loss_weight": 5, "thresh_loss_weight": 10,
        "binary_loss_weight": 1, "optimizer": "adam", "schedule": "step", "step_epochs": 100, "step_gamma": 0.1,
        "epochs": 10, "lr": 1e-3, "weight_decay": 1e-4, "flip_p": 0.5, "clahe_p": 0, "rotate90_p": 0,
        "brightness_contrast_p": 0, "seed": 42, "pyramid_channels": 256, "weights": "imagenet", "shrink_ratio": 0.4,
        "thresh_min": 0.3, "thresh_max": 0.7, "min_size": 3, "box_unclip_ratio": 1.5, "polygon_unclip_ratio": 2.0,
        "binarization_k": 50, "negative_ratio": 3,
    },
    "v0": {
        "backbone": "resnet34", "image_size": 640, "batch_size": 16, "accumulate": 1, "use_polygon": True,
        "thresh": 0.3, "box_thresh": 0.3, "max_candidates": 500, "prob_loss_weight": 5, "optimizer": "adamw",
        "schedule": "cosine", "min_lr": 1e-6, "epochs": 20, "brightness_contrast_p": 0.5, "brightness": 0.2,
        "contrast": 0.2, "clahe_p": 0.3, "rotate90_p": 0.2, "flip_p": 0.5,
    },
    "v1": {
        "backbone": "resnet34", "image_size": 1024, "batch_size": 8, "accumulate": 2, "box_thresh": 0.25,
        "prob_loss_weight": 7, "thresh_loss_weight": 10, "binary_loss_weight": 1, "epochs": 20, "use_polygon": True,
    },
    "v3": {
        "backbone": "resnet50", "image_size": 1024, "batch_size": 4, "accumulate": 4, "thresh": 0.22,
        "box_thresh": 0.35, "max_candidates": 500, "prob_loss_weight": 7, "epochs": 20,
    },
    "lite": {"backbone": "mobilenet_v3_large"},
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_presets_hold_the_published_values(name):
    values = PRESETS[name].to_dict()
    assert {field: values[field] for field in TABLE[name]} == TABLE[name]


def test_v1_differs_from_v0_in_five_fields():
    v0, v1 = PRESETS["v0"].to_dict(), PRESETS["v1"].to_dict()
    changed = {field for field in v0 if v0[field] != v1[field]}
    assert changed == {"image_size", "batch_size", "accumulate", "box_thresh", "prob_loss_weight"}


def test_print_config_and_diff_print_and_exit():
    printed = subprocess.run(
        [sys.executable, "train.py", "--preset", "v1", "--print-config"], cwd=ROOT, capture_output=True, text=True
    )
    assert json.loads(printed.stdout) == PRESETS["v1"].to_dict()
    table = subprocess.run(
        [sys.executable, "train.py", "--preset", "v1", "--diff", "v0"], cwd=ROOT, capture_output=True, text=True
    )
    assert [line.split()[0] for line in table.stdout.splitlines()[1:]] == [
        "image_size", "prob_loss_weight", "batch_size", "accumulate", "box_thresh",
    ]  # fmt: skip


def test_image_size_is_rounded_up_to_a_multiple_of_32_and_said(capsys):
    assert Config.from_preset("v1", image_size=1000).image_size == 1024
    assert "1000 is rounded up to 1024" in capsys.readouterr().err


def test_every_field_is_a_flag_with_a_help_text():
    parser = ArgumentParser("test")
    parser.add_config_flags()
    helped = parser.format_help()
    for field in Config().to_dict():
        assert f"--{field.replace('_', '-')}" in helped
    assert all(action.help for action in parser._actions)


def test_the_help_fits_its_topic():
    training, using = ArgumentParser("test"), ArgumentParser("test")
    training.add_config_flags()
    using.add_config_flags(of_checkpoint=True)
    helped = " ".join(training.format_help().split())
    assert "weight of the balanced cross entropy of the probability map (7)" in helped
    assert "BCE(P)" in helped and "[--FIELD VALUE ...]" in helped and "[--epochs" not in helped
    helped = using.format_help()
    assert "--box-thresh" in helped and "--image-size" in helped and "--epochs" not in helped
    assert using.parse(["--epochs", "3"])[1] == {"epochs": 3}  # taken all the same


def test_a_boolean_flag_stands_alone_or_with_a_value():
    parser = ArgumentParser("test")
    parser.add_argument("checkpoint", nargs="?")
    parser.add_config_flags()
    args, changes = parser.parse(["--strict", "a.pt", "--use-polygon", "false"])
    assert args.checkpoint == "a.pt"
    assert changes == {"strict": True, "use_polygon": False}


@pytest.mark.parametrize(
    ("typed", "takes"),
    [
        ("--use-polygon maybe", "true or false"),
        ("--resume 2", "true or false"),
        ("--train-sizes a,b", "whole numbers separated by commas"),
        ("--train-sizes 640.5", "whole numbers separated by commas"),
        ("--data-weights 1;2", "numbers separated by commas"),
        ("--batch-size 1.5", "a whole number"),
        ("--box-thresh 0,3", "a number"),
    ],
)
def test_a_value_of_another_kind_names_its_flag_and_what_it_takes(typed, takes):
    parser = ArgumentParser("test")
    parser.add_argument("checkpoints", nargs="*")
    parser.add_switch("--resume", "go on")
    parser.add_config_flags()
    flag, value = re.split("[ =]", typed)
    with pytest.raises(UserError, match=re.escape(f"{flag}: takes {takes}, not {value!r}")):
        parser.parse([*typed.split(), "a.pt"])
    for empty in (["--data", ""], ["--data="], ["--tta", "--data", "", "a.pt"]):
        with pytest.raises(UserError, match=r"--data=?: has an empty value"):
            parser.parse(empty)
    with pytest.raises(UserError, match=r"--amp.*'maybe'.*'auto', 'off', 'fp16', 'bf16'"):
        parser.parse(["--amp", "maybe"])
    args, changes = parser.parse(["--tta", "lite", "a.pt", "--strict", "no", "--resume"])
    assert args.checkpoints == ["lite", "a.pt"] and args.resume and changes == {"tta": True, "strict": False}
    assert parser.parse(["a.pt", "--tta", "b.pt"])[0].checkpoints == ["a.pt", "b.pt"]


def test_numbers_separated_by_commas_are_typed_as_the_help_shows_them():
    parser = ArgumentParser("test")
    parser.add_config_flags()
    changes = parser.parse(["--train-sizes", "640,800", "--data-weights", "2,0.5"])[1]
    assert changes == {"train_sizes": (640, 800), "data_weights": (2.0, 0.5)}
    assert parser.parse(["--train-sizes", "none"])[1] == {"train_sizes": ()}
    with pytest.raises(UserError, match="--train-sizes: takes whole numbers separated by commas, not '640,x'"):
        parser.parse(["--train-sizes", "640,x"])


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"batch_size": 0}, "--batch-size 0"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"box_thresh": 1.5}, "--box-thresh 1.5"),
        ({"optimizer": "sgd"}, "--optimizer sgd"),
        ({"epochs": 2.5}, "--epochs 2.5"),
        ({"strict": 1}, "--strict 1"),
        ({"thresh_min": 0.8}, "--thresh-min 0.8"),
        ({"pyramid_channels": 90}, "--pyramid-channels 90"),
        ({"no_such": 1}, "no_such"),
    ],
)
def test_a_value_out_of_range_names_its_flag(changes, flag):
    with pytest.raises(UserError, match=re.escape(flag)):
        Config.from_preset("v1", **changes)


def test_an_unknown_preset_names_the_presets():
    with pytest.raises(UserError, match=r"v9.*baseline, v0, v1"):
        Config.from_preset("v9")


@given(st.sampled_from(sorted(PRESETS)), st.integers(1, 64), st.floats(0, 1))
def test_a_configuration_survives_json(preset, batch_size, box_thresh):
    config = Config.from_preset(preset, batch_size=batch_size, box_thresh=box_thresh)
    assert Config().changed(**json.loads(json.dumps(config.to_dict()))) == config


def test_numbers_beyond_any_float_are_rejected_like_others():
    with pytest.raises(UserError, match="--max-candidates"):
        Config(max_candidates=math.inf)
    with pytest.raises(UserError, match="--image-size"):
        Config(image_size=10**400)


@pytest.mark.parametrize(
    "words", [("evaluate.py",), ("predict.py",), ("export.py",), ("-m", "dbnet.synth"), ("train.py",)]
)
def test_help_is_printed_without_importing_a_library(words):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *words, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: ")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "dbnet.config" in imported and not imported & {"torch", "numpy", "cv2", "PIL", "scipy", "tqdm", "shapely"}


def test_an_unclip_ratio_that_is_named_is_not_overruled_by_growth():
    lite = PRESETS["lite"]
    assert lite.growth and Config.from_dict(lite.to_dict()) == lite
    for ratio in ("polygon_unclip_ratio", "box_unclip_ratio"):
        assert lite.changed(**{ratio: 1.8}).growth == 0
        assert lite.changed(**{ratio: 1.8}, growth=0.9).growth == 0.9
