"""All settings of a run in one flat dataclass, the presets, and the command-line flags made of its fields."""

import argparse
import dataclasses
import inspect
import math
import os
import re
import sys
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, Self, get_args, get_origin, get_type_hints

from dbnet.errors import UserError

MAX_IMAGE_SIZE = 8192  # pixels
STRIDE = 32  # image sides are multiples of the coarsest stride of the backbone


class Range(NamedTuple):
    """The values a number may take, both ends included. Neither infinity nor nan is within."""

    low: float
    high: float = sys.float_info.max


Count = Annotated[int, Range(1)]
Fraction = Annotated[float, Range(0, 1)]
Weight = Annotated[float, Range(0)]


@dataclass(frozen=True)
class Config:
    """All settings of a run, checked and immutable.

    Each field is a flag of the scripts (`batch_size` is `--batch-size 4`). The comment behind it or the docstring under
    it is the flag's help, and the comments between fields are the titles of the help's chapters. Raises UserError,
    naming the flag and the allowed values, when a value is of the wrong type or out of range."""

    # shape of the network
    backbone: str = "resnet18"
    """network of torchvision by its name there (ResNet, ResNeXt, EfficientNet, ConvNeXt, MobileNetV3, RegNet, Swin:
    resnet50, convnext_tiny, ...), or timm:NAME where timm is installed (timm:hrnet_w44)"""
    weights: str = "imagenet"
    """initial weights of the backbone: imagenet (downloaded once), none, or a FILE with a state_dict of that network"""
    pyramid_channels: Annotated[int, Range(32, 4096)] = 256
    """channels inside the feature pyramid, a multiple of 4; each of its four levels passes on a quarter of them"""
    fusion: Literal["concat", "asf"] = "concat"
    """join of the pyramid's levels: concat, or asf (adaptive scale fusion of DBNet++: weights by level and pixel)"""
    binarization_k: Annotated[float, Range(1)] = 50.0
    """steepness k of the differentiable binarization 1 / (1 + exp(-k (P - T)))"""

    # images, and how they become samples
    data: str = "data/datasets"
    """folder with images/{train,val,test}/ and jsons/{train,val,test}.json; several folders, separated by commas, are
    one data set, each in a format of its own"""
    data_weights: tuple[float, ...] = ()
    """passes over each folder of --data in an epoch (3,1,0.5: three over the first, and half of the third, another half
    in each epoch); without any, one"""
    format: Literal["auto", "competition", "coco", "ppocrlabel", "icdar", "polygons", "ctw1500", "labelme"] = "auto"
    """format of the annotations: auto (detected); competition or coco (jsons/SPLIT.json); ppocrlabel (Label.txt); or a
    file for each image in labels/SPLIT/: icdar (x1,y1,...,x4,y4,transcription, also MLT and RCTW-17), polygons (any
    number of points), ctw1500, labelme"""
    image_size: Annotated[int, Range(STRIDE, MAX_IMAGE_SIZE)] = 640
    """length in pixels to which the longer side of every image is resized, rounded up to a multiple of 32"""
    enlarge: Annotated[float, Range(1)] = 2.0  # largest factor by which a small image is enlarged for detection
    train_sizes: tuple[int, ...] = ()
    """image sizes for training, one drawn for each optimizer step (640,800,1024), up to image_size; none: only that"""
    pad: Literal["square", "tight"] = "square"
    """shape of training images: square, or tight (the next multiples of 32, as always in evaluation and prediction)"""
    cache_gb: Weight = 16.0
    """disk space in GB for decoded training images, in the temporary folder, at most half of what is free; 0: none"""
    workers: Annotated[int, Range(-1, 1024)] = -1
    """processes that load images; 0 loads in the main process, -1 starts one for each core, at most 8"""
    strict: bool = False  # stop at the first image that cannot be read, instead of counting it and going on
    shrink_ratio: Annotated[float, Range(0.05, 0.95)] = 0.4
    """ratio r of the paper: text kernels are polygons shrunk by area x (1 - r^2) / perimeter"""
    thresh_min: Fraction = 0.3  # value of the threshold map away from outlines
    thresh_max: Fraction = 0.7  # value of the threshold map on outlines

    # random changes of training images
    flip_p: Fraction = 0.5  # probability of a horizontal flip
    rotate90_p: Fraction = 0.0  # probability of a rotation by 90, 180 or 270 degrees
    rotate: Annotated[float, Range(0, 45)] = 0.0  # largest angle of a random rotation in degrees, to either side
    scale: Annotated[float, Range(1, 4)] = 1.0
    """largest factor of a random scaling, up (a part of the image is cut out; words cut in two are masked) or down"""
    perspective: Annotated[float, Range(0, 0.3)] = 0.0
    """largest shift of the image's corners, as a fraction of its sides"""
    brightness_contrast_p: Fraction = 0.0  # probability of a change of brightness and contrast
    brightness: Fraction = 0.2  # largest change of brightness, as a fraction of the full range
    contrast: Fraction = 0.2  # largest relative change of contrast
    clahe_p: Fraction = 0.0  # probability of contrast-limited adaptive histogram equalization on 8 x 8 tiles

    # weights of the loss w_p BCE(P) + w_b dice(B) + w_t L1(T)
    prob_loss_weight: Weight = 5.0  # weight of the balanced cross entropy of the probability map
    thresh_loss_weight: Weight = 10.0  # weight of the L1 distance of the threshold map
    binary_loss_weight: Weight = 1.0  # weight of the dice loss of the approximate binary map
    negative_ratio: Weight = 3.0  # number of hardest negative pixels in the cross entropy for each positive pixel

    # training
    epochs: Count = 10  # passes over the training images
    batch_size: Count = 16  # images in one pass through the network (the micro-batch); halved when memory runs out
    accumulate: Count = 1
    """micro-batches in one optimizer step; the effective batch is batch_size x accumulate x processes of torchrun"""
    effective_batch: Annotated[int, Range(0)] = 0
    """images in one optimizer step over all processes; accumulate then follows from it; 0 is off"""
    optimizer: Literal["adam", "adamw"] = "adam"  # optimizer: adam, or adamw (decoupled weight decay)
    lr: Annotated[float, Range(1e-8, 10)] = 1e-3  # initial learning rate
    weight_decay: Weight = 1e-4  # weight decay of the optimizer
    schedule: Literal["step", "cosine"] = "step"
    """learning rate by epoch: step (times step_gamma every step_epochs) or cosine (down to min_lr)"""
    step_epochs: Count = 100  # epochs between two steps of the step schedule
    step_gamma: Annotated[float, Range(0.001, 1)] = 0.1  # factor of each step of the step schedule
    min_lr: Weight = 1e-6  # final learning rate of the cosine schedule
    warmup_epochs: Weight = 0.0  # epochs over which the learning rate rises to its schedule, step by step
    ema: Annotated[float, Range(0, 0.99999)] = 0.0
    """decay of a moving average of the weights, which is validated and saved as best.pt in their place; 0 is off"""
    freeze_batch_norm: bool = False
    """keep the batch norm statistics of the initial weights; for training on (--init) in small batches"""
    clip_grad_norm: Weight = 5.0  # largest norm of the gradient of an optimizer step; 0 is off
    patience: Annotated[int, Range(0)] = 0
    """epochs in a row without a better validation H-Mean after which training stops; 0 is off"""
    seed: Annotated[int, Range(0, 2**31)] = 42  # seed of the initial weights, the order of samples and the augmentation
    deterministic: bool = False
    """same weights from the same seed and data on the same machine, also where that is slower"""
    save_minutes: Weight = 10.0  # minutes between two saves within an epoch; 0 saves only at its end

    # device and precision
    device: str = "auto"
    """device of the network: auto (the GPU where there is one), cpu, cuda or cuda:N; for a .onnx file also what else
    its ONNX Runtime runs on (openvino, coreml, ...)"""
    amp: Literal["auto", "off", "fp16", "bf16"] = "auto"
    """mixed precision: auto is bf16 on GPUs that have it, else fp16; on a CPU that has it bf16 for detection"""
    compile: bool = False  # compilation by torch.compile: minutes at the start for faster steps; needs a C++ compiler

    # from a probability map to polygons
    tta: bool = False
    """test-time augmentation: the mean map of the image at several sizes, and mirrored for networks trained with
    flips; a little more accurate, three to six times the time"""
    sideways: bool = True
    """look again, turned by a quarter, at an image in which lines run up or down, or only short words are found"""
    small_text: Weight = 0.0
    """height in pixels of the resized image: if most text is lower, the part that has text is looked at again, enlarged
    to that height, by a factor of 1.5 at most; if none is found, the whole image; not with --tta; 0 is off"""
    use_polygon: bool = False  # polygons that follow the contour; false gives minimum-area rectangles
    thresh: Fraction = 0.3  # lowest probability of a text pixel
    box_thresh: Fraction = 0.4  # lowest mean probability inside a region that is kept
    max_candidates: Count = 300  # largest number of regions that are kept in an image, the best ones
    min_size: Weight = 3.0
    """shortest side of a region before it is grown, in pixels of the map, which is as large as the resized image"""
    growth: Weight = 0.0
    """growth of regions: a share of the distance by which shrink_ratio shrank their text, worked out as for rectangles;
    it suits short and long text alike. 0, or a ratio that is named: by one of the ratios below"""
    box_unclip_ratio: Annotated[float, Range(0, 10)] = 1.5
    """growth of rectangles: by area x ratio / perimeter, in pixels of the map"""
    polygon_unclip_ratio: Annotated[float, Range(0, 10)] = 2.0
    """growth of polygons: by area x ratio / perimeter, in pixels of the map"""

    def __post_init__(self) -> None:
        for name, hint in _hints().items():
            _check(name, hint, getattr(self, name))
        if self.thresh_min >= self.thresh_max:
            raise UserError(f"--thresh-min {self.thresh_min:g} must be below --thresh-max {self.thresh_max:g}")
        if self.pyramid_channels % 4:
            raise UserError(f"--pyramid-channels {self.pyramid_channels} must be a multiple of 4")
        if self.image_size % STRIDE:
            rounded = math.ceil(self.image_size / STRIDE) * STRIDE
            print(f"image size {self.image_size} is rounded up to {rounded}, a multiple of {STRIDE}", file=sys.stderr)
            object.__setattr__(self, "image_size", rounded)
        for weight in self.data_weights:
            if not 0 < weight <= 1000:  # nan is neither
                raise UserError(f"--data-weights {weight:g}: must be above 0 and at most 1000")
        for size in self.train_sizes:
            if size % STRIDE or size <= 0:
                raise UserError(f"--train-sizes {size}: must be a multiple of {STRIDE}")

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "Config":
        """The preset `name` with some fields changed, e.g. `Config.from_preset("v1", batch_size=4)`."""
        if name not in PRESETS:
            raise UserError(f"--preset {name}: no such preset; there are {', '.join(PRESETS)}")
        return PRESETS[name].changed(**changes)

    def changed(self, **changes: Any) -> Self:
        """A copy with some fields changed; lists become tuples. A new unclip ratio ends `growth`, which would take its
        place. Raises UserError for an unknown field."""
        if unknown := sorted(changes.keys() - _hints().keys()):
            raise UserError(f"unknown configuration field {unknown[0]!r}; --help lists all of them")
        lists = {name: tuple(value) for name, value in changes.items() if isinstance(value, list)}
        grown = {"growth": 0.0} if {"box_unclip_ratio", "polygon_unclip_ratio"} & changes.keys() else {}
        return dataclasses.replace(self, **grown | changes | lists)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The configuration of a file, from what `to_dict` gave in this or an earlier version. Raises UserError."""
        return cls().changed(**{name: value for name, value in values.items() if name not in REMOVED_FIELDS})

    def to_dict(self) -> dict[str, Any]:
        """Field names and plain values in the order of the fields, ready for JSON."""
        values = {name: getattr(self, name) for name in _hints()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


# Fields of earlier versions. Files that still have them are read as without.
REMOVED_FIELDS = {"sync_batch_norm", "clahe_clip", "blur_p", "noise_p", "jpeg_p", "shadow_p"}

NETWORK_FIELDS = ("backbone", "weights", "pyramid_channels", "fusion", "binarization_k")  # fixed in a checkpoint

# Fields that matter where a checkpoint is used: what the help of evaluate.py, predict.py and export.py shows.
_READING_FIELDS = {
    *("data", "format", "image_size", "enlarge", "workers", "strict", "batch_size", "device", "amp", "compile"),
    *("tta", "sideways", "small_text", "use_polygon", "thresh", "box_thresh", "max_candidates", "min_size"),
    *("growth", "box_unclip_ratio", "polygon_unclip_ratio"),
}

_METAVARS: dict[Any, str] = {bool: "BOOL", int: "INT", float: "FLOAT", str: "NAME"}
_TAKES: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_TAKES |= {tuple[int, ...]: "whole numbers separated by commas", tuple[float, ...]: "numbers separated by commas"}
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@cache
def _hints() -> dict[str, Any]:
    """Field names and type hints in the order of the fields."""
    return get_type_hints(Config, include_extras=True)


def _documentation() -> tuple[dict[str, str], dict[str, str]]:
    """From the source of Config: the titles of the chapters by their first fields, and the help of each field."""
    source = inspect.getsource(Config)
    titles = re.findall(r"^    # (.+)\n    (\w+):", source, re.M)
    helps = re.findall(r'^    (\w+): .+?(?:  # (.+)|\n    """((?s:.+?))""")$', source, re.M)
    return dict(each[::-1] for each in titles), {name: " ".join((c or d).split()) for name, c, d in helps}


def _kind(hint: Any) -> Any:
    """The type of a field's values: bool, int, float, str, tuple[int, ...] or tuple[float, ...]."""
    return {Annotated: get_args(hint)[:1], Literal: (str,)}.get(get_origin(hint), (hint,))[0]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check(name: str, hint: Any, value: Any) -> None:
    """Raise UserError where a value is not of the type or in the range that the hint of its field asks for."""
    kind, typed = _kind(hint), f"{_flag(name)} {value}"
    if get_origin(hint) is Literal and value not in get_args(hint):
        raise UserError(f"{typed}: takes one of {', '.join(get_args(hint))}")
    values, of = (value, get_args(kind)[0]) if get_args(kind) else ((value,), kind)
    allowed = (int, float) if of is float else of
    if not isinstance(values, tuple) or any(
        not isinstance(each, allowed) or isinstance(each, bool) != (of is bool) for each in values
    ):
        raise UserError(f"{typed}: takes {_TAKES[kind]}")
    if get_origin(hint) is Annotated:
        low, high = get_args(hint)[1]
        if not low <= value <= high:
            raise UserError(f"{typed}: must be from {low:g} {'up' if high == sys.float_info.max else f'to {high:g}'}")


