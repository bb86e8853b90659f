"""Network, losses and checkpoints."""

import os
import pickle
import re
import shutil
from functools import partial
from threading import Lock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dbnet.checkpoint import load_checkpoint, load_model, load_weights, save_checkpoint, start_from, write_half
from dbnet.config import PRESETS
from dbnet.dataset import Batches, TextDataset, make_loader
from dbnet.ensemble import Ensemble
from dbnet.errors import UserError
from dbnet.evaluation import evaluate
from dbnet.inference import Pipeline
from dbnet.loss import balanced_cross_entropy, db_loss, hardest
from dbnet.model import DBNet, Maps


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("page", ["empty", "full of text", "all don't care"])
@pytest.mark.parametrize("push", [-1, 1])
def test_a_network_pushed_to_its_limits_has_finite_losses_and_gradients(small, dtype, page, push):
    """Logits as far out as fp16 goes, through the whole network in mixed precision."""
    torch.manual_seed(0)
    model = DBNet(small).train()
    for branch in (model.prob_branch, model.thresh_branch):
        branch[-1].bias.data.fill_(push * 6e4)
    text = torch.full((1, 64, 64), page == "full of text", dtype=torch.uint8)
    mask = torch.full((1, 64, 64), page != "all don't care", dtype=torch.uint8)
    images = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    with torch.autocast("cpu", dtype):
        maps = model(images)
    losses = db_loss(maps, text, text * 255, mask, small)
    losses.total.backward()
    assert maps.prob_logits.dtype == dtype and maps.prob_logits.abs().max() > 5e4
    assert torch.stack(losses).isfinite().all()
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)


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


def old_fusion(path):
    content = torch.load(path, weights_only=True)
    torch.save({**content, "format": 1, "config": content["config"] | {"fusion": "asf"}}, path)


def newer(path):
    torch.save({**torch.load(path, weights_only=True), "format": 99}, path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (pickle_bomb, "not a checkpoint"),
        (torch_bomb, "not a checkpoint"),
        (old_fusion, "fusion asf of an older dbnet.*train it anew"),
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


@pytest.mark.parametrize("trains", [True, False])
def test_only_in_training_on_a_cpu_depthwise_convolutions_are_left_out_of_mixed_precision(small, trains):
    model = DBNet(small).train(trains)
    images, types = torch.zeros(1, 64, 64, 3, dtype=torch.uint8), {}
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(
                lambda conv, _, result: types.setdefault(conv.groups > 1, set()).add(result.dtype)
            )
    with torch.autocast("cpu", torch.bfloat16):
        model(images)
    assert types == {True: {torch.float32 if trains else torch.bfloat16}, False: {torch.bfloat16}}


def test_another_architecture_is_named(checkpoint):
    with pytest.raises(UserError, match=r"mobilenet_v3_large, 96 .*resnet18, 96 .*--fusion"):
        load_model(checkpoint, {"backbone": "resnet18"})


def test_weights_that_are_not_of_the_network_that_the_file_names_are_not_called_another_architecture(checkpoint):
    content = load_checkpoint(checkpoint)
    content["model"].popitem()
    torch.save(content | {"config": content["config"].to_dict()}, checkpoint)
    with pytest.raises(UserError, match=r"its weights are not those of mobilenet_v3_large.*take another checkpoint"):
        load_model(checkpoint, {})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, r"344 of 344 tensors taken$"),
        ({"fusion": "asf"}, r"344 of 353 tensors taken; left as they were: pyramid.attention$"),
        (
            {"backbone": "resnet18"},
            r"32 of 156 tensors taken; left as they were: backbone, pyramid.lateral$",
        ),
        ({"pyramid_channels": 64}, r"308 of 344 .* were: prob_branch, pyramid.lateral, pyramid.smooth, thresh_branch$"),
    ],
)
def test_init_takes_what_fits_and_says_what_not(checkpoint, small, changes, words, capsys):
    content = load_checkpoint(checkpoint)
    model = DBNet(small.changed(**changes))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start_from(model, content, checkpoint)
    line = capsys.readouterr().out.strip()
    assert re.search(words, line) and "\n" not in line
    theirs = content["model"]
    taken = [name for name, tensor in model.state_dict().items() if name in theirs and tensor.equal(theirs[name])]
    assert len(taken) >= int(line.split()[1])
    parts = re.search("were: ([^;]*)", line)[1].split(", ") if "were:" in line else []
    for name, tensor in model.state_dict().items():
        left = name.startswith(tuple(parts)) if parts else False
        assert tensor.equal(before[name] if left else theirs[name])


