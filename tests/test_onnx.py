"""Networks in the ONNX format: the same polygons, without PyTorch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED
from support import CPU

import export
from dbnet.checkpoint import load_model, save_checkpoint
from dbnet.config import Config
from dbnet.dataset import TextDataset
from dbnet.ensemble import Ensemble
from dbnet.errors import UserError
from dbnet.formats import read_submission
from dbnet.inference import OnnxNetwork, Pipeline, find_weights, load_network, write_onnx
from dbnet.model import DBNet

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def exported(rendered, tmp_path_factory):
    """A checkpoint, and what `export.py` made of it."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    config = Config.from_preset(
        "lite", data=str(rendered), weights="none", image_size=128, batch_size=2, thresh=0.5, box_thresh=0.0
    )
    save_checkpoint(folder / "best.pt", config, DBNet(config))
    result = run("export.py", "best.pt", "--onnx", "best.onnx", "--box-thresh", "0.1", "--tta", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "test-time augmentation is left out" in result.stdout and "checked: probabilities within" in result.stdout
    return folder


def run(script, *arguments, cwd, without_torch=False):
    """Run a script; with `without_torch`, one that imports PyTorch fails."""
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import runpy; "
    block = "sys.modules['torch'] = sys.modules['torchvision'] = None; " if without_torch else ""
    code = f"{start}{block}runpy.run_path({str(ROOT / script)!r}, run_name='__main__')"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_a_file_takes_batches_of_any_size_and_holds_the_configuration(exported):
    model, config, _ = load_model(exported / "best.pt", {})
    network = OnnxNetwork(exported / "best.onnx", {"min_size": 5.0})
    assert network.config == config.changed(box_thresh=0.1, min_size=5.0)
    for shape in ((1, 32, 32, 3), (3, 64, 160, 3), (2, 50, 75, 3), (1, 7, 97, 3)):
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        height, width = shape[1:3]
        filled_up = np.pad(images, ((0, 0), (0, -height % 32), (0, -width % 32), (0, 0)))
        with torch.inference_mode():
            expected = model(torch.from_numpy(filled_up)).numpy()[:, :height, :width]
        assert np.abs(network.probabilities(images) - expected).max() < 1e-4


def test_a_file_of_half_the_size_computes_what_its_rounded_kernels_say(exported):
    result = run("export.py", "best.pt", "--half", "half.onnx", cwd=exported)
    assert result.returncode == 0, result.stderr
    assert "checked: probabilities within" in result.stdout
    whole, half = exported / "best.onnx", exported / "half.onnx"
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    images = np.random.default_rng(0).integers(0, 256, (1, 64, 96, 3), dtype=np.uint8)
    maps = [OnnxNetwork(path, {}).probabilities(images) for path in (whole, half)]
    assert 0 < np.abs(maps[0] - maps[1]).max() < 0.01


@pytest.mark.parametrize("error", [0.01, np.nan])
def test_a_file_that_computes_something_else_is_not_written(exported, tmp_path, monkeypatch, error):
    model, config, _ = load_model(exported / "best.pt", {})
    right = OnnxNetwork.probabilities
    monkeypatch.setattr(OnnxNetwork, "probabilities", lambda self, images: right(self, images) + np.float32(error))
    earlier, link, device = (tmp_path / f"{name}.onnx" for name in ("earlier", "link", "device"))
    earlier.write_bytes(b"an earlier export")
    link.symlink_to("absent.onnx")
    device.symlink_to("/dev/null")
    for path in (tmp_path / "new.onnx", earlier, link, device):
        with pytest.raises(UserError, match=rf"{path.name}: not written: .* with a difference"):
            export.export_onnx(path, model, config, half=False)
    assert earlier.read_bytes() == b"an earlier export" and link.is_symlink() and device.exists()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_weight_too_large_for_16_bits_is_the_reason_that_is_named(exported, tmp_path):
    model, config, _ = load_model(exported / "best.pt", {})
    with torch.no_grad():
        next(weight for weight in model.parameters() if weight.ndim > 1).view(-1)[0] = 1e5
    with pytest.raises(UserError, match=r"half\.onnx: not written: a weight is too large for 16 bits; use --onnx"):
        export.export_onnx(tmp_path / "half.onnx", model, config, half=True)
    assert not list(tmp_path.iterdir())


def test_a_file_runs_on_the_provider_of_onnx_runtime_that_is_named(exported):
    import onnxruntime

    names = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
    assert OnnxNetwork(exported / "best.onnx", {"device": "cpu"}).session.get_providers() == ["CPUExecutionProvider"]
    with pytest.raises(UserError, match=", ".join(names).lower()):
        OnnxNetwork(exported / "best.onnx", {"device": "openvino:0" if "OpenVINO" not in names else "cuda"})


def test_predict_and_evaluate_run_without_torch(exported, rendered):
    scores = []
    for network, without_torch in (("best.onnx", True), ("best.pt", False)):
        out = ["--box-thresh=0.1", "--data", rendered]
        predicted = run(
            "predict.py", network, "--out", f"{network}.csv", *out, cwd=exported, without_torch=without_torch
        )
        assert predicted.returncode == 0, predicted.stderr
        scored = run("evaluate.py", network, "--json", "a.json", *out, cwd=exported, without_torch=without_torch)
        assert scored.returncode == 0, scored.stderr
        scores.append(json.loads((exported / "a.json").read_text())["hmean"])
    ours, theirs = (read_submission(exported / f"{name}.csv") for name in ("best.onnx", "best.pt"))
    assert list(ours) == list(theirs) and any(ours.values())
    assert scores[0] == pytest.approx(scores[1], abs=0.01)


@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_b3"])
def test_other_backbones_can_be_exported(backbone, tmp_path):
    torch.manual_seed(0)
    config = Config.from_preset("lite", backbone=backbone, weights="none")
    model = DBNet(config).eval()
    write_onnx(tmp_path / "a.onnx", model, config)
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 32, 3), dtype=np.uint8)
    with torch.inference_mode():
        expected = model(torch.from_numpy(images)).numpy()
    assert np.abs(OnnxNetwork(tmp_path / "a.onnx", {}).probabilities(images) - expected).max() < 1e-4