BASELINE = Config()
V0 = BASELINE.changed(backbone="resnet34", use_polygon=True, box_thresh=0.3, max_candidates=500)
V0 = V0.changed(optimizer="adamw", schedule="cosine", epochs=20)
V0 = V0.changed(rotate90_p=0.2, brightness_contrast_p=0.5, clahe_p=0.3)
V1 = V0.changed(image_size=1024, batch_size=8, accumulate=2, box_thresh=0.25, prob_loss_weight=7.0)
V2 = V1.changed(backbone="efficientnet_b3", train_sizes=(640, 800, 1024), batch_size=4, accumulate=4, epochs=30)
V2 = V2.changed(tta=True)
V3 = V1.changed(backbone="resnet50", batch_size=4, accumulate=4, thresh=0.22, box_thresh=0.35)
SLIM = V1.changed(backbone="mobilenet_v3_large", pyramid_channels=96, pad="tight", batch_size=4, accumulate=1)
SLIM = SLIM.changed(rotate90_p=0.0)
LITE = SLIM.changed(image_size=800, flip_p=0.0, scale=2.0, rotate=2.0, perspective=0.03, ema=0.998)
LITE = LITE.changed(thresh=0.2, box_thresh=0.42, growth=0.85, small_text=12.5)
DEMO = SLIM.changed(data="demo/data", weights="none", image_size=640, epochs=2, lr=5e-4, flip_p=0.0, box_thresh=0.4)
BEST = V3.changed(backbone="timm:hrnet_w44", fusion="asf", lr=1.3e-3, epochs=30, ema=0.999, tta=True)
BEST = BEST.changed(scale=2.0, rotate=2.0, perspective=0.03, brightness_contrast_p=0.4, brightness=0.33, contrast=0.28)

