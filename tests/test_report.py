"""The report: its data on hand-made cases, its size, hostile names, and the page itself in a real browser."""

import base64
import json
import os
import re
import shutil
from html.parser import HTMLParser
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from dbnet import evaluation
from dbnet.annotations import Annotation
from dbnet.evaluation import SIZE_EDGES, Comparison, Evaluation
from dbnet.report import MAP_BYTES, PICTURE_BYTES, encode_map, encode_picture, picture_of, write_report
from dbnet.splits import read_split
from dbnet.synth.scene import write_dataset

SCORES = {"precision": 0.9, "recall": 0.9, "hmean": 0.9}  # of an image, from an earlier evaluation
HOSTILE = [
    "<img src=x onerror=window.hacked=1>.jpg",
    "<!--<script>.jpg",
    "'\"><svg onload=window.hacked=1>&lt;&amp;.jpg",
    "new\nline \u2028 한글 영수증 #?%41&image=b.jpg",
    "__proto__",
    os.fsdecode(b"bytes \xff that are no text.jpg"),
]


def box(x, y, width, height):
    return np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]], np.float64)


class Page(HTMLParser):
    """Reads a page as a browser does: what is in its elements with an id, and how many scripts it would run."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.programs, self._id = {}, 0, None
        self.feed(path.read_text(encoding="utf-8"))
        self.data = json.loads(self.elements["data"])

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self._id = attributes.get("id")
        self.programs += tag == "script" and "type" not in attributes

    def handle_data(self, text):
        self.elements.setdefault(self._id, text)


def report_of(folder, images, title="a checkpoint on val", earlier=None):
    """The page of images given as name -> (pixels or None, annotation, detections, scores, probability map)."""
    evaluation = Evaluation()
    for name, (pixels, annotation, polygons, *more) in images.items():
        path = folder / name
        if pixels is not None:
            Image.fromarray(pixels).save(path, "JPEG")
        picture = picture_of(path, annotation, polygons, *more)
        evaluation.update(name, annotation, polygons, (picture.width, picture.height), picture=picture)
    comparison = Comparison(folder / "earlier.json", earlier, evaluation) if earlier else None
    page = folder / "report.html"
    write_report(page, evaluation, title, {"thresh": 0.3}, comparison, "auto")
    return page


def white(width, height):
    return np.full((height, width, 3), 255, np.uint8)


# ------------------------------------------------------------------------------------------------------------ data


def test_rows_say_what_became_of_each_polygon(tmp_path):
    word, far, ignored = box(0, 0, 40, 10), box(150, 300, 40, 10), box(100, 0, 40, 10)
    annotation = Annotation([word, far, ignored], [False, False, True])
    detections = [box(0, 0, 22, 10), box(20, 350, 60, 30), ignored]
    prob_map = np.zeros((40, 20), np.uint8)
    page = Page(report_of(tmp_path, {"a.jpg": (white(200, 400), annotation, detections, [0.75, 0.5, 1], prob_map)}))
    [image] = page.data["images"]
    assert (image["width"], image["height"], image["error"]) == (200, 400, None)
    assert [word[:3] for word in image["gt"]] == [["correct", 2, 4], ["missed", 0, 4], ["dont_care", 0, 0]]
    assert [found[:2] for found in image["det"]] == [["correct", 0.75], ["false", 0.5], ["dont_care", 1]]
    assert image["gt"][1][-1] == [150, 300, 190, 300, 190, 310, 150, 310]
    assert image["recall"] == page.data["totals"]["recall"] == 2 / 8
    assert page.data["settings"] == {"thresh": "0.3"}
    jpeg, prob_map = (Image.open(BytesIO(base64.b64decode(page.elements[key]))) for key in ("jpeg-0", "prob_map-0"))
    assert (jpeg.format, jpeg.size, prob_map.format, prob_map.size) == ("JPEG", (200, 400), "PNG", (20, 40))


def test_recall_by_size_adds_up_to_the_whole(tmp_path):
    heights = [2, 5, 7, 12, 17, 22, 60, 400]
    words = [box(10, 100 * i, 50, height) for i, height in enumerate(heights)] + [box(500, 0, 60, 12)]
    annotation = Annotation(words, [False] * 8 + [True])
    page = Page(report_of(tmp_path, {"a.jpg": (white(600, 1000), annotation, words[4:8])}))
    sizes = page.data["sizes"]
    assert [(size["from"], size["to"]) for size in sizes] == list(pairwise(SIZE_EDGES))
    assert [size["words"] for size in sizes] == [1, 2, 1, 1, 1, 2, 0, 0]
    assert sum(size["words"] for size in sizes) == 8 and sum(size["missed"] for size in sizes) == 4
    assert sum(size["chars_gt"] for size in sizes) == page.data["totals"]["chars_gt"]
    assert sum(size["chars_tp"] for size in sizes) == page.data["totals"]["chars_tp"]


def test_an_image_that_cannot_be_read_is_shown_by_its_polygons(tmp_path):
    annotation = Annotation([box(10, 20, 300, 50)], [False])
    page = Page(report_of(tmp_path, {"gone.jpg": (None, annotation, [box(0, 0, 5, 1e7)])}))
    [image] = page.data["images"]
    assert "gone.jpg: cannot be read" in image["error"]
    assert (image["width"], image["height"]) == (310, 100_000)
    assert "jpeg-0" not in page.elements


def test_the_page_needs_nothing_from_outside(tmp_path):
    page = report_of(tmp_path, {"a.jpg": (white(9, 9), Annotation(), [])}).read_text()
    assert "default-src 'none'" in page
    assert not any(word in page.replace("http://www.w3.org/2000/svg", "") for word in ("http:", "https:", "@import"))


def test_names_cannot_break_out_of_the_data(tmp_path):
    images = {name: (white(20, 20), Annotation([box(1, 1, 9, 5)], [False]), []) for name in HOSTILE}
    title = "</script><script>window.hacked=1</script>"
    page = Page(report_of(tmp_path, images, title, {HOSTILE[0]: SCORES}))
    assert page.programs == 1
    assert page.data["title"] == title
    assert [image["name"] for image in page.data["images"]] == HOSTILE


# ------------------------------------------------------------------------------------------------------------ size


def test_pictures_and_maps_stay_in_their_budget():
    noise = np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), np.uint8)
    jpeg = encode_picture(noise)
    assert len(jpeg) <= PICTURE_BYTES
    assert Image.open(BytesIO(jpeg)).size[0] >= 320
    assert len(encode_map(noise[..., 0])) <= MAP_BYTES
    small = encode_picture(noise[:30, :40])
    assert Image.open(BytesIO(small)).size == (40, 30)


def test_map_is_clear_where_there_is_no_text_and_keeps_its_levels():
    prob_map = np.zeros((64, 32), np.uint8)
    prob_map[:32] = np.linspace(0, 255, 32)
    pixels = np.array(Image.open(BytesIO(encode_map(prob_map))).convert("RGBA"))
    assert (pixels[32:, :, 3] == 0).all()
    assert (np.diff(pixels[0, :, 3].astype(int)) >= 0).all() and pixels[0, -1, 3] > 200
    assert len(np.unique(pixels[0], axis=0)) == 16


def test_real_receipts_stay_under_150_kilobytes_each(receipts, tmp_path):
    files, annotations, _ = read_split(receipts, "val")
    images = {}
    for path, annotation in list(zip(files.values(), annotations.values(), strict=True))[:8]:
        shutil.copy(path, tmp_path / path.name)
        images[path.name] = (None, annotation, annotation.polygons, [1.0] * len(annotation.polygons))
    page = report_of(tmp_path, images)
    assert page.stat().st_size / 8 < 150_000
    assert Image.open(BytesIO(base64.b64decode(Page(page).elements["jpeg-0"]))).height == 1024


# --------------------------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium of this module, with a fresh profile."""
    pytest.importorskip("selenium", reason="selenium is not installed")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("Chromium is not installed (Debian: apt install chromium chromium-driver)")
    from docs.make_screenshots import start_browser

    browser = start_browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.quit()