def test_init_leaves_out_what_has_no_shape(checkpoint, small, capsys):
    content = load_checkpoint(checkpoint)
    ragged = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(3, 3)], layout=torch.strided)
    content["model"] |= {"prob_branch.0.weight": ragged, "thresh_branch.0.weight": "text"}
    start_from(DBNet(small), content, checkpoint)
    assert "342 of 344 tensors taken; left as they were: prob_branch, thresh_branch" in capsys.readouterr().out


def test_init_takes_no_part_of_a_deeper_backbone(small, tmp_path, capsys):
    """All tensors of a ResNet-18 have namesakes of their shape in a ResNet-34, which compute something else there."""
    deeper, ours = (small.changed(backbone=name) for name in ("resnet34", "resnet18"))
    save_checkpoint(tmp_path / "deeper.pt", deeper, DBNet(deeper))
    model = DBNet(ours)
    before = model.backbone.stages[0][0].weight.clone()
    start_from(model, load_checkpoint(tmp_path / "deeper.pt"), tmp_path / "deeper.pt")
    assert "left as they were: backbone\n" in capsys.readouterr().out
    assert model.backbone.stages[0][0].weight.equal(before)


def test_init_from_what_does_not_fit_at_all_is_refused(checkpoint, small):
    model = DBNet(small.changed(backbone="resnet18", pyramid_channels=64))
    content = load_checkpoint(checkpoint)
    for weights in (content["model"], {}, {3: torch.zeros(1)}, [1], {"backbone": "mobilenet"}):
        with pytest.raises(UserError, match=r"best.pt: .*leave out --init"):
            start_from(model, {**content, "model": weights}, checkpoint)


@pytest.mark.parametrize("harm", [lambda x: x * float("nan"), lambda x: x > 0, lambda x: x * 1j, lambda x: x.char()])
def test_weights_that_are_not_finite_real_numbers_are_rejected(checkpoint, small, harm):
    content = load_checkpoint(checkpoint)
    name, tensor = next(iter(content["model"].items()))
    content["model"][name] = harm(tensor)
    for load in (start_from, partial(load_weights, config=small)):
        with pytest.raises(UserError, match=r"best.pt: its weights are not finite"):
            load(DBNet(small), content, path=checkpoint)


@pytest.mark.parametrize(
    ("field", "value"), [("pyramid_channels", 400_000_000), ("workers", 10**9), ("image_size", 10**9)]
)
def test_a_checkpoint_that_asks_for_more_than_any_machine_has_is_rejected(checkpoint, field, value):
    content = torch.load(checkpoint, weights_only=True)
    content["config"][field] = value
    torch.save(content, checkpoint)
    with pytest.raises(UserError, match=f"best.pt: its configuration.*{field.replace('_', '-')}"):
        load_checkpoint(checkpoint)


def test_weights_without_content_are_not_taken(checkpoint, small):
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "model": {name: each.to("meta") for name, each in content["model"].items()}}, checkpoint)
    with pytest.raises(UserError, match=r"best\.pt"):
        start_from(DBNet(small), load_checkpoint(checkpoint), checkpoint)


def test_removed_fields_are_dropped_and_unknown_ones_rejected(checkpoint, small):
    content = torch.load(checkpoint, weights_only=True)
    old = {**content["config"], "clahe_clip": 2.0, "sync_batch_norm": True, "shadow_p": 0.1}
    torch.save({**content, "config": old}, checkpoint)
    assert load_checkpoint(checkpoint)["config"] == small
    torch.save({**content, "config": {**old, "of_the_future": 1}}, checkpoint)
    with pytest.raises(UserError, match="of_the_future"):
        load_checkpoint(checkpoint)


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


def test_polygons_made_in_other_processes_are_the_same(small):
    """What a GPU has run beside it; here beside a CPU."""
    torch.manual_seed(0)
    config = small.changed(batch_size=1, box_thresh=0.0, thresh=0.5)  # an untrained network finds something everywhere
    dataset = TextDataset(config, "val", train=False)
    model = DBNet(config)
    network = Ensemble.of(model, config, torch.device("cpu"))
    here, beside = (Pipeline(dataset, config, network.device) for _ in range(2))
    beside.on_gpu = True
    beside.loader = make_loader(Batches(dataset, 1), workers=1, pin_memory=False)
    beside.extractors = Pipeline(dataset, config, "cuda").extractors
    ours, theirs = ({found.index: found for found in pipeline.detect(network)} for pipeline in (here, beside))
    assert sorted(ours) == sorted(theirs) == list(range(len(dataset)))
    assert any(found.polygons for found in ours.values())
    for index, found in ours.items():
        assert found.scores == theirs[index].scores
        for polygon, other in zip(found.polygons, theirs[index].polygons, strict=True):
            assert np.array_equal(polygon, other)
    assert evaluate(here, network).images.keys() == {path.name for path in dataset.paths}