PRESETS = {"baseline": BASELINE, "v0": V0, "v1": V1, "v2": V2, "v3": V3, "best": BEST, "lite": LITE, "demo": DEMO}


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser whose mistakes are one-line UserErrors, with a flag for every field of the configuration."""

    def __init__(self, description: str) -> None:
        if Path(sys.argv[0]).name.startswith("dbnet-"):  # the commands of an installed copy in place of the scripts
            description = re.sub(r"\bpython (\w+)\.py", r"dbnet-\1", description)
            description = re.sub(r" -- (\w+)\.py", r" -m -- dbnet.scripts.\1", description)
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")

    def add_switch(self, flag: str, text: str) -> None:
        """Add a flag of the script that is true where it is named; it may have a value, as a boolean field."""
        self.add_argument(flag, type=partial(_parse, bool), default=False, metavar="BOOL", help=text)

    def add_config_flags(self, of_checkpoint: bool = False) -> None:
        """Add `--field-name VALUE` for every field of Config, after the script's own flags, which the usage line lists.
        In scripts whose values come from a checkpoint, the help shows the flags that matter there; all are accepted."""
        usage = self.format_usage().removeprefix("usage: ").rstrip().replace("%", "%%").replace(" BOOL", "")
        self.usage = usage + " [--FIELD VALUE ...]"
        self.epilog = (
            "A FIELD that is not named keeps the checkpoint's value. Those of training (train.py --help) are taken too."
            if of_checkpoint
            else "In parentheses: the value of preset v1; for another preset, --preset NAME --print-config."
        )
        chapters, helps = _documentation()
        for name, hint in _hints().items():
            if name in chapters:
                chapter = self.add_argument_group(chapters[name])
            description = helps[name].replace("%", "%%")
            if not of_checkpoint:
                description += f" ({_as_typed(getattr(V1, name))})"
            elif name not in _READING_FIELDS:
                description = argparse.SUPPRESS
            choices = get_args(hint) if get_origin(hint) is Literal else None
            metavar = None if choices else _METAVARS.get(_kind(hint), "N,N,...")
            chapter.add_argument(
                _flag(name),
                type=partial(_parse, _kind(hint)),
                choices=choices,
                metavar=metavar,
                default=argparse.SUPPRESS,
                help=description,
            )

    def parse(self, arguments: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
        """The script's own arguments, and the configuration fields that the command changes. A boolean field may stand
        alone (`--strict`) or with a value (`--use-polygon false`)."""
        tokens = list(sys.argv[1:] if arguments is None else arguments)
        for before, token in pairwise(["", *tokens]):
            if not token or re.fullmatch("--[a-z-]+=", token):  # of an unset variable; as a path, it is the folder .
                self.error(f"{token or before}: has an empty value")
        switches = {flag for action in self._actions if action.metavar == "BOOL" for flag in action.option_strings}
        for i in reversed(range(len(tokens))):
            if tokens[i] in switches:
                tokens[i] += f"={tokens.pop(i + 1) if _is_value(''.join(tokens[i + 1 : i + 2])) else 'true'}"
        namespace = self.parse_intermixed_args(tokens)
        changes = {name: vars(namespace).pop(name) for name in _hints() if name in namespace}
        return namespace, changes


def _is_value(word: str) -> bool:
    """Whether the word after a boolean flag is meant as its value, right or wrong, and not as a file or as `lite`."""
    return word.lower() in _BOOLEANS or (word.isalnum() and word != "lite" and not os.path.exists(word))


def _parse(kind: Any, text: str) -> Any:
    """The value of a field of this type, as typed."""
    try:
        if get_args(kind):
            return tuple(get_args(kind)[0](each) for each in text.split(",") if each.strip() not in ("", "none"))
        return _BOOLEANS[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"takes {_TAKES[kind]}, not {text!r}") from None


def _as_typed(value: Any) -> str:
    """A value as a flag takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def print_difference(config: Config, name: str, reference: Config) -> None:
    """Print a line for each field in which `config` differs from the preset `reference` called `name`."""
    values, others = config.to_dict(), reference.to_dict()
    rows = [(field, str(others[field]), str(values[field])) for field in values if values[field] != others[field]]
    if not rows:
        return print(f"no difference from {name}")
    for field, theirs, ours in [("field", name, "here"), *rows]:
        print(f"{field:22}  {theirs:22}  {ours}")
