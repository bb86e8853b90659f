"""docs/service.md: its files are taken from the page and run."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from dbnet import Detector
from dbnet.config import Config
from dbnet.inference import write_onnx
from dbnet.model import DBNet, fold

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/service.md").read_text(encoding="utf-8")
SECONDS = 120


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def folder(tmp_path):
    """The folder of the container: service.py and an untrained lite.onnx."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    torch.manual_seed(0)
    config = Config.from_preset("lite", weights="none", image_size=128, thresh=0.5, box_thresh=0.0)
    model = DBNet(config).eval()
    fold(model)
    write_onnx(tmp_path / "lite.onnx", model, config)
    (tmp_path / "service.py").write_text(blocks("python")[0], encoding="utf-8")
    return tmp_path


def test_the_service_answers_as_the_detector_does(folder, rendered):
    if not (find_spec("fastapi") and find_spec("uvicorn")):
        pytest.skip("the service needs fastapi and uvicorn: pip install fastapi uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "service:app", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DBNET_NETWORK": "lite.onnx"}
    server = subprocess.Popen(command, cwd=folder, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=SECONDS)
                break
            except urllib.error.URLError:
                assert server.poll() is None and time.monotonic() < end
                time.sleep(0.2)
        images = sorted((rendered / "images").glob("*/*"))[:4] * 2

        def ask(image):
            request = urllib.request.Request(f"{url}/detect?box_thresh=0.1", image.read_bytes(), method="POST")
            return json.load(urllib.request.urlopen(request, timeout=SECONDS))["texts"]

        detector = Detector.load(folder / "lite.onnx")
        expected = [[text.to_dict() for text in detector.detect(image, box_thresh=0.1)] for image in images]
        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(ask, images)) == expected and any(expected)
        for query, body in (("", b"no image"), ("?box_thresh=2", images[0].read_bytes())):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(f"{url}/detect{query}", body, timeout=SECONDS)
            assert caught.value.code == 400 and "\n" not in json.load(caught.value)["detail"]
    finally:
        server.terminate()
        server.wait(SECONDS)


def test_the_container_has_all_that_detection_imports(folder, rendered):
    """The Dockerfile's steps by hand: what it copies is enough, without a package that it does not install."""
    [dockerfile] = blocks("dockerfile")
    place = folder / "home"
    shutil.copytree(ROOT / "dbnet", place / "dbnet", ignore=shutil.ignore_patterns("__pycache__"))
    for name in re.search(r"COPY (service.+) \./", dockerfile)[1].split():
        shutil.copy(folder / name, place)
    assert dockerfile.index("USER dbnet") < dockerfile.index("CMD")
    absent = ("torch", "torchvision", "scipy", "matplotlib")  # of requirements.txt, but not of requirements-onnx.txt
    listed = (ROOT / "requirements-onnx.txt").read_text(encoding="utf-8")
    assert not any(name in listed.splitlines() for name in absent)
    image = next((rendered / "images/test").iterdir())
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
        f"import dbnet\nprint(len(dbnet.Detector.load('lite.onnx').detect({str(image)!r})))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True)
    assert result.returncode == 0 and int(result.stdout) >= 0, result.stderr


def test_the_loop_over_many_images_runs_as_written(folder, rendered, monkeypatch, capsys):
    pytest.importorskip("pypdfium2")
    from PIL import Image

    monkeypatch.chdir(folder)
    first, *_ = sorted((rendered / "images").glob("*/*"))
    shutil.copy(first, "receipt.jpg")
    Image.open(first).convert("RGB").save("scan.pdf", save_all=True)
    exec(blocks("python")[1], {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in lines] == ["scan.pdf#page=1", "receipt.jpg"]