@pytest.fixture
def opened(browser):
    """Open a page, and see to it that nothing was amiss on it when the test is over."""
    from docs.make_screenshots import wait_for_pictures

    def open_page(path, fragment=""):
        browser.get("about:blank")
        browser.get(path.resolve().as_uri() + fragment)
        wait_for_pictures(browser)
        return browser

    yield open_page
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.hacked === undefined")


def find(browser, selector):
    """The visible text of all elements that match."""
    return [element.text for element in browser.find_elements("css selector", selector) if element.is_displayed()]


def click(browser, selector):
    browser.find_element("css selector", selector).click()


def press(browser, keys):
    browser.switch_to.active_element.send_keys(keys)


def spoiled(annotation, mistakes):
    """Detections with so many words missed, so many false, two words as one and one in two."""
    first, second, third, *others = [polygon for polygon in annotation.polygons if len(polygon) == 4]
    both = np.concatenate([first, second])
    merged = box(*both.min(axis=0), *np.ptp(both, axis=0))
    left, right = third.copy(), third.copy()
    left[1:3] = right[[0, 3]] = third.mean(axis=0) * (1, 0) + third[[0, 3]] * (0, 1)
    return [merged, left, right, *others[mistakes:], *(box(2, 2 + 5 * i, 30, 4) for i in range(mistakes))]


