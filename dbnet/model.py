"""The network: a torchvision backbone, a feature pyramid, the differentiable binarization head (arXiv 1911.08947)."""

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision.models as zoo
from torch import Tensor, nn
from torch.nn import functional as F

from dbnet.config import ModelConfig
from dbnet.errors import UserError

BACKBONES = {
    "resnet18": (zoo.resnet18, zoo.ResNet18_Weights.IMAGENET1K_V1),
    "resnet34": (zoo.resnet34, zoo.ResNet34_Weights.IMAGENET1K_V1),
    "resnet50": (zoo.resnet50, zoo.ResNet50_Weights.IMAGENET1K_V2),
    "resnet101": (zoo.resnet101, zoo.ResNet101_Weights.IMAGENET1K_V2),
    "mobilenet_v3_large": (zoo.mobilenet_v3_large, zoo.MobileNet_V3_Large_Weights.IMAGENET1K_V2),
    "efficientnet_b3": (zoo.efficientnet_b3, zoo.EfficientNet_B3_Weights.IMAGENET1K_V1),
}
STRIDES = (4, 8, 16, 32)
BATCH_NORM_MOMENTUM = 0.1  # torchvision gives its mobile networks 0.01, too slow for the few steps of a short run
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Maps(NamedTuple):
    """What the network gives in training mode, (N, H, W) each, before the sigmoid."""

    prob_logits: Tensor
    thresh_logits: Tensor


class DBNet(nn.Module):
    """Text detector: 8-bit images in, maps of their own size out.

    Input: (N, H, W, 3) uint8 RGB as the data loader makes it, H and W multiples of 32. Normalization happens here, on
    the device, so that a quarter of the bytes travels to it; seen as (N, 3, H, W) the images are channels_last.

    Output: `Maps` in training mode; in eval mode the probability map alone, (N, H, W) float32 in 0..1.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.backbone = Backbone(config.backbone, config.weights)
        self.pyramid = FeaturePyramid(self.backbone.channels, config.pyramid_channels)
        self.prob_branch = _branch(config.pyramid_channels)
        self.thresh_branch = _branch(config.pyramid_channels)
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = BATCH_NORM_MOMENTUM
        self.register_buffer("mean", 255 * torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Maps | Tensor:
        normalized = (images.permute(0, 3, 1, 2).float() - self.mean) / self.std
        features = self.pyramid(self.backbone(normalized))
        prob_logits = self.prob_branch(features).squeeze(1)
        if not self.training:
            return prob_logits.float().sigmoid()
        return Maps(prob_logits, self.thresh_branch(features).squeeze(1))


class Backbone(nn.Module):
    """A torchvision classifier cut into four stages that end at strides 4, 8, 16 and 32.

    `channels` holds the number of channels of each stage, found by a look at a small image. Raises UserError where
    the weights cannot be had or do not fit.
    """

    def __init__(self, name: str, weights: str) -> None:
        super().__init__()
        layers = _feature_layers(_load_classifier(name, weights))
        strides, channels = _probe(layers)
        ends = [max(i for i, stride in enumerate(strides) if stride == wanted) + 1 for wanted in STRIDES]
        self.stages = nn.ModuleList(
            nn.Sequential(*layers[start:end]) for start, end in zip([0, *ends], ends, strict=False)
        )
        self.channels = [channels[end - 1] for end in ends]

    def forward(self, images: Tensor) -> list[Tensor]:
        features = []
        for stage in self.stages:
            images = stage(images)
            features.append(images)
        return features


class FeaturePyramid(nn.Module):
    """Bring four stages to `width` channels, add coarse to fine, and join all at stride 4: (N, width, H / 4, W / 4)."""

    def __init__(self, channels: list[int], width: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(count, width, 1, bias=False) for count in channels)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width // 4, 3, padding=1, bias=False) for _ in channels)

    def forward(self, features: list[Tensor]) -> Tensor:
        levels = [lateral(feature) for lateral, feature in zip(self.lateral, features, strict=True)]
        for fine, coarse in ((2, 3), (1, 2), (0, 1)):
            levels[fine] = levels[fine] + F.interpolate(levels[coarse], scale_factor=2.0)
        smooth = [layer(level) for layer, level in zip(self.smooth, levels, strict=True)]
        return torch.cat([F.interpolate(level, size=smooth[0].shape[-2:]) for level in reversed(smooth)], dim=1)


@torch.no_grad()
def fold_batch_norms(module: nn.Module) -> None:
    """Fold each batch norm into the convolution that it follows, in place: a network in eval mode computes the same, to
    rounding, in less time. What is registered one after the other is taken to run so, as in all of the backbones.
    """
    for child in module.children():
        fold_batch_norms(child)
    for (_, layer), (name, norm) in pairwise(list(module.named_children())):
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and isinstance(norm, nn.BatchNorm2d):
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            of_outputs = (1, -1, 1, 1) if isinstance(layer, nn.ConvTranspose2d) else (-1, 1, 1, 1)
            bias = 0 if layer.bias is None else layer.bias
            layer.weight = nn.Parameter(layer.weight * scale.view(of_outputs))
            layer.bias = nn.Parameter((bias - norm.running_mean) * scale + norm.bias)
            setattr(module, name, nn.Identity())


def _branch(width: int) -> nn.Sequential:
    """From the pyramid's features to one map of logits, 4 times their size (section 3.1 of the paper)."""
    inner = width // 4
    branch = nn.Sequential(
        nn.Conv2d(width, inner, 3, padding=1, bias=False),
        nn.BatchNorm2d(inner),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(inner, inner, 2, stride=2, bias=False),
        nn.BatchNorm2d(inner),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(inner, 1, 2, stride=2),
    )
    for layer in branch:
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(layer.weight)
    return branch


def _load_classifier(name: str, weights: str) -> nn.Module:
    builder, imagenet = BACKBONES[name]
    if weights == "none":
        return builder(weights=None)
    mend = "use --weights none to train from scratch, or --weights FILE with a torchvision state_dict of that backbone"
    if weights == "imagenet":
        try:
            return builder(weights=imagenet)
        except Exception as error:  # urllib, http and hash errors of the download
            reason = " ".join(str(error).split())
            raise UserError(f"--weights imagenet: {imagenet.url} cannot be had ({reason}); {mend}") from None
    if not Path(weights).is_file():
        raise UserError(f"--weights {weights}: no such file; {mend}")
    classifier = builder(weights=None)
    try:
        classifier.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except Exception as error:  # unpickling and state_dict errors of many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--weights {weights}: not a state_dict of {name} ({reason}); {mend}") from None
    return classifier


def _feature_layers(classifier: nn.Module) -> list[nn.Module]:
    """The layers that run before pooling, in order."""
    if hasattr(classifier, "features"):
        return list(classifier.features)
    return [layer for name, layer in classifier.named_children() if name not in ("avgpool", "fc")]


@torch.no_grad()
def _probe(layers: list[nn.Module]) -> tuple[list[int], list[int]]:
    """Stride and channels after each layer."""
    side = 2 * STRIDES[-1]
    feature = torch.zeros(1, 3, side, side)
    strides, channels = [], []
    for layer in layers:
        training = layer.training
        feature = layer.eval()(feature)
        layer.train(training)
        strides.append(side // feature.shape[-1])
        channels.append(feature.shape[1])
    return strides, channels
