"""Network, losses and checkpoints."""

import pickle
import re
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dbnet.checkpoint import load_checkpoint, load_model, load_weights, save_checkpoint
from dbnet.config import PRESETS, Config
from dbnet.dataset import Batches, TextDataset, make_loader
from dbnet.ensemble import Ensemble
from dbnet.errors import UserError
from dbnet.inference import Pipeline
from dbnet.loss import balanced_cross_entropy, db_loss, hardest
from dbnet.model import BACKBONES, DBNet, Maps, fold_batch_norms


@pytest.mark.parametrize(
    ("backbone", "channels"),
    [
        ("resnet18", [64, 128, 256, 512]),
        ("resnet50", [256, 512, 1024, 2048]),
        ("mobilenet_v3_large", [24, 40, 112, 960]),
        ("efficientnet_b3", [32, 48, 136, 1536]),
    ],
)
def test_channels_are_asked_of_the_backbone_and_maps_have_the_images_size(backbone, channels):
    model = DBNet(Config.from_preset("lite", backbone=backbone, weights="none"))
    assert model.backbone.channels == channels
    images = torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8)
    maps = model.train()(images)
    assert maps.prob_logits.shape == maps.thresh_logits.shape == (2, 64, 96)
    with torch.no_grad():
        prob_map = model.eval()(images)
    assert prob_map.shape == (2, 64, 96) and prob_map.dtype == torch.float32
    assert prob_map.min() >= 0 and prob_map.max() <= 1


def test_every_backbone_of_the_dict_can_be_configured():
    for name in BACKBONES:
        Config.from_preset("v1", backbone=name)


def test_weights_come_from_a_file_and_a_wrong_one_says_what_to_do(tmp_path):
    model = BACKBONES["mobilenet_v3_large"][0](weights=None)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    config = PRESETS["lite"].changed(weights=str(tmp_path / "weights.pth"))
    first = next(DBNet(config).backbone.parameters())
    assert torch.equal(first, next(model.parameters()))
    for name, backbone in (("weights.pth", "resnet18"), ("absent.pth", "resnet18")):
        with pytest.raises(UserError, match=rf"{re.escape(name)}.*--weights none.*--weights FILE"):
            DBNet(config.changed(weights=str(tmp_path / name), backbone=backbone))


def test_weights_that_cannot_be_downloaded_name_the_way_out(monkeypatch, tmp_path):
    def refuse(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"no network.*--weights none.*--weights FILE"):
        DBNet(PRESETS["v1"])


@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=40), st.integers(0, 50))
def test_hardest_picks_the_sum_that_topk_picks(values, count):
    losses = torch.tensor(values)
    weights = hardest(losses, torch.tensor(float(count)))
    expected = losses.topk(min(count, len(values))).values.sum()
    assert (losses * weights).sum().item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-30)
    assert weights.min() >= 0 and weights.max() <= 1


def test_balanced_cross_entropy_takes_three_hardest_negatives_a_positive():
    logits = torch.tensor([[[2.0, -1.0, -2.0, 0.5, 3.0, -4.0, 1.0, -0.5]]])
    target = torch.tensor([[[1.0, 0, 0, 0, 0, 0, 0, 0]]])
    mask = torch.ones_like(target)
    mask[..., 4] = 0  # the hardest is don't-care
    softplus = torch.nn.functional.softplus
    expected = (softplus(torch.tensor(-2.0)) + softplus(torch.tensor([1.0, 0.5, -0.5])).sum()) / 4
    assert balanced_cross_entropy(logits, target, mask, 3).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("text", [0.0, 1.0])
def test_losses_and_gradients_are_finite_for_extreme_logits(dtype, text):
    extreme = torch.tensor([-6e4, -100, 0, 100, 6e4]).repeat(20).reshape(1, 10, 10).to(dtype)
    maps = Maps(extreme.clone().requires_grad_(), extreme.flip(-1).clone().requires_grad_())
    prob_map = torch.full((1, 10, 10), text)
    losses = db_loss(maps, prob_map, prob_map * 0.4 + 0.3, torch.ones(1, 10, 10), PRESETS["v1"])
    losses.total.backward()
    assert torch.stack(losses).isfinite().all() and losses.total.dtype == torch.float32
    assert maps.prob_logits.grad.isfinite().all() and maps.thresh_logits.grad.isfinite().all()


