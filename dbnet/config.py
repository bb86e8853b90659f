"""One flat configuration: dataclasses with a docstring a field, the presets, and the command-line flags made of both.

The groups (`ModelConfig`, `DataConfig`, ...) exist so that `--help` has chapters and a function can say which part
it reads; a `Config` is all of them, flat, so that every field is one flag and one keyword of `Config.from_preset`.
"""

import argparse
import ast
import dataclasses
import inspect
import json
import math
import sys
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, Literal, NoReturn, Self, get_args, get_origin, get_type_hints

from dbnet.errors import UserError

STRIDE = 32  # image sides are multiples of the coarsest stride of the backbone


@dataclass(frozen=True)
class Range:
    """The values a number may take, both ends included."""

    low: float
    high: float = math.inf

    def __str__(self) -> str:
        return f"from {self.low:g} up" if self.high == math.inf else f"from {self.low:g} to {self.high:g}"


Count = Annotated[int, Range(1)]
Fraction = Annotated[float, Range(0, 1)]
Weight = Annotated[float, Range(0)]
Sizes = tuple[int, ...]


@dataclass(frozen=True)
class ModelConfig:
    """What decides the shape of the network."""

    backbone: str = "resnet18"
    """network that gives the features: one of torchvision by its name there (ResNet, ResNeXt, EfficientNet, ConvNeXt,
    MobileNetV3, RegNet, Swin: resnet50, efficientnet_v2_s, convnext_tiny, ...), or timm:NAME where timm is installed
    (timm:hrnet_w44)"""

    weights: str = "imagenet"
    """what the backbone starts from: imagenet (the weights of torchvision or timm, downloaded once), none, or a FILE
    that holds a state_dict of that network"""

    pyramid_channels: Annotated[int, Range(32)] = 256
    """channels inside the feature pyramid; each of its four levels gives a quarter of them (a multiple of 4)"""

    fusion: Literal["concat", "asf"] = "concat"
    """how the pyramid's levels are joined: concat, or asf (adaptive scale fusion of DBNet++, which weighs them pixel by
    pixel)"""

    binarization_k: Annotated[float, Range(1)] = 50.0
    """steepness k of the differentiable binarization 1 / (1 + exp(-k (P - T)))"""


@dataclass(frozen=True)
class DataConfig:
    """Where the images are and how they become samples."""

    data: str = "data/datasets"
    """folder with images/{train,val,test}/ and jsons/{train,val,test}.json"""

    format: Literal["auto", "competition", "coco", "icdar", "polygons", "totaltext", "labelme"] = "auto"
    """what the annotations are: auto (by looking), competition or coco (jsons/SPLIT.json), or a file for each image in
    labels/SPLIT/: icdar (x1,y1,...,x4,y4,transcription), polygons (any number of points), totaltext, labelme"""

    image_size: Annotated[int, Range(STRIDE, 8192)] = 640
    """longer side in pixels that images are resized to, everywhere (rounded up to a multiple of 32)"""

    train_sizes: Sizes = ()
    """image sizes that training draws from, one for each optimizer step (640,800,1024), none larger than image_size;
    without any it is always image_size"""

    pad: Literal["square", "tight"] = "square"
    """what training images are padded to: square (image_size x image_size), or tight (the next multiples of 32, with
    images of like shape in a batch: as evaluation and prediction always do)"""

    cache_gb: Weight = 16.0
    """disk in GB, in the temporary folder and at most half of its room, for decoded training images; 0 decodes them
    anew in each epoch"""

    workers: Annotated[int, Range(-1)] = -1
    """processes that load images; 0 loads in the main process, -1 takes one a core, at most 8"""

    strict: bool = False
    """stop at the first image that cannot be read, instead of going on without it and counting it"""

    shrink_ratio: Annotated[float, Range(0.05, 0.95)] = 0.4
    """ratio r of the paper: text kernels are polygons shrunk by area x (1 - r^2) / perimeter"""

    thresh_min: Fraction = 0.3
    """value of the threshold map away from outlines"""

    thresh_max: Fraction = 0.7
    """value of the threshold map on outlines"""


