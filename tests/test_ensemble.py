"""Several views of an image, and several networks: their probability maps lie on each other and are averaged."""

import numpy as np
import pytest
import torch
from support import CPU
from torch import nn

from dbnet.checkpoint import save_checkpoint
from dbnet.config import Config
from dbnet.dataset import Batches, ImageDataset, TextDataset
from dbnet.ensemble import TTA_SCALES, Ensemble, View, fitted, mirrored
from dbnet.errors import UserError
from dbnet.inference import Pipeline, load_network
from dbnet.memory import BatchPlan
from dbnet.model import DBNet
from dbnet.pictures import write_image


class Brightness(nn.Module):
    """A network that each view of an image shows the same: its probability is the pixel's red value / 255 x `gain`."""

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain = gain
        self.seen = []

    def forward(self, images):
        self.seen.append(images.clone())
        return images[..., 0].float() / 255 * self.gain


def infer(ensemble, dataset, micro_batch=8):
    dataset.further_sizes = ensemble.sides[1:]
    [batch] = map(dataset.batch, Batches(dataset, len(dataset)))
    images = [batch["image"], *(batch[f"image_{side}"] for side in ensemble.sides[1:])]
    return batch, ensemble.infer(images, batch["size"].tolist(), BatchPlan(micro_batch))()


@pytest.fixture
def pictures(tmp_path):
    """Two pictures of 64 x 96 and 60 x 96 with a gradient to the right and one downward, and a config of their size."""
    for name, width in (("a.png", 64), ("b.png", 60)):
        ys, xs = np.mgrid[:96, :width]
        write_image(tmp_path / name, np.repeat((2 * xs + ys)[..., None], 3, axis=2).astype(np.uint8))
    config = Config(image_size=96)
    return ImageDataset(sorted(tmp_path.iterdir()), config), config


def test_one_view_is_the_network_alone(small):
    torch.manual_seed(0)
    dataset = TextDataset(small, "val", train=False)
    model = DBNet(small)
    batch, prob_maps = infer(Ensemble.of(model, small, CPU), dataset)
    with torch.inference_mode():
        expected = (model(torch.as_tensor(batch["image"])) * 255).round().to(torch.uint8)
    assert np.array_equal(prob_maps, expected.numpy())


def test_the_map_of_a_mirror_image_is_mirrored_back_exactly(pictures):
    dataset, config = pictures
    model = Brightness()
    batch, prob_maps = infer(Ensemble([View(model, 96, flip=True)], config, CPU), dataset)
    assert np.array_equal(prob_maps, batch["image"][..., 0])
    for seen, image, (width, _) in zip(model.seen[0].numpy(), batch["image"], batch["size"], strict=True):
        assert np.array_equal(seen[:, :width], image[:, width - 1 :: -1] if width < 64 else image[:, ::-1])
        assert not seen[:, width:].any()  # the padding has stayed where it was


def test_maps_of_flips_and_networks_are_averaged_exactly(pictures):
    """With gains 1, 1 and 0: two thirds of the brightness, rounded once, at the end."""
    dataset, config = pictures
    views = [View(Brightness(), 96), View(Brightness(), 96, flip=True), View(Brightness(0.0), 96)]
    for micro_batch in (8, 1):
        batch, prob_maps = infer(Ensemble(views, config, CPU), dataset, micro_batch)
        assert np.array_equal(prob_maps, np.rint(batch["image"][..., 0] / 1.5))


@pytest.mark.parametrize("side", [64, 160])
def test_maps_of_other_sizes_lie_on_the_first_ones(pictures, side):
    """A gradient stays itself when it is resized, but for its ends, where interpolation has no neighbour."""
    dataset, config = pictures
    batch, prob_maps = infer(Ensemble([View(Brightness(), side)], config, CPU), dataset)
    assert prob_maps.shape == batch["image"].shape[:3]
    for prob_map, image, (width, height) in zip(prob_maps, batch["image"], batch["size"], strict=True):
        difference = np.abs(prob_map.astype(int) - image[..., 0])
        assert difference[2 : height - 2, 2 : width - 2].max() <= 1
        assert difference[:height, :width].max() <= 4
        assert not prob_map[:, width:].any()


def test_each_network_sees_images_of_its_own_size_as_if_it_were_alone(pictures):
    dataset, config = pictures
    models = Brightness(), Brightness()
    infer(Ensemble([View(models[0], 96), View(models[1], 64)], config, CPU), dataset)
    for model, side in zip(models, (96, 64), strict=True):
        alone = ImageDataset(dataset.paths, config.changed(image_size=side))
        assert np.array_equal(model.seen[0].numpy(), np.stack([alone[place]["image"] for place in range(2)]))


