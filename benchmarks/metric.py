"""CLEval on one core: one image, and how the cost grows with the number of words.

    python benchmarks/metric.py

The Korean receipts are those of `../shared/cases`, where they are at hand; pages of words are made here.
"""

import json
from functools import partial

import cv2
import numpy as np
from measure import SHARED, parse_arguments, print_table, print_versions, time_and_ratio, use_one_core

from dbnet.metric import score_image

REACH = 0.12  # multiples of the yardstick; the competition's scorer takes 5.1


def main() -> None:
    parse_arguments(__doc__)
    use_one_core()
    print_versions()
    rows = []
    cases = SHARED / "cases" / "cleval.json"
    if cases.exists():
        korean = [case for case in json.loads(cases.read_text()) if case["name"].startswith("kr_doc")]
        case = min(korean, key=lambda case: abs(len(case["gt"]) - 104))
        gt, det = ([np.reshape(flat, (-1, 2)) for flat in case[key]] for key in ("gt", "det"))
        took = time_and_ratio(lambda: score_image(gt, det, case.get("dont_care")))
        rows.append((f"Korean receipt {case['name']}, {len(gt)} words, {len(det)} detections", *took, REACH))
    for words, detections in ((100, 100), (200, 200), (300, 500)):
        gt, det = make_page(words), make_page(detections, seed=1)
        rows.append(
            (f"page, {words} words, {detections} rectangles", *time_and_ratio(partial(score_image, gt, det)), "")
        )
    gt, det = make_page(100), [round_off(polygon) for polygon in make_page(100, seed=1)]
    took = time_and_ratio(lambda: score_image(gt, det))
    rows.append((f"page, 100 words, 100 polygons of {np.mean([len(p) for p in det]):.0f} points", *took, ""))
    print_table("CLEval of one image", ("what", "ms", "x yardstick", "reach"), rows)


def make_page(words: int, seed: int = 0) -> list[np.ndarray]:
    """Slightly turned words in rows of five, moved a little by the seed."""
    rng = np.random.default_rng(seed)
    page = []
    for i in range(words):
        x, y = (100 + 200 * (i % 5), 20 + 30 * (i // 5)) + rng.uniform(-3, 3, 2)  # noqa: RUF005
        page.append(np.rint(cv2.boxPoints(((x, y), (rng.uniform(60, 170), rng.uniform(16, 24)), rng.uniform(-2, 2)))))
    return page


def round_off(polygon: np.ndarray) -> np.ndarray:
    """A polygon as post-processing gives it in polygon mode, with round corners and whole pixels."""
    mask = np.zeros((4000, 1100), np.uint8)
    cv2.fillPoly(mask, [polygon.astype(np.int32)], 1)
    mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (13, 13)))
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return max(contours, key=len)[:, 0]


if __name__ == "__main__":
    main()