def test_polygons_are_made_by_processes_that_are_spawned_on_every_system(small):
    """A fork would inherit the GPU, and locks that threads hold."""
    pipeline = Pipeline(TextDataset(small, "val", train=False), small.changed(workers=2), "cuda:0")
    assert pipeline.extractors._mp_context.get_start_method() == "spawn"


class Crowded:
    """A network that has no room for two images at once, and says so to all that come while it works."""

    def __init__(self, network):
        self.network, self.room, self.threads, self.failures = network, Lock(), 3, 0
        self.config, self.device, self.sides = network.config, network.device, network.sides
        self.begin_thread = network.begin_thread

    def infer(self, *batch):
        if not self.room.acquire(blocking=False):
            self.failures += 1
            raise MemoryError
        try:
            return self.network.infer(*batch)
        finally:
            self.room.release()


def test_threads_of_a_cpu_find_what_one_finds_and_images_without_room_are_tried_alone(small):
    torch.manual_seed(0)
    config = small.changed(box_thresh=0.0, thresh=0.5)
    dataset = TextDataset(config, "val", train=False)
    network = Ensemble.of(DBNet(config), config, torch.device("cpu"))
    network.threads = 1
    alone = list(Pipeline(dataset, config, "cpu").detect(network))
    network.threads = 3
    for several in (network, Crowded(network)):
        found = list(Pipeline(dataset, config, "cpu").detect(several))
        assert [each.index for each in found] == list(range(len(dataset)))
        for ours, theirs in zip(found, alone, strict=True):
            assert np.array_equal(ours.prob_map, theirs.prob_map) and ours.scores == theirs.scores


def test_a_compiled_network_is_frozen_and_kept_in_the_users_cache_folder(small, tmp_path, monkeypatch):
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    asked = {}
    monkeypatch.setattr(DBNet, "compile", lambda _, **how: asked.update(how))  # compiling takes a minute
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    save_checkpoint(tmp_path / "best.pt", small, DBNet(small))
    network = Ensemble.load([tmp_path / "best.pt"], {"compile": True, "device": "cpu"})
    assert asked == {"dynamic": True, "options": {"freezing": True}} and network.threads == 1
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "dbnet" / "inductor")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")


def test_a_checkpoint_of_half_the_size_computes_nearly_the_same(small, tmp_path):
    torch.manual_seed(0)
    model = DBNet(small)
    save_checkpoint(tmp_path / "last.pt", small, model, optimizer={"state": torch.zeros(100_000)})
    write_half(tmp_path / "last.pt", tmp_path / "half.pt", {"box_thresh": 0.4})
    halved, config, content = load_model(tmp_path / "half.pt", {})
    whole, _, _ = load_model(tmp_path / "last.pt", {})
    assert config == small.changed(box_thresh=0.4)
    assert content.keys() == {"made_by", "format", "config", "model"}
    assert content["model"]["pyramid.smooth.0.weight"].dtype == torch.float16
    assert content["model"]["prob_branch.1.running_var"].dtype == torch.float32
    assert (tmp_path / "half.pt").stat().st_size < 0.55 * (tmp_path / "last.pt").stat().st_size
    images = torch.randint(0, 256, (1, 96, 64, 3), dtype=torch.uint8)
    torch.testing.assert_close(halved(images), whole(images), atol=5e-3, rtol=0)

    with torch.no_grad():
        model.pyramid.smooth[0].weight[0] = 1e6
    save_checkpoint(tmp_path / "huge.pt", small, model)
    with pytest.raises(UserError, match="too large for 16 bits"):
        write_half(tmp_path / "huge.pt", tmp_path / "no.pt", {})
    assert not (tmp_path / "no.pt").exists()


@pytest.mark.parametrize("harm", [lambda x: -1 - x, lambda x: x.to_sparse()])
def test_variances_that_are_negative_or_sparse_are_rejected(checkpoint, small, harm):
    content = load_checkpoint(checkpoint)
    name = next(name for name in content["model"] if name.endswith("running_var"))
    content["model"][name] = harm(content["model"][name])
    with pytest.raises(UserError, match=r"best.pt: its weights are not finite"):
        start_from(DBNet(small), content, checkpoint)
