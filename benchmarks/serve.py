"""A detector in a process of its own, for benchmarks/inference.py: the path of an image comes in, times and polygons go
out, a JSON line each.

    python benchmarks/serve.py KIND CORES [FILE]

KIND is, for a checkpoint FILE, auto, float32, plain (float32 through PyTorch's own convolutions) or compiled; for an
exported FILE, onnxruntime or openvino; else v4 (PP-OCRv4 mobile of rapidocr-onnxruntime) or v6 (PP-OCRv6 small of
rapidocr), detection alone with their default settings.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

KIND, CORES, *FILES = sys.argv[1:]
if hasattr(os, "sched_setaffinity"):  # before anything counts the cores
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-int(CORES) :])
os.environ["OMP_NUM_THREADS"] = CORES
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2  # noqa: E402
import numpy as np  # noqa: E402

Detect = Callable[[np.ndarray], Any]


def ours(amp: str = "auto", **changes: Any) -> Detect:
    from dbnet import Detector

    detector = Detector.load(FILES[0], device="cpu", amp=amp, **changes)
    return lambda image: [text.polygon for text in detector.detect(image, bgr=True)]


def plain() -> Detect:
    from dbnet import ensemble

    ensemble.prepare_for_cpu = lambda *_: None
    return ours("off")


def openvino() -> Detect:
    import openvino

    from dbnet.inference import Detector, OnnxNetwork

    network: Any = OnnxNetwork(Path(FILES[0]), {})
    options = {"INFERENCE_NUM_THREADS": CORES, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(FILES[0], "CPU", options)
    network.probabilities = lambda images: compiled(np.ascontiguousarray(images))[0]
    detector = Detector(network)
    return lambda image: [text.polygon for text in detector.detect(image, bgr=True)]


def v4() -> Detect:
    from rapidocr_onnxruntime import RapidOCR

    engine = RapidOCR(intra_op_num_threads=int(CORES), inter_op_num_threads=1)
    return lambda image: engine(image, use_det=True, use_cls=False, use_rec=False)[0] or []


def v6() -> Detect:
    from rapidocr import RapidOCR

    threads = {"intra": int(CORES), "inter": 1}
    engine = RapidOCR(params={f"EngineConfig.onnxruntime.{kind}_op_num_threads": n for kind, n in threads.items()})

    def detect(image: np.ndarray) -> Any:
        boxes = engine(image, use_det=True, use_cls=False, use_rec=False).boxes
        return [] if boxes is None else boxes

    return detect


KINDS: dict[str, Callable[[], Detect]] = {
    "auto": ours,
    "float32": lambda: ours("off"),
    "plain": plain,
    "compiled": lambda: ours(compile=True),
    "onnxruntime": ours,
    "openvino": openvino,
    "v4": v4,
    "v6": v6,
}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the detectors print does not go into an answer
    cv2.setNumThreads(int(CORES))
    detect = KINDS[KIND]()
    for line in sys.stdin:
        start = time.perf_counter()
        image = cv2.imread(line.rstrip("\n"), cv2.IMREAD_COLOR)
        read = time.perf_counter()
        polygons = detect(image)
        end = time.perf_counter()
        rounded = [np.rint(np.asarray(polygon, float)).astype(int).tolist() for polygon in polygons]
        print(json.dumps({"detect": end - read, "all": end - start, "polygons": rounded}), file=answers, flush=True)


if __name__ == "__main__":
    main()