def test_onnx_and_pytorch_find_the_same_polygons_on_real_receipts(receipts, tmp_path):
    try:
        weights = find_weights(Path("lite"))
    except UserError as error:
        pytest.skip(str(error))
    model, config, _ = load_model(weights, {"data": str(receipts), "tta": False})
    write_onnx(tmp_path / "lite.onnx", model, config)
    dataset = TextDataset(config, "val", train=False)
    del dataset.paths[20:]
    found = []
    for network in (Ensemble.of(model, config, CPU), OnnxNetwork(tmp_path / "lite.onnx", {})):
        found.append({each.index: each.polygons for each in Pipeline(dataset, config, "cpu").detect(network)})
    assert sum(map(len, found[0].values())) > 20 * 20
    different = 0
    for index in range(20):
        ours, theirs = ({tuple(polygon.ravel().tolist()) for polygon in each[index]} for each in found)
        assert len(ours) == len(theirs), dataset.paths[index]
        different += len(ours - theirs)
    assert different <= 2  # of about a thousand: a probability at the threshold may round to either side


def test_what_a_file_cannot_do_is_said(exported, tmp_path):
    path = exported / "best.onnx"
    (tmp_path / "a.onnx").write_bytes(path.read_bytes()[:5000])
    for paths, changes, words in (
        ([path], {"tta": True}, "--tta needs the checkpoint"),
        ([path], {"device": "cuda"}, r"--device cuda: .*best\.onnx runs on .*cpu"),
        ([path], {"backbone": "resnet18"}, r"--backbone: cannot change the network of .*"),
        ([path, exported / "best.pt"], {}, "runs alone"),
        ([tmp_path / "absent.onnx"], {}, r"absent\.onnx: no such file"),
        ([tmp_path / "a.onnx"], {}, r"a\.onnx: not an ONNX file, or a damaged one"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            load_network(paths, changes)
        assert "\n" not in str(caught.value)
    result = run("export.py", "best.pt", "--onnx", "best.bin", cwd=exported)
    assert result.returncode == 2 and "ends in .onnx" in result.stderr


def model_of(path, nodes=(), shape=("n", "h", "w", 3), metadata="", **more):
    """Write an ONNX model that gives the first channel of images as its map, after `nodes`."""
    from onnx import TensorProto, helper

    last = helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT)
    mean = helper.make_node("ReduceMean", ["floats"], ["prob_maps"], axes=[len(shape) - 1], keepdims=0)
    graph = helper.make_graph(
        [*nodes, last, mean],
        "graph",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("prob_maps", TensorProto.FLOAT, shape[:-1])],
        **more,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {"dbnet_config": metadata or json.dumps(Config.from_preset("lite").to_dict())})
    path.write_bytes(model.SerializeToString())
    return path


def endless_loop():
    """`while True`, as a node."""
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(name, kind, []) for name, kind in (("i", TensorProto.INT64),)]
    goes_on = helper.make_tensor_value_info("on", TensorProto.BOOL, [])
    still = helper.make_tensor_value_info("still", TensorProto.BOOL, [])
    body = helper.make_graph([helper.make_node("Identity", ["on"], ["still"])], "body", [*ends, goes_on], [still])
    return helper.make_node("Loop", ["", ""], [], body=body)


