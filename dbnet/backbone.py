"""Backbones: networks of torchvision and timm that give features at strides 4, 8, 16 and 32."""

import difflib
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
import torchvision.models as zoo
from torch import Tensor, nn

from dbnet.errors import UserError, library_errors

FAMILIES = ("resnet", "resnext", "wide_resnet", "efficientnet", "convnext", "mobilenet_v3", "regnet", "swin")
STRIDES = (4, 8, 16, 32)
WAY_OUT = "use --weights none to train from scratch, or --weights FILE with a state_dict of that network"


class Backbone(nn.Module):
    """Four features of each image, (N, channels, H / stride, W / stride) at strides 4, 8, 16 and 32.

    Input: (N, 3, H, W) RGB in 0..1, normalized by `mean` and `std`, which belong to the weights of the network.
    `channels` has a number for each stride. Raises UserError if the network, its features or weights are missing."""

    def __init__(self, name: str, weights: str) -> None:
        super().__init__()
        self.mean, self.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
        if name.startswith("timm:"):
            self.stages = _load_timm(name, weights)
            pretrained: Any = self.stages.pretrained_cfg
            self.mean, self.std = pretrained["mean"], pretrained["std"]
        else:
            self.stages = _cut_into_stages(_load_torchvision(name, weights))
        with library_errors(f"--backbone {name}: does not take images of any size", "take another"):
            features = _probe(self.stages)
        if missing := [str(stride) for stride in STRIDES if stride not in features]:
            raise UserError(f"--backbone {name}: has no features at stride {', '.join(missing)}; take another")
        self.layers, self.channels, last = map(list, zip(*(features[stride] for stride in STRIDES), strict=True))
        self.channels_last = last[-1]
        # Without batch norms (ConvNeXt, Swin) a feature is a sum of residuals, which is not normalized.
        normalized = any(isinstance(layer, nn.BatchNorm2d) for layer in self.stages.modules())
        self.norms = nn.ModuleList(nn.Identity() if normalized else ChannelNorm(count) for count in self.channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        stages = self.stages(images)
        features = [stages[layer].permute(0, 3, 1, 2) if self.channels_last else stages[layer] for layer in self.layers]
        return [norm(feature) for norm, feature in zip(self.norms, features, strict=True)]


class Stages(nn.ModuleList):
    """Layers that run one after the other; the output is the list of all their outputs."""

    def forward(self, images: Tensor) -> list[Tensor]:
        return list(accumulate(self, lambda feature, stage: stage(feature), initial=images))[1:]


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels at each pixel; the features are (N, C, H, W)."""

    def forward(self, feature: Tensor) -> Tensor:
        return super().forward(feature.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _load_torchvision(name: str, weights: str) -> nn.Module:
    """Torchvision's classifier of this name."""
    names = [known for known in zoo.list_models(module=zoo) if known.startswith(FAMILIES)]
    if name not in names:
        known = f"takes a network of torchvision's families {', '.join(FAMILIES)} by its name there, or timm:NAME"
        raise UserError(f"--backbone {name}: no such network{_similar(name, names)}; {known}")
    classifier = zoo.get_model(name, weights=None)
    if weights == "none":
        return classifier
    if weights == "imagenet":
        pretrained = zoo.get_model_weights(name).DEFAULT
        with library_errors(f"--weights imagenet: {pretrained.url} cannot be loaded", WAY_OUT):
            state = pretrained.get_state_dict(check_hash=True, weights_only=True)
    else:
        state = _read_weights(weights)
    with library_errors(f"--weights {weights}: not those of {name}", WAY_OUT):
        classifier.load_state_dict(state)
    return classifier


def _load_timm(name: str, weights: str) -> nn.Module:
    """The network timm:NAME, which gives a list of features, finest first (timm's `features_only`)."""
    try:
        import timm
    except ImportError:
        raise UserError(f"--backbone {name}: needs timm; pip install timm") from None
    network = name.removeprefix("timm:")
    if not timm.is_model(network):
        similar = _similar(network.split(".")[0], timm.list_models())
        raise UserError(f"--backbone {name}: timm {timm.__version__} has no such network{similar}")
    options: dict[str, Any] = {"pretrained": weights != "none"}
    if weights not in ("none", "imagenet"):
        options["pretrained_cfg_overlay"] = {"state_dict": _read_weights(weights)}
        with library_errors(f"--weights {weights}: not those of {name}", WAY_OUT):
            timm.create_model(network, **options)  # whole, because features_only ignores tensors that do not fit
    fix = "take another" if weights == "none" else WAY_OUT
    with library_errors(f"--backbone {name} --weights {weights}: cannot be loaded", fix):
        return timm.create_model(network, features_only=True, **options)


def _read_weights(path: str) -> dict[str, Tensor]:
    """The tensors in a file of --weights, read without running code."""
    if not Path(path).is_file():
        raise UserError(f"--weights {path}: no such file; {WAY_OUT}")
    with library_errors(f"--weights {path}: not a state_dict", WAY_OUT):
        if path.endswith(".safetensors"):  # the format of timm's own weights
            from safetensors.torch import load_file

            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))


def _cut_into_stages(classifier: nn.Module) -> Stages:
    """A torchvision classifier's layers before its pooling, cut after the last layer of strides 4, 8, 16 and 32."""
    if hasattr(classifier, "features"):
        layers = list(classifier.get_submodule("features").children())
    elif hasattr(classifier, "trunk_output"):
        layers = [classifier.get_submodule("stem"), *classifier.get_submodule("trunk_output").children()]
    else:
        layers = [layer for name, layer in classifier.named_children() if name not in ("avgpool", "fc")]
    features = _probe(Stages(layers))
    ends = [features[stride][0] + 1 for stride in STRIDES]
    return Stages(nn.Sequential(*layers[start:end]) for start, end in pairwise([0, *ends]))


@torch.no_grad()
def _probe(network: nn.Module) -> dict[int, tuple[int, int, bool]]:
    """By stride: the index of the last feature that has it, its number of channels, and whether the channels are its
    last axis. The image is wider than high, so that the axes differ."""
    height, width = 2 * STRIDES[-1], 3 * STRIDES[-1]
    features = {}
    for index, feature in enumerate(network.eval()(torch.zeros(1, 3, height, width))):
        channels_last = feature.shape[2] * width != feature.shape[3] * height
        _, channels, rows, _ = (feature.movedim(3, 1) if channels_last else feature).shape
        features[height // rows] = index, channels, channels_last
    network.train()
    return features


def _similar(name: str, names: list[str]) -> str:
    matches = difflib.get_close_matches(name, names)
    return f" (did you mean {', '.join(matches)}?)" if matches else ""