@dataclass(frozen=True)
class AugmentConfig:
    """How training images are changed, each time anew."""

    flip_p: Fraction = 0.5
    """probability of a horizontal flip"""

    rotate90_p: Fraction = 0.0
    """probability of a rotation by 90, 180 or 270 degrees"""

    rotate: Annotated[float, Range(0, 45)] = 0.0
    """largest rotation by any angle, in degrees, to either side"""

    scale: Annotated[float, Range(1, 4)] = 1.0
    """largest factor of a random scaling, up (then a part is cut out, and words cut in two are masked) or down"""

    perspective: Annotated[float, Range(0, 0.3)] = 0.0
    """largest shift of the image's corners, as a fraction of its sides"""

    brightness_contrast_p: Fraction = 0.0
    """probability of a change of brightness and contrast"""

    brightness: Fraction = 0.2
    """largest change of brightness, as a fraction of the full range"""

    contrast: Fraction = 0.2
    """largest change of contrast, as a fraction of what it is"""

    clahe_p: Fraction = 0.0
    """probability of contrast-limited adaptive histogram equalization on 8 x 8 tiles"""

    clahe_clip: Annotated[float, Range(0.1)] = 2.0
    """clip limit of that equalization"""

    blur_p: Fraction = 0.0
    """probability of a blur, as by a lens out of focus"""

    noise_p: Fraction = 0.0
    """probability of noise, as of a sensor in the dark"""

    jpeg_p: Fraction = 0.0
    """probability of a JPEG compression of low quality"""

    shadow_p: Fraction = 0.0
    """probability of a shadow with a straight edge"""


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss w_p BCE(P) + w_b dice(B) + w_t L1(T)."""

    prob_loss_weight: Weight = 5.0
    """weight of the balanced cross entropy of the probability map"""

    thresh_loss_weight: Weight = 10.0
    """weight of the L1 distance of the threshold map"""

    binary_loss_weight: Weight = 1.0
    """weight of the dice loss of the approximate binary map"""

    negative_ratio: Weight = 3.0
    """hardest negative pixels that count in the cross entropy, for each positive one"""


@dataclass(frozen=True)
class TrainConfig:
    """How the network is trained."""

    epochs: Count = 10
    """passes over the training images"""

    batch_size: Count = 16
    """images that go through the network together (the micro-batch); out of memory halves it"""

    accumulate: Count = 1
    """micro-batches whose gradients make one optimizer step; the effective batch is batch_size x accumulate, times the
    processes that torchrun starts"""

    effective_batch: Annotated[int, Range(0)] = 0
    """images of one optimizer step over all processes, in place of accumulate, which then follows from it; 0 is off"""

    sync_batch_norm: bool = False
    """batch norm over the micro-batches of all processes together, slower than over those of each alone"""

    optimizer: Literal["adam", "adamw"] = "adam"
    """adam, or adamw (decoupled weight decay)"""

    lr: Annotated[float, Range(1e-8, 10)] = 1e-3
    """learning rate at the start"""

    weight_decay: Weight = 1e-4
    """weight decay of the optimizer"""

    schedule: Literal["step", "cosine"] = "step"
    """learning rate by epoch: step (times step_gamma every step_epochs) or cosine (down to min_lr)"""

    step_epochs: Count = 100
    """epochs between two steps of the step schedule"""

    step_gamma: Annotated[float, Range(0.001, 1)] = 0.1
    """factor of each step of the step schedule"""

    min_lr: Weight = 1e-6
    """learning rate that the cosine schedule ends at"""

    warmup_epochs: Weight = 0.0
    """epochs over which the learning rate rises to its schedule, step by step"""

    ema: Annotated[float, Range(0, 0.99999)] = 0.0
    """decay of a moving average of the weights, which is then what is validated and kept in best.pt; 0 keeps none"""

    clip_grad_norm: Weight = 5.0
    """largest norm of the gradient of an optimizer step; 0 does not clip"""

    patience: Annotated[int, Range(0)] = 0
    """stop after so many epochs in a row without a better validation H-Mean; 0 never stops early"""

    seed: Annotated[int, Range(0, 2**31)] = 42
    """seed of the initial weights, the order of samples and the augmentation"""

    deterministic: bool = False
    """the same weights from the same seed and data each time on one machine, also where that is slower"""

    save_minutes: Weight = 10.0
    """minutes between two saves within an epoch; 0 saves only at its end"""


@dataclass(frozen=True)
class DeviceConfig:
    """Where and in which precision the network runs."""

    device: str = "auto"
    """auto (the GPU where there is one), cpu, cuda or cuda:N"""

    amp: Literal["auto", "off", "fp16", "bf16"] = "auto"
    """automatic mixed precision; auto is bf16 where the GPU has it, else fp16, and off on a CPU"""

    compile: bool = False
    """compile the network with torch.compile: minutes at the start for faster steps; needs a C++ compiler"""


@dataclass(frozen=True)
class PostprocessConfig:
    """How a probability map is made of several views of an image, and becomes polygons."""

    tta: bool = False
    """test-time augmentation at evaluation and prediction: the mean map of the image at several sizes, and mirrored
    too by networks trained with flips; a little more accurate, three to six times the time"""

    use_polygon: bool = False
    """polygons that follow the contour; false gives minimum-area rectangles"""

    thresh: Fraction = 0.3
    """probability from which a pixel is text"""

    box_thresh: Fraction = 0.4
    """mean probability inside a region from which it is kept"""

    max_candidates: Count = 300
    """regions that are kept in an image at most, the best ones"""

    min_size: Weight = 3.0
    """shortest side of a region before it is grown, in pixels of the map, which is as large as the resized image"""

    box_unclip_ratio: Annotated[float, Range(0, 10)] = 1.5
    """how far rectangles are grown: by area x ratio / perimeter, in pixels of the map"""

    polygon_unclip_ratio: Annotated[float, Range(0, 10)] = 2.0
    """how far polygons are grown: by area x ratio / perimeter, in pixels of the map"""


_GROUPS = (ModelConfig, DataConfig, AugmentConfig, LossConfig, TrainConfig, DeviceConfig, PostprocessConfig)


@dataclass(frozen=True)
class Config(PostprocessConfig, DeviceConfig, TrainConfig, LossConfig, AugmentConfig, DataConfig, ModelConfig):
    """All of a run's settings, checked and immutable; change one with `dataclasses.replace`.

    Raises UserError, naming the flag and the allowed values, when a value is of the wrong type or out of range.
    """

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
        for size in self.train_sizes:
            if size % STRIDE or size <= 0:
                raise UserError(f"--train-sizes {size}: must be a multiple of {STRIDE}")

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "Config":
        """The preset `name` with some fields changed, e.g. `Config.from_preset("v1", batch_size=4)`."""
        if name not in PRESETS:
            raise UserError(f"--preset {name}: no such preset; there are {', '.join(PRESETS)}")
        return PRESETS[name].changed(**changes)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The configuration that `to_dict` made; fields it lacks get their defaults, unknown ones are refused."""
        return cls().changed(**values)

    def changed(self, **changes: Any) -> Self:
        """A copy with some fields changed; lists, as JSON has them, count as tuples. Raises UserError for a field that
        does not exist."""
        unknown = sorted(changes.keys() - _hints().keys())
        if unknown:
            raise UserError(f"unknown configuration field {unknown[0]!r}; --help lists all of them")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()
        }
        return dataclasses.replace(self, **values)

    def to_dict(self) -> dict[str, Any]:
        """Field names and plain values, group by group, ready for JSON."""
        values = {name: getattr(self, name) for name in _hints()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@cache
def _hints() -> dict[str, Any]:
    """Field names and type hints in the order of the groups."""
    return {
        field.name: get_type_hints(group, include_extras=True)[field.name]
        for group in _GROUPS
        for field in dataclasses.fields(group)
    }


def _check(name: str, hint: Any, value: Any) -> None:
    flag = f"--{name.replace('_', '-')} {value}"
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise UserError(f"{flag}: takes one of {', '.join(get_args(hint))}")
        return
    if hint == Sizes:
        if not isinstance(value, tuple) or not all(type(size) is int for size in value):
            raise UserError(f"--{name.replace('_', '-')} {value}: takes whole numbers separated by commas")
        return
    kind = _value_type(hint)
    allowed: Any = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{flag}: takes a value of type {kind.__name__}")
    if get_origin(hint) is Annotated:
        bounds = get_args(hint)[1]
        if not (value < math.inf and bounds.low <= value <= bounds.high):  # nan is nowhere
            raise UserError(f"{flag}: must be {bounds}")


def _value_type(hint: Any) -> type:
    """The plain type that a flag's text is converted to."""
    if get_origin(hint) is Literal:
        return str
    if hint == Sizes:
        return tuple
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _metavar(hint: Any) -> str | None:
    """What stands for the value in the help; None where its choices do."""
    if get_origin(hint) is Literal:
        return None
    names = {Sizes: "INT,INT,...", str: "NAME"}
    return names.get(hint) or _value_type(hint).__name__.upper()


BASELINE = Config()
V0 = BASELINE.changed(
    backbone="resnet34",
    use_polygon=True,
    box_thresh=0.3,
    max_candidates=500,
    optimizer="adamw",
    schedule="cosine",
    epochs=20,
    rotate90_p=0.2,
    brightness_contrast_p=0.5,
    clahe_p=0.3,
)
V1 = V0.changed(image_size=1024, batch_size=8, accumulate=2, box_thresh=0.25, prob_loss_weight=7.0)
V2 = V1.changed(
    backbone="efficientnet_b3",
    train_sizes=(640, 800, 1024),
    batch_size=4,
    accumulate=4,
    epochs=30,
    tta=True,
)
V3 = V1.changed(backbone="resnet50", batch_size=4, accumulate=4, thresh=0.22, box_thresh=0.35)
SLIM = V1.changed(
    backbone="mobilenet_v3_large",
    pyramid_channels=96,
    pad="tight",
    batch_size=4,
    accumulate=1,
    rotate90_p=0.0,
)
LITE = SLIM.changed(image_size=800, flip_p=0.0, scale=2.0, rotate=2.0, perspective=0.03, ema=0.998)
DEMO = SLIM.changed(data="demo/data", weights="none", image_size=448, epochs=7)
BEST = V3.changed(
    backbone="timm:hrnet_w44",
    fusion="asf",
    lr=1.3e-3,
    epochs=30,
    ema=0.999,
    scale=2.0,
    rotate=2.0,
    perspective=0.03,
    brightness_contrast_p=0.4,
    brightness=0.33,
    contrast=0.28,
    tta=True,
)

PRESETS: dict[str, Config] = {
    "baseline": BASELINE,
    "v0": V0,
    "v1": V1,
    "v2": V2,
    "v3": V3,
    "best": BEST,
    "lite": LITE,
    "demo": DEMO,
}


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser whose mistakes are one-line UserErrors, with a flag for every field of the configuration."""

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        """Raise UserError in place of argparse's usage text and exit."""
        raise UserError(f"{message} (see --help)")

    def add_config_flags(self, of_checkpoint: bool = False) -> None:
        """Add `--field-name VALUE` for every field of Config, a group of the help for each of its parts.

        In scripts whose values come from a checkpoint, the help shows those that matter there; all are taken. Comes
        after the script's own flags, which the usage line lists.
        """
        self.usage = self.format_usage().removeprefix("usage: ").rstrip().replace("%", "%%") + " [--FIELD VALUE ...]"
        self.epilog = (
            "A FIELD that is not named keeps the checkpoint's value. Those of training (train.py --help) are taken too."
            if of_checkpoint
            else "In parentheses: what preset v1 has; for another, --preset NAME --print-config."
        )
        without_training = (
            self.add_argument_group("what is read, and where the network runs") if of_checkpoint else None
        )
        for group in _GROUPS:
            title = (group.__doc__ or "").strip().rstrip(".")
            if group is PostprocessConfig or not without_training:
                chapter = self.add_argument_group(title[:1].lower() + title[1:])
            else:
                chapter = without_training
            documentation = _field_docstrings(group)
            for field in dataclasses.fields(group):
                hint = _hints()[field.name]
                kind: Any = _value_type(hint)
                described = " ".join(documentation[field.name].split()).replace("%", "%%")
                if not of_checkpoint:
                    described += f" ({_as_typed(getattr(V1, field.name))})"
                elif group is not PostprocessConfig and field.name not in _WITHOUT_TRAINING:
                    described = argparse.SUPPRESS
                chapter.add_argument(
                    f"--{field.name.replace('_', '-')}",
                    type={bool: _parse_bool, tuple: _parse_sizes}.get(kind, kind),
                    choices=get_args(hint) if get_origin(hint) is Literal else None,
                    metavar=_metavar(hint),
                    default=argparse.SUPPRESS,
                    help=described,
                )

    def parse(self, arguments: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
        """Split the command line into the script's own arguments and the configuration fields that it changes.

        A boolean field may stand alone (`--strict`) or with a value (`--use-polygon false`).
        """
        tokens = list(sys.argv[1:] if arguments is None else arguments)
        switches = {f"--{name.replace('_', '-')}" for name, hint in _hints().items() if hint is bool}
        for i in range(len(tokens) - 1, -1, -1):
            if tokens[i] in switches:
                value = tokens.pop(i + 1) if i + 1 < len(tokens) and tokens[i + 1].lower() in _BOOLEANS else "true"
                tokens[i] += f"={value}"
        namespace = self.parse_args(tokens)
        changes = {name: vars(namespace).pop(name) for name in _hints() if name in namespace}
        return namespace, changes


_WITHOUT_TRAINING = {"data", "format", "image_size", "workers", "strict", "batch_size", "device", "amp", "compile"}
"""Fields outside of PostprocessConfig that matter where a checkpoint is used."""

_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def _parse_bool(text: str) -> bool:
    if text.lower() not in _BOOLEANS:
        raise argparse.ArgumentTypeError(f"takes true or false, not {text!r}")
    return _BOOLEANS[text.lower()]


def _as_typed(value: Any) -> str:
    """A value as a flag takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _parse_sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(",") if size.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes whole numbers separated by commas, not {text!r}") from None


def _field_docstrings(group: type) -> dict[str, str]:
    """The string under each field of a dataclass, read from its source."""
    [definition] = ast.parse(inspect.getsource(group)).body
    return {
        ast.unparse(field.target): ast.literal_eval(docstring.value)
        for field, docstring in pairwise(ast.iter_child_nodes(definition))
        if isinstance(field, ast.AnnAssign) and isinstance(docstring, ast.Expr)
    }


def print_config(config: Config) -> None:
    """Print the configuration as JSON on stdout."""
    print(json.dumps(config.to_dict(), indent=2))


def print_difference(config: Config, name: str, reference: Config) -> None:
    """Print a line for each field in which `config` differs from the preset `reference` called `name`."""
    values, others = config.to_dict(), reference.to_dict()
    differing = [field for field in values if values[field] != others[field]]
    if not differing:
        print(f"no difference from {name}")
        return
    rows = [("field", name, "here"), *((field, str(others[field]), str(values[field])) for field in differing)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