def test_resizing_there_and_back_keeps_a_mirror_image_in_its_place():
    maps = torch.rand(2, 64, 64)
    sizes = [(40, 64), (64, 33)]
    assert torch.equal(mirrored(mirrored(maps, sizes), sizes), maps)
    assert torch.equal(fitted(maps, [(64, 64)] * 2, [(64, 64)] * 2, (64, 64)), maps)
    constant = fitted(torch.ones(2, 64, 64), sizes, [(50, 80), (80, 41)], (96, 96))
    assert constant[0, :80, :50].min() == constant[1, :41, :80].min() == 1
    assert constant.sum() == pytest.approx(50 * 80 + 80 * 41)


@pytest.fixture
def checkpoints(small, tmp_path):
    """Of two presets' sizes and shapes; the second has seen no mirror images."""
    torch.manual_seed(0)
    paths = []
    for name, config in (
        ("a.pt", small.changed(thresh=0.5, box_thresh=0.0)),
        ("b.pt", small.changed(image_size=96, pyramid_channels=64, flip_p=0.0)),
    ):
        save_checkpoint(tmp_path / name, config, DBNet(config))
        paths.append(tmp_path / name)
    return paths


def test_checkpoints_of_different_presets_and_sizes_mix(checkpoints, small):
    network = load_network(checkpoints, {"device": "cpu"})
    assert network.sides == (128, 96) and network.config.thresh == 0.5
    dataset = TextDataset(network.config, "val", train=False)
    together = {found.index: found for found in Pipeline(dataset, network.config, "cpu").detect(network)}
    views = [Ensemble([view], network.config, CPU) for view in network.views]
    alone = [{f.index: f for f in Pipeline(dataset, network.config, "cpu").detect(view)} for view in views]
    assert sorted(together) == sorted(alone[0]) == list(range(len(dataset)))
    for index, found in together.items():
        mean = np.mean([maps[index].prob_map for maps in alone], axis=0)
        assert np.abs(found.prob_map - mean).max() <= 1 and found.polygons


def test_tta_looks_at_every_scale_and_mirrors_for_networks_trained_with_flips(checkpoints):
    network = load_network(checkpoints, {"device": "cpu", "tta": True})
    assert [view.flip for view in network.views] == [False, True] * len(TTA_SCALES) + [False] * len(TTA_SCALES)
    assert {view.side for view in network.views[:6]} == {96, 128, 160}
    assert "2 networks" in str(network) and "9 views" in str(network)


def test_out_of_memory_halves_the_batch_of_an_ensemble_and_changes_nothing(checkpoints, capsys):
    network = load_network(checkpoints, {"device": "cpu", "batch_size": 2})
    dataset = TextDataset(network.config, "val", train=False)

    dataset.paths[1] = dataset.paths[0]  # of one shape

    def detect():
        pipeline = Pipeline(dataset, network.config, "cpu")
        pipeline.batch_size = 2  # as on a GPU
        return {found.index: found.prob_map for found in pipeline.detect(network)}

    expected = detect()

    def check(_module, inputs):
        if len(inputs[0]) > 1:
            raise torch.OutOfMemoryError("injected")

    network.views[1].model.register_forward_pre_hook(check)
    found = detect()
    assert "out of memory: batch 2 -> batch 1" in capsys.readouterr().err
    for index, prob_map in found.items():
        assert np.abs(prob_map.astype(int) - expected[index]).max() <= 1


def test_a_broken_image_fails_alone_at_several_sizes(pictures):
    dataset, _ = pictures
    dataset.further_sizes = (64,)
    dataset.paths[0].write_bytes(dataset.paths[0].read_bytes()[:200])
    [batch] = map(dataset.batch, Batches(dataset, 2))
    assert [index for index, _ in batch["failed"]] == [0]
    assert len(batch["image"]) == len(batch["image_64"]) == 1


def test_a_checkpoint_of_several_that_is_missing_is_named(checkpoints, tmp_path):
    with pytest.raises(UserError, match=r"absent\.pt: no such checkpoint"):
        load_network([*checkpoints, tmp_path / "absent.pt"], {})


def test_weights_that_give_no_finite_probabilities_are_an_error_where_they_are_used(small, tmp_path):
    torch.manual_seed(0)
    config = small.changed(weights="none")
    model = DBNet(config)
    model.prob_branch[4].running_mean.fill_(-3e38)  # makes features infinite, and their sums are NaN
    model.prob_branch[4].running_var.fill_(0)
    save_checkpoint(tmp_path / "odd.pt", config, model)
    dataset = TextDataset(config, "val", train=False)
    with pytest.raises(UserError, match=r"odd\.pt: gives no finite probabilities"):
        list(Pipeline(dataset, config, "cpu").detect(load_network([tmp_path / "odd.pt"], {})))
    in_training = Pipeline(dataset, config, "cpu").detect(Ensemble.of(model.eval(), config, CPU))
    assert not any(found.polygons for found in in_training)