@pytest.fixture(scope="module")
def rendered_report(tmp_path_factory):
    """The page of five rendered receipts, compared with scores of 0.9, and the scores by name."""
    folder = tmp_path_factory.mktemp("report")
    write_dataset(folder / "data", train=1, val=5, test=1, size=480, seed=5, workers=1)
    files, annotations, _ = read_split(folder / "data", "val")
    images = {}
    for index, (path, annotation) in enumerate(zip(files.values(), annotations.values(), strict=True)):
        detections = spoiled(annotation, 2 * index)
        prob_map = np.zeros((480, 320), np.uint8)
        prob_map[100:200] = 200
        shutil.copy(path, folder / path.name)
        images[path.name] = (None, annotation, detections, [0.5] * len(detections), prob_map)
    page = report_of(folder, images, earlier=dict.fromkeys(images, SCORES))
    return page, {image["name"]: image for image in Page(page).data["images"]}


@pytest.fixture
def screen(browser):
    """Open a page at a width in pixels and in a colour scheme."""

    def open_page(page, width, fragment="", scheme="light"):
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get("about:blank")
        browser.get(page.as_uri() + fragment)
        return browser

    yield open_page
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert browser.get_log("browser") == []


BEYOND = """
    const within = element => element.closest("#table, #stage, .card > svg");
    const wide = [...document.querySelectorAll("body *")].filter(element => !within(element)
        && element.checkVisibility() && element.getBoundingClientRect().right > innerWidth + 1);
    return [document.documentElement.scrollWidth - innerWidth, wide.map(element => element.outerHTML.slice(0, 80))];
"""
CONTRASTS = """
    const channels = color => color.match(/[\\d.]+/g).map(Number);
    const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    const luminance = ([r, g, b]) => [r, g, b].map(v => linear(v / 255))
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
    const behind = element => {
        for (let each = element; each; each = each.parentElement) {
            const color = channels(getComputedStyle(each).backgroundColor);
            if (color.length === 3 || color[3] === 1) return color;
        }
        return [255, 255, 255];
    };
    return [...document.querySelectorAll("body *")].filter(element => element.checkVisibility() && !element.disabled
        && [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())).map(element => {
        let opacity = 1;
        for (let each = element; each; each = each.parentElement) opacity *= getComputedStyle(each).opacity;
        const back = behind(element);
        const text = channels(getComputedStyle(element).color).map((v, i) => opacity * v + (1 - opacity) * back[i]);
        const [low, high] = [luminance(text), luminance(back)].sort((a, b) => a - b);
        return [(high + .05) / (low + .05), element.outerHTML.slice(0, 80)];
    });
"""


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_a_telephone_and_a_desk(screen, rendered_report, width):
    page, images = rendered_report
    browser = screen(page, width)
    assert browser.execute_script(BEYOND) == [0, []]
    if width == 390:
        assert browser.find_element("id", "filters").size["height"] < 70 and not find(browser, "#search")
        click(browser, "#show-filters")
        assert browser.execute_script(BEYOND) == [0, []]
        click(browser, "#with-missed")
        assert find(browser, "#count") == ["4 of 5 images"]
    click(browser, "#show-table")
    assert browser.execute_script(BEYOND) == [0, []]
    browser = screen(page, width, f"#image={next(iter(images))}")
    assert browser.execute_script(BEYOND) == [0, []]
    place = browser.find_element("id", "place")
    assert place.text == "5 of 5" and place.rect["x"] + place.rect["width"] <= width
    assert browser.find_element("id", "stage").size["height"] > 300


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_a_contrast_of_at_least_4_5(screen, rendered_report, scheme):
    page, images = rendered_report
    browser = screen(page, 1280, scheme=scheme)
    found = browser.execute_script(CONTRASTS)
    click(browser, "#show-table")
    assert len(find(browser, "td.zero")) > 0
    found += browser.execute_script(CONTRASTS)
    found += screen(page, 1280, f"#image={list(images)[3]}", scheme).execute_script(CONTRASTS)
    assert len(found) > 100 and [text for contrast, text in found if contrast < 4.5] == []