def test_a_perfect_prediction_costs_next_to_nothing_and_dont_care_nothing():
    target = torch.zeros(1, 16, 16)
    target[:, 4:8, 4:12] = 1
    thresh_levels = torch.zeros((1, 16, 16), dtype=torch.uint8)
    thresh_levels[:, 2:10, 2:14] = 191
    thresh_map = 0.3 + 0.4 * thresh_levels / 255
    perfect = Maps((target * 2 - 1) * 20, torch.logit(thresh_map))
    mask = torch.ones_like(target)
    assert db_loss(perfect, target, thresh_levels, mask, PRESETS["v1"]).total < 0.01
    mask[:, :, 8:] = 0
    spoiled = Maps(perfect.prob_logits.clone(), perfect.thresh_logits)
    spoiled.prob_logits[:, :, 8:] *= -1
    assert db_loss(spoiled, target, thresh_levels, mask, PRESETS["v1"]).total < 0.01


@pytest.fixture
def checkpoint(small, tmp_path):
    torch.manual_seed(0)
    model = DBNet(small)
    save_checkpoint(tmp_path / "best.pt", small, model, hmean=0.5)
    return tmp_path / "best.pt"


def test_a_checkpoint_carries_weights_and_configuration(checkpoint, small):
    model, config, content = load_model(checkpoint, {"box_thresh": 0.6})
    assert config == small.changed(box_thresh=0.6)
    assert content["hmean"] == 0.5 and not model.training


class Bomb:
    def __reduce__(self):
        return (open, ("bomb-went-off", "w"))


def pickle_bomb(path):
    with path.open("wb") as file:
        pickle.dump({"format": 1, "config": Bomb(), "model": {}}, file)


def torch_bomb(path):
    torch.save({"format": 1, "config": Bomb(), "model": {}}, path)


def other_content(path):
    torch.save({"state_dict": {}}, path)


def newer(path):
    torch.save({**torch.load(path, weights_only=True), "format": 99}, path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (pickle_bomb, "not a checkpoint"),
        (torch_bomb, "not a checkpoint"),
        (other_content, "not a checkpoint of dbnet"),
        (newer, "newer dbnet"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.unlink(), "no such checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_one_line_and_runs_no_code(checkpoint, spoil, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spoil(checkpoint)
    with pytest.raises(UserError, match=words) as caught:
        load_checkpoint(checkpoint)
    assert "best.pt" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "bomb-went-off").exists()


def test_another_architecture_is_named(checkpoint):
    with pytest.raises(UserError, match=r"mobilenet_v3_large, 96 .*resnet18, 96"):
        load_model(checkpoint, {"backbone": "resnet18"})


def test_a_checkpoint_of_v0_is_a_network_of_v1(tmp_path):
    v0, v1 = PRESETS["v0"].changed(weights="none"), PRESETS["v1"].changed(weights="none")
    trained = DBNet(v0)
    save_checkpoint(tmp_path / "v0.pt", v0, trained)
    _, config, content = load_model(tmp_path / "v0.pt", v1.to_dict())
    assert config == v1
    started = DBNet(v1)
    load_weights(started, content, tmp_path / "v0.pt", v1)
    for ours, theirs in zip(started.state_dict().values(), trained.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_folded_batch_norms_compute_the_same(backbone):
    torch.manual_seed(0)
    model = DBNet(PRESETS["lite"].changed(backbone=backbone, weights="none"))
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 2)
            layer.weight.data.uniform_(0.5, 1.5)
    images = torch.randint(0, 256, (1, 64, 96, 3), dtype=torch.uint8)
    with torch.inference_mode():
        expected = model.eval()(images)
    fold_batch_norms(model)
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in model.modules())
    with torch.inference_mode():
        torch.testing.assert_close(model(images), expected, atol=0.01, rtol=0)  # a hundred layers amplify rounding


def test_polygons_made_in_other_processes_are_the_same(small):
    """What a GPU has run beside it; here beside a CPU."""
    torch.manual_seed(0)
    config = small.changed(batch_size=1, box_thresh=0.0, thresh=0.5)  # an untrained network finds something everywhere
    dataset = TextDataset(config, "val", train=False)
    model = DBNet(config)
    network = Ensemble.of(model, config, torch.device("cpu"))
    here, beside = (Pipeline(dataset, config, network.device) for _ in range(2))
    beside.loader = make_loader(Batches(dataset, 1), workers=1, pin_memory=False)
    beside._extractors = ProcessPoolExecutor(1)
    ours, theirs = ({found.index: found for found in pipeline.detect(network)} for pipeline in (here, beside))
    assert sorted(ours) == sorted(theirs) == list(range(len(dataset)))
    assert any(found.polygons for found in ours.values())
    for index, found in ours.items():
        assert found.scores == theirs[index].scores
        for polygon, other in zip(found.polygons, theirs[index].polygons, strict=True):
            assert np.array_equal(polygon, other)
    assert here.evaluate(network).per_image.keys() == {path.name for path in dataset.paths}
