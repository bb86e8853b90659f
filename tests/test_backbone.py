"""Backbones of torchvision and timm, the fusion of their features, and batch norms folded into convolutions."""

import re
import shutil
import sys

import huggingface_hub.constants
import pytest
import timm
import torch
import torchvision.models as zoo
from torch import nn

from dbnet.config import PRESETS, Config
from dbnet.errors import UserError
from dbnet.model import DBNet, ScaleAttention, fold, fold_batch_norms, prepare_for_cpu

CHANNELS = {
    "resnet18": [64, 128, 256, 512],
    "resnext50_32x4d": [256, 512, 1024, 2048],
    "mobilenet_v3_small": [16, 24, 48, 576],
    "mobilenet_v3_large": [24, 40, 112, 960],
    "efficientnet_b0": [24, 40, 112, 1280],
    "efficientnet_b3": [32, 48, 136, 1536],
    "efficientnet_v2_s": [48, 64, 160, 1280],
    "convnext_tiny": [96, 192, 384, 768],
    "regnet_x_400mf": [32, 64, 160, 400],
    "regnet_y_400mf": [48, 104, 208, 440],
    "swin_t": [96, 192, 384, 768],
    "swin_v2_t": [96, 192, 384, 768],
    "timm:hrnet_w18_small": [128, 256, 512, 1024],
    "timm:convnext_atto": [40, 80, 160, 320],
    "timm:efficientnet_b0": [24, 40, 112, 320],
    "timm:resnet10t": [64, 128, 256, 512],
}


@pytest.fixture(scope="module", params=CHANNELS)
def backbone(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(backbone) -> DBNet:
    """A network whose batch norms have something to do."""
    torch.manual_seed(0)
    model = DBNet(PRESETS["lite"].changed(backbone=backbone, weights="none", pyramid_channels=32))
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 2)
            layer.weight.data.uniform_(0.5, 1.5)
    return model.to(memory_format=torch.channels_last)


def test_channels_are_asked_of_the_network_and_every_part_of_it_learns(model, backbone):
    assert model.backbone.channels == CHANNELS[backbone]
    images = torch.randint(0, 256, (2, 96, 160, 3), dtype=torch.uint8)
    maps = model.train()(images)
    assert maps.prob_logits.shape == maps.thresh_logits.shape == (2, 96, 160)
    (maps.prob_logits.square().mean() + maps.thresh_logits.square().mean()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(("height", "width"), [(32, 32), (96, 160), (224, 32)])
def test_maps_have_the_size_of_images_of_any_shape(model, height, width):
    images = torch.randint(0, 256, (1, height, width, 3), dtype=torch.uint8)
    with torch.inference_mode():
        prob_map = model.eval()(images)
    assert prob_map.shape == (1, height, width) and prob_map.dtype == torch.float32
    assert prob_map.min() >= 0 and prob_map.max() <= 1


def test_every_folded_network_computes_the_same(model, backbone):  # the last to see the model
    images = torch.randint(0, 256, (1, 96, 160, 3), dtype=torch.uint8)
    with torch.inference_mode():
        expected = model.eval()(images)
    fold(model)
    left = [layer for part in (model.backbone, model.prob_branch) for layer in part.modules()]
    assert not any(type(layer) is nn.BatchNorm2d for layer in left)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=0)
        prepare_for_cpu(model.to(memory_format=torch.channels_last), None)
        torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("fusion", ["concat", "asf"])