def test_the_page_speaks_korean_and_explains_its_units(screen, rendered_report):
    page, images = rendered_report
    english = screen(page, 1280)
    assert {"words found in pieces", "detections of several words"} <= set(find(english, "#totals small"))
    assert any("longer side of its image" in note for note in find(english, ".note"))
    korean = page.with_name("korean.html")
    korean.write_text(page.read_text().replace('"language":"auto"', '"language":"ko"'))
    for fragment in ("", f"#image={list(images)[3]}"):
        browser = screen(korean, 1280, fragment)
        assert browser.execute_script("return document.documentElement.lang") == "ko"
        script = "return document.body.innerText + [...document.querySelectorAll('[aria-label]')].map(e => e.ariaLabel)"
        text = browser.execute_script(script)
        for name in (*images, "a checkpoint on val", "thresh", str(page.with_name("earlier.json")), "H-Mean", "Esc"):
            text = text.replace(name, "")
        assert re.findall(r"[A-Za-z]{3,}", text) == []


def test_every_text_of_the_page_is_translated():
    page = Path(evaluation.__file__).with_name("report.html").read_text()
    translated = page[page.index("const KOREAN") : page.index("const language")]
    korean = set(re.findall(r'"([^"]+)":', translated))
    assert set(re.findall(r'\bt\("([^"]*)"', page)) - korean == {"95%: {0} – {1}"}


def test_gallery_is_worst_first_and_the_table_sorts(opened, rendered_report):
    page, images = rendered_report
    browser = opened(page)
    worst_first = sorted(images, key=lambda name: images[name]["hmean"])
    assert find(browser, ".card .name") == worst_first
    assert f"{np.mean([image['hmean'] for image in images.values()]):.4f}" in find(browser, "#totals strong")

    click(browser, "#show-table")
    assert find(browser, "#gallery") == [] and find(browser, "#table td a") == worst_first
    for key, column in (("words", "words"), ("precision", "precision"), ("splits", "splits")):
        click(browser, f"[data-key={key}] button")
        values = [images[name][column] for name in find(browser, "#table td a")]
        assert values == sorted(values)
        click(browser, f"[data-key={key}] button")
        values = [images[name][column] for name in find(browser, "#table td a")]
        assert values == sorted(values, reverse=True)
        assert browser.find_element("css selector", f"[data-key={key}]").get_attribute("aria-sort") == "descending"