def test_an_onnx_file_that_is_not_ours_is_rejected_in_one_line(tmp_path):
    from onnx import TensorProto, helper

    far = helper.make_tensor("far", TensorProto.FLOAT, [1], [1.0])
    del far.float_data[:]
    far.data_location = TensorProto.EXTERNAL
    far.external_data.add(key="location", value="/etc/passwd")
    huge = helper.make_node(
        "ConstantOfShape", ["size"], ["huge"], value=helper.make_tensor("v", TensorProto.FLOAT, [1], [0.0])
    )
    tail = [helper.make_node("ReduceSum", ["huge"], ["sum"], keepdims=0)]
    size = helper.make_tensor("size", TensorProto.INT64, [2], [1 << 20, 1 << 18])
    for path, words in (
        (model_of(tmp_path / "loop.onnx", [endless_loop()]), "the operation Loop"),
        (model_of(tmp_path / "far.onnx", initializer=[far]), "data in other files"),
        (model_of(tmp_path / "deep.onnx", metadata="[" * 100_000), "no configuration"),
        (model_of(tmp_path / "rank.onnx", shape=("n", "h", 3)), "other arrays"),
        (model_of(tmp_path / "fixed.onnx", shape=(7, 7, 7, 3)), "fails on an image"),
        (tmp_path / "empty.onnx", "not an ONNX file|no network"),
        (tmp_path / "cut.onnx", "not an ONNX file, or a damaged one"),
        (tmp_path / "text.onnx", "not an ONNX file, or a damaged one"),
    ):
        if path.stem == "empty":
            path.touch()
        elif path.stem == "cut":
            path.write_bytes((tmp_path / "loop.onnx").read_bytes()[:-7])
        elif path.stem == "text":
            path.write_text("no model at all")
        with pytest.raises(UserError, match=words) as caught:
            OnnxNetwork(path, {}).probabilities(np.zeros((1, 32, 32, 3), np.uint8))
        assert "\n" not in str(caught.value) and path.name in str(caught.value)
    path = model_of(tmp_path / "huge.onnx", [huge, *tail], initializer=[size])
    with pytest.raises((UserError, MemoryError)) as caught:
        OnnxNetwork(path, {}).probabilities(np.zeros((1, 32, 32, 3), np.uint8))
        raise UserError("it has been optimized away")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["deep.onnx", "inp.onnx"])
def test_hostile_onnx_files_are_rejected(name):
    path = SHARED / "cases/hostile" / name
    if not path.exists():
        pytest.skip("../shared/cases is not here")
    with pytest.raises(UserError, match=r"export it with export\.py"):
        OnnxNetwork(path, {})


def test_without_torch_each_command_and_the_detector_say_what_to_install(exported):
    for script, words in (
        ("evaluate.py", ["best.pt"]),
        ("predict.py", ["best.pt", "--images", "."]),
        ("export.py", ["best.pt", "--onnx", "other.onnx"]),
    ):
        result = run(script, *words, cwd=exported, without_torch=True)
        assert result.returncode == 2, result.stderr
        [line] = result.stderr.splitlines()
        assert line.startswith("error: ") and "pip install torch torchvision" in line
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules['torch'] = sys.modules['torchvision'] = None; "
    code += "import dbnet\ntry: dbnet.Detector.load()\nexcept dbnet.UserError as error: print(error)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install torch torchvision" in result.stdout, result.stderr


@pytest.mark.parametrize("weights", [{"a": 1}, {}, {"a": torch.zeros(3, 3)}, [1], {1: torch.zeros(2)}])
def test_export_half_of_a_checkpoint_with_odd_weights_is_rejected(exported, tmp_path, weights, monkeypatch):
    content = torch.load(exported / "best.pt", weights_only=True)
    torch.save({**content, "model": weights}, tmp_path / "odd.pt")
    monkeypatch.setattr(sys, "argv", ["export.py", str(tmp_path / "odd.pt"), "--half", str(tmp_path / "half.pt")])
    with pytest.raises(UserError, match=r"odd\.pt"):
        export.main()
    assert not (tmp_path / "half.pt").exists()


def heavy(path):
    """Write a model of a thousand products of constant matrices, which ONNX Runtime computes while it loads."""
    from onnx import TensorProto, helper

    size = helper.make_tensor("size", TensorProto.INT64, [2], [2048, 2048])
    value = helper.make_tensor("v", TensorProto.FLOAT, [1], [1e-4])
    nodes = [helper.make_node("ConstantOfShape", ["size"], ["x0"], value=value)]
    nodes += [helper.make_node("MatMul", [f"x{number}", "x0"], [f"x{number + 1}"]) for number in range(1000)]
    return model_of(path, [*nodes, helper.make_node("ReduceSum", ["x1000"], ["sum"], keepdims=0)], initializer=[size])


def test_an_onnx_file_of_endless_work_is_rejected_in_time(tmp_path):
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from dbnet import inference
from dbnet.errors import run_script
inference._SLOWEST = 1
run_script(lambda: inference.OnnxNetwork(inference.Path({str(heavy(tmp_path / "heavy.onnx"))!r}), {{}}))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and "heavy.onnx: takes more than 1 s; export it with export.py" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_onnx_file_that_gives_no_probabilities_is_rejected(tmp_path):
    bright, dark = np.full((1, 32, 32, 3), 200, np.uint8), np.zeros((1, 32, 32, 3), np.uint8)
    network = OnnxNetwork(model_of(tmp_path / "mean.onnx"), {})
    with pytest.raises(UserError, match=r"mean\.onnx: gives values that are no probabilities"):
        network.probabilities(bright)
    assert network.probabilities(dark).max() == 0