def test_a_folded_network_computes_the_same_up_to_the_borders(fusion):
    torch.manual_seed(0)
    model = DBNet(PRESETS["lite"].changed(weights="none", fusion=fusion)).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 2)
            norm.weight.data.uniform_(0.5, 2)
    images = torch.randint(0, 256, (2, 96, 160, 3), dtype=torch.uint8)
    with torch.inference_mode():
        expected = model(images)
        fold(model)
        torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=0)
        assert expected.std() > 0.01  # it says something
        prepare_for_cpu(model, torch.bfloat16)
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            assert not any(isinstance(layer, nn.Conv2d) for layer in model.backbone.modules()), "all are fused"
        with torch.autocast("cpu", torch.bfloat16):  # as in inference; not every processor has it in hardware
            torch.testing.assert_close(model(images), expected, atol=0.1, rtol=0)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_weights_are_stored_once_for_each_layout_and_not_in_each_call(dtype, capfd):
    if not torch.backends.mkldnn.is_available() or (dtype and not torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        pytest.skip("oneDNN does not compute in this type here")
    torch.manual_seed(0)
    model = DBNet(PRESETS["lite"].changed(weights="none")).eval()
    fold(model)
    prepare_for_cpu(model, dtype)
    shapes = [(1, 800, width, 3) for width in (64, 256, 352)]
    with torch.inference_mode():
        for shape in shapes:
            model(torch.zeros(shape, dtype=torch.uint8))
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            for shape in shapes:
                model(torch.zeros(shape, dtype=torch.uint8))
    lines = [line.split(",") for line in capfd.readouterr().out.splitlines() if ",exec," in line]
    reordered = [line[-2] for line in lines if line[5] == "reorder"]  # out x in x height x width; images begin with 1
    assert len(lines) > 200 and [shape for shape in reordered if not shape.startswith("1x")] == []


class Misleading(nn.Module):
    """Registered as if each batch norm belonged to the convolution before it, and it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.conv3, self.bn3 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, images):
        images = images.permute(0, 3, 1, 2).float() / 255
        shared = self.conv2(self.bn2(self.conv1(images)))  # conv1 is followed by bn2
        shared = self.bn1(shared) + shared  # what bn1 takes goes elsewhere too
        return self.bn3(self.conv3(self.conv3(shared)))  # conv3 runs twice


def test_only_a_batch_norm_that_alone_follows_a_convolution_is_folded_into_it():
    torch.manual_seed(0)
    model = Misleading().eval()
    for norm in (model.bn1, model.bn2, model.bn3):
        norm.running_mean.normal_()
        norm.weight.data.uniform_(0.5, 2)
    images = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8)
    expected = model(images)
    fold_batch_norms(model)
    torch.testing.assert_close(model(images), expected)
    assert [type(norm) for norm in (model.bn1, model.bn2, model.bn3)] == [nn.BatchNorm2d, nn.Identity, nn.BatchNorm2d]


@pytest.mark.parametrize(
    ("backbone", "mean"), [("resnet18", [0.485, 0.456, 0.406]), ("timm:tf_efficientnet_lite0.in1k", [0.5, 0.5, 0.5])]
)
def test_images_are_normalized_as_the_weights_of_the_network_expect(backbone, mean):
    model = DBNet(PRESETS["lite"].changed(backbone=backbone, weights="none"))
    assert (model.mean / 255).flatten().tolist() == pytest.approx(mean)


def test_adaptive_scale_fusion_weighs_each_level_at_each_place():
    torch.manual_seed(0)
    attention = ScaleAttention(width=32, levels=4)
    joined = torch.rand(2, 32, 24, 40) + 0.5
    weighed = attention(joined)
    assert weighed.shape == joined.shape
    weights = (weighed / joined).unflatten(1, (4, 8))
    assert torch.allclose(weights, weights[:, :, :1].expand_as(weights), atol=1e-5)  # one weight a level and place
    assert weights.min() > 0 and weights.max() < 1
    assert weights[:, :, 0].flatten(2).std(dim=2).min() > 0 and weights[:, :, 0].std(dim=1).min() > 0


def test_however_large_the_features_are_no_weight_of_the_fusion_is_stuck():
    torch.manual_seed(0)
    joined = 1000 * torch.randn(2, 32, 24, 40)
    weights = ScaleAttention(width=32, levels=4)(joined) / joined
    assert weights.min() > 0.01 and weights.max() < 0.99


def test_fusion_is_chosen_by_the_configuration():
    images = torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8)
    parameters = {}
    for fusion in ("concat", "asf"):
        model = DBNet(PRESETS["lite"].changed(weights="none", fusion=fusion))
        assert model.eval()(images).shape == model.train()(images).prob_logits.shape == (2, 64, 96)
        parameters[fusion] = sum(parameter.numel() for parameter in model.parameters())
    assert parameters["asf"] - parameters["concat"] == 96 * 9 * 24 + 2 * 24 + 9 + 1 + 24 * 4
    assert Config().fusion == "concat"  # as in checkpoints from before there was a choice


@pytest.mark.parametrize(
    ("backbone", "words"),
    [
        ("resnet19", r"--backbone resnet19: no such network \(did you mean resnet18.*convnext.*timm:NAME"),
        ("vgg16", r"--backbone vgg16: no such network.*resnet, resnext"),
        ("timm:hrnet_w43", r"timm:hrnet_w43: timm .* no such network \(did you mean .*hrnet_w4[048]"),
        ("timm:convnext_atto.no_such_weights", r"timm:convnext_atto.no_such_weights .*take another$"),
        ("timm:vit_tiny_patch16_224", r"timm:vit_tiny_patch16_224: does not take images of any size"),
        ("timm:xcit_nano_12_p16_224", r"timm:xcit_nano_12_p16_224: has no features at stride 4, 8, 32"),
    ],
)
def test_a_network_that_does_not_fit_is_rejected_in_one_line(backbone, words):
    with pytest.raises(UserError, match=words) as caught:
        DBNet(PRESETS["lite"].changed(backbone=backbone, weights="none"))
    assert "\n" not in str(caught.value)


def test_timm_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"timm:hrnet_w44: needs timm; pip install timm"):
        DBNet(PRESETS["lite"].changed(backbone="timm:hrnet_w44"))


@pytest.mark.parametrize("backbone", ["mobilenet_v3_large", "timm:mobilenetv3_small_050"])
def test_weights_come_from_a_file_and_a_wrong_one_says_what_to_do(backbone, tmp_path):
    network = backbone.removeprefix("timm:")
    classifier = timm.create_model(network) if backbone.startswith("timm:") else zoo.get_model(network)
    torch.save(classifier.state_dict(), tmp_path / "weights.pth")
    torch.save([1], tmp_path / "list.pth")
    (tmp_path / "text.safetensors").write_text("no tensors")
    config = PRESETS["lite"].changed(weights=str(tmp_path / "weights.pth"), backbone=backbone)
    ours, theirs = DBNet(config).backbone.parameters(), classifier.parameters()
    assert all(torch.equal(*pair) for pair, _ in zip(zip(ours, theirs, strict=False), range(50), strict=False))
    other = "timm:convnext_atto" if backbone.startswith("timm:") else "resnet18"
    for name, wanted in (("weights", other), ("absent", backbone), ("list", backbone), ("text", backbone)):
        path = next(tmp_path.glob(f"{name}.*"), tmp_path / "absent.pth")
        with pytest.raises(UserError, match=rf"{re.escape(path.name)}.*--weights none.*--weights FILE"):
            DBNet(config.changed(weights=str(path), backbone=wanted))


def test_downloaded_weights_are_loaded_without_running_their_code(monkeypatch, tmp_path):
    def download(url, destination, *_args, **_kwargs):
        torch.save(contents[0], destination)

    torch.manual_seed(1)
    trained = zoo.get_model("resnet18", weights=None).state_dict()
    contents = [trained]
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    config = PRESETS["baseline"].changed(pyramid_channels=32)
    ours = DBNet(config).backbone.stages.state_dict()
    assert all(any(torch.equal(tensor, theirs) for theirs in trained.values()) for tensor in list(ours.values())[:20])
    contents[0] = re.compile("code")  # a pickle that names a function to call
    shutil.rmtree(tmp_path / "hub")
    with pytest.raises(UserError, match=r"--weights imagenet: https.*Weights only load failed.*--weights none"):
        DBNet(config)


def test_a_lack_of_memory_is_not_blamed_on_the_weights(monkeypatch, tmp_path):
    def load(*_args, **_kwargs):
        raise MemoryError

    torch.save({}, tmp_path / "a.pth")
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(MemoryError):
        DBNet(PRESETS["lite"].changed(weights=str(tmp_path / "a.pth")))


@pytest.mark.parametrize("backbone", ["resnet34", "timm:convnext_atto"])
def test_weights_that_cannot_be_downloaded_name_the_way_out(backbone, monkeypatch, tmp_path):
    def refuse(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"--weights imagenet: .*--weights none.*--weights FILE"):
        DBNet(PRESETS["v1"].changed(backbone=backbone))