def test_filters_leave_what_they_say(opened, rendered_report):
    page, images = rendered_report
    browser = opened(page)
    faultless = next(iter(images))
    click(browser, "#with-missed")
    assert set(find(browser, ".card .name")) == set(images) - {faultless}
    assert find(browser, "#count") == ["4 of 5 images"]
    click(browser, "#filters [type=reset]")
    browser.find_element("id", "low").clear()
    browser.find_element("id", "low").send_keys("0.85")
    assert set(find(browser, ".card .name")) == {name for name in images if images[name]["hmean"] >= 0.85}
    click(browser, "#filters [type=reset]")
    browser.find_element("id", "change").send_keys("worse")
    assert set(find(browser, ".card .name")) == {name for name in images if images[name]["hmean"] < 0.9}
    click(browser, "#filters [type=reset]")
    browser.find_element("id", "search").send_keys("no such name")
    assert find(browser, ".card") == [] and find(browser, ".nothing") == ["No image passes the filters."]
    browser.find_element("id", "search").clear()
    browser.find_element("id", "search").send_keys(faultless.upper())
    assert find(browser, ".card .name") == [faultless]

    click(browser, "#filters [type=reset]")
    for size, label in enumerate(find(browser, "#sizes tbody th")):
        has = {name for name in images if any(word[3] == size for word in images[name]["gt"])}
        if has:
            click(browser, f"#sizes tbody tr:nth-child({size + 1}) button")
            assert set(find(browser, ".card .name")) == has, label


def test_layers_zoom_and_drag(opened, rendered_report):
    from selenium.webdriver.common.action_chains import ActionChains

    page, images = rendered_report
    name = list(images)[3]
    browser = opened(page, f"#image={name}")
    assert find(browser, "#name") == [name]

    def drawn(key):
        return [element.is_displayed() for element in browser.find_elements("css selector", f"#layer-{key} polygon")]

    for key in ("missed", "false", "split", "merged"):
        rows = [row for row in images[name]["gt"] + images[name]["det"] if row[0] == key]
        assert len(rows) > 1 and drawn(key) == [True] * len(rows)
        click(browser, f"#toggle-{key}")
        assert drawn(key) == [False] * len(rows)
        click(browser, f"#toggle-{key}")
    prob_map = browser.find_element("id", "layer-prob_map")
    assert not prob_map.is_displayed()
    press(browser, "2")
    assert prob_map.is_displayed()
    strokes = "return ['truth', 'correct', 'missed', 'false', 'split', 'merged'].map(key => getComputedStyle("
    strokes += "document.querySelector(`#layers .${key} rect`))).map(style => [style.stroke, style.strokeDasharray])"
    colors, dashes = zip(*browser.execute_script(strokes), strict=True)
    assert len(set(colors)) == 6 and len(set(dashes)) >= 5

    def zoom():
        return browser.find_element("id", "world").get_attribute("transform")

    fitted = zoom()
    stage = browser.find_element("id", "stage")
    ActionChains(browser).drag_and_drop_by_offset(stage, 40, 25).perform()
    x, y = (float(part) for part in zoom().split("(")[1].split(")")[0].split())
    fitted_x, fitted_y = (float(part) for part in fitted.split("(")[1].split(")")[0].split())
    assert (x - fitted_x, y - fitted_y) == (pytest.approx(40, abs=1), pytest.approx(25, abs=1))
    press(browser, "0")
    assert zoom() == fitted
    click(browser, "#zoom-in")
    assert float(zoom().split("scale(")[1][:-1]) == pytest.approx(1.4 * float(fitted.split("scale(")[1][:-1]))
    press(browser, "e")
    assert len(browser.find_elements("css selector", "#world .current")) == 1


def test_keys_and_permalinks_lead_from_image_to_image(opened, rendered_report):
    page, _ = rendered_report
    browser = opened(page)
    order = find(browser, ".card .name")
    click(browser, f".card:nth-child({2})")
    assert find(browser, "#name") == [order[1]] and browser.current_url.endswith(f"#image={order[1]}")
    press(browser, "\ue014")  # right
    assert find(browser, "#name") == [order[2]] and browser.current_url.endswith(f"#image={order[2]}")
    press(browser, "k")
    press(browser, "k")
    press(browser, "k")
    assert find(browser, "#name") == [order[0]]
    press(browser, "h")
    assert not any(element.is_displayed() for element in browser.find_elements("css selector", "#world polygon"))
    press(browser, "?")
    assert browser.find_element("id", "help").is_displayed()
    press(browser, "\ue00c")  # Escape closes the help, then the image
    assert not browser.find_element("id", "help").is_displayed() and find(browser, "#name") == [order[0]]
    press(browser, "\ue00c")
    assert find(browser, "#name") == [] and len(find(browser, ".card")) == len(order)
    assert find(opened(page, f"#image={order[4]}"), "#place") == ["5 of 5"]
    assert find(opened(page, "#image=%E0%A4%A&nothing"), "#name") == []


def test_a_page_of_400_images_is_under_60_megabytes_and_opens_in_two_seconds(browser, tmp_path):
    """Of the time of its thread, which other programs on the machine do not take part of."""
    evaluation, annotation = Evaluation(), Annotation()
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1000, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    annotation.polygons = [box(30 + 300 * (i % 3), 10 + 40 * (i // 3), 250, 25) for i in range(105)]
    annotation.dont_care = [False] * 105
    outlines = [np.repeat(polygon, 4, axis=0) for polygon in annotation.polygons[:70]]
    false = [np.add(outline, (0, 20)) for outline in outlines[:30]]
    prob_map = cv2.GaussianBlur(noise[..., 0], (0, 0), 3)
    picture = picture_of(tmp_path / "noise.png", annotation, [*outlines, *false], [0.123] * 100, prob_map)
    evaluation.update("noise.png", annotation, [*outlines, *false], picture=picture)
    [image] = evaluation.images.values()
    assert len(picture.jpeg) > 0.7 * PICTURE_BYTES and len(picture.prob_map) > 0.5 * MAP_BYTES
    names = [f"{index:03d}.jpg" for index in range(400)]
    evaluation.images = dict.fromkeys(names, image)
    page = tmp_path / "report.html"
    write_report(page, evaluation, "", {}, None, "auto")
    assert page.stat().st_size < 60_000_000

    from docs.make_screenshots import wait_for_pictures

    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    browser.get(page.as_uri())
    wait_for_pictures(browser)
    metrics = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    assert next(metric["value"] for metric in metrics if metric["name"] == "ThreadTime") < 2
    browser.execute_cdp_cmd("Performance.disable", {})
    assert find(browser, "#count") == ["400 of 400 images"]
    assert 0 < len(browser.find_elements("css selector", ".card image")) < 60  # others are not even decoded


def test_hostile_names_are_text_in_the_page(opened, tmp_path):
    images = {name: (white(90, 60), Annotation([box(1, 1, 40, 9)], [False]), []) for name in HOSTILE}
    browser = opened(report_of(tmp_path, images, title="</script><script>window.hacked=1</script>"))
    cards = "[...document.querySelectorAll('.card')].map(card => [card.href, card.title])"
    cards = json.loads(browser.execute_script(f"return JSON.stringify({cards})"))
    assert sorted(name for _, name in cards) == sorted(HOSTILE)
    for link, name in cards:
        browser.get(link)
        shown = browser.execute_script("return JSON.stringify(document.getElementById('name').textContent)")
        assert json.loads(shown) == name and browser.find_element("id", "viewer").is_displayed()
        press(browser, "\ue00c")
    assert len(browser.find_elements("css selector", ".card img, .card script, h1 script")) == 0


def test_real_receipts_in_the_browser(opened, receipts, tmp_path):
    files, annotations, _ = read_split(receipts, "val")
    images = {}
    for path, annotation in zip(files.values(), annotations.values(), strict=True):
        shutil.copy(path, tmp_path / path.name)
        images[path.name] = (None, annotation, spoiled(annotation, 1))
    browser = opened(report_of(tmp_path, images))
    assert find(browser, "#count") == ["60 of 60 images"]
    click(browser, "#show-table")
    click(browser, "[data-key=recall] button")
    assert len(find(browser, "#table tbody tr")) == 60
    click(browser, "#with-false")
    browser = opened(tmp_path / "report.html", f"#image={list(files)[17]}")
    click(browser, "#toggle-correct")
    assert not browser.find_element("id", "layer-correct").is_displayed()
    assert browser.find_element("id", "toggle-prob_map").is_enabled() is False
    shot = np.array(Image.open(BytesIO(browser.get_screenshot_as_png())))
    assert shot.std() > 20
