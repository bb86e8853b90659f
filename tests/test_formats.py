"""Annotations in the formats of other projects, as they come; and every reader on what every writer wrote."""

import json
import re
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from support import hostile

from dbnet.annotations import Annotation, choose_format, write_detections, write_labels
from dbnet.dataset import TextDataset
from dbnet.errors import UserError
from dbnet.formats import (
    IMAGE_PARSERS,
    TextFile,
    parse_labelme,
    read_detections,
    read_labels_at,
    recognize_lines,
)
from dbnet.images import name_stem
from dbnet.metric import CLEval
from dbnet.splits import read_images, read_split

parse_icdar, parse_polygons, parse_ctw1500 = (IMAGE_PARSERS[form] for form in ("icdar", "polygons", "ctw1500"))
OUT = {"competition": "a.json", "coco": "a.json", "icdar": "a.zip", "ppocrlabel": "Label.txt", "labelme": "labels"}
QUAD = [[377, 117], [463, 117], [465, 130], [378, 130]]


def points(annotation):
    return [polygon.tolist() for polygon in annotation.polygons]


# ---- what is written is read

coordinates = st.integers(-99, 99_999) | st.floats(-99, 99_999).map(lambda value: round(value, 3))
polygons = st.lists(st.tuples(coordinates, coordinates), min_size=3, max_size=30).map(np.array)
words = st.lists(st.tuples(polygons, st.booleans(), st.floats(0, 1)), max_size=4)
names = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1, max_size=40),
    st.sampled_from(["-영수증.jpg", "영수증.jpg", 'a "b", c.jpg', "a\nb.png", "res_a.jpg", "gt_a", "s.pdf#page=2"]),
).filter(lambda name: Path(name).name == name)


@pytest.mark.parametrize("form", OUT)
@settings(max_examples=40, deadline=None)  # a file a case, and a disk has its own pace
@given(images=st.dictionaries(names, words, min_size=1, max_size=5).filter(lambda images: len(stems(images))))
def test_what_is_written_is_read(tmp_path_factory, form, images):
    path = tmp_path_factory.mktemp(form) / OUT[form]
    if form == "labelme":
        path.mkdir()
        images = {name: found for name, found in images.items() if name[0] != "."}  # such files are hidden
        assume(images)  # a folder without labels is an error
    elif form == "ppocrlabel":
        images = {name: found for name, found in images.items() if re.fullmatch(r"\S([^\t\r\n\\]*\S)?", name)}
    written = {
        name: Annotation([polygon for polygon, _, _ in found], [ignore for _, ignore, _ in found], scores(found))
        for name, found in images.items()
    }
    write_labels(path, form, written)
    read = read_detections(path, [*images, "another.jpg"])
    assert list(read) == list(images)
    for name, annotation in written.items():
        assert points(read[name]) == points(annotation)
        assert read[name].dont_care == annotation.dont_care
        assert read[name].scores == (annotation.scores if form != "icdar" else None)


def stems(images):
    """The images' names without suffixes, where they differ: files that are named after them need that."""
    found = {name_stem(name) for name in [*images, "another.jpg"]}
    return found if len(found) == len(images) + 1 else ()


def scores(found):
    return [score for _, _, score in found] or None


@settings(max_examples=40, deadline=None)  # a file a case, and a disk has its own pace
@given(images=st.dictionaries(names.filter(lambda name: "\r" not in name), words, max_size=5))
def test_a_csv_is_read_among_the_other_formats(tmp_path_factory, images):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    written = {name: Annotation([polygon for polygon, _, _ in found]) for name, found in images.items()}
    write_labels(path, "csv", written)
    read = read_detections(path, list(images))
    assert {name: points(annotation) for name, annotation in read.items()} == {
        name: points(annotation) for name, annotation in written.items()
    }


def test_the_upload_form_of_icdar_is_met(tmp_path):
    write_detections(tmp_path / "a.zip", "icdar", {"img_1.jpg": Annotation([np.array(QUAD)], [False], [0.5])}, None)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.namelist() == ["res_img_1.txt"]
        assert archive.read("res_img_1.txt") == b"377,117,463,117,465,130,378,130\r\n"


def test_coco_says_what_its_tools_ask_for(tmp_path):
    found = {"a.jpg": Annotation([np.array(QUAD)], [False], [0.5], size=(640, 480)), "b.jpg": Annotation()}
    write_labels(tmp_path / "a.json", "coco", found)
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["images"] == [
        {"id": 1, "file_name": "a.jpg", "width": 640, "height": 480},
        {"id": 2, "file_name": "b.jpg"},
    ]
    [word] = content["annotations"]
    assert word["bbox"] == [377, 117, 88, 13] and word["area"] == 1124.5 and word["score"] == 0.5
    assert word["category_id"] == content["categories"][0]["id"]


def test_the_format_follows_the_suffix_and_tells_images_apart():
    assert choose_format(Path("A.CSV"), "auto", ["a.jpg", "a.png"]) == "csv"
    assert choose_format(Path("a.json"), "auto", []) == "competition"
    assert choose_format(Path("a.json"), "coco", []) == "coco"
    with pytest.raises(UserError, match=r"a\.txt: its suffix names no format; .*--out-format"):
        choose_format(Path("a.txt"), "auto", [])
    with pytest.raises(UserError, match=r"a\.png: .*the same label file as a\.jpg"):
        choose_format(Path("a.zip"), "auto", ["a.jpg", "a.png"])


# ---- text files as they come


def test_icdar_with_byte_order_mark_crlf_blank_lines_commas_and_quotes(tmp_path):
    texts = ["Genaxis Theatre", "12,000", 'say "no", he said', "합계 1,234원", "###", "Latin,###", "", '"###']
    lines = [f"{i},117,463,117,465,130,378,130,{text}" for i, text in enumerate(texts)]
    path = tmp_path / "gt_a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join([*lines, "8, 1.5, 2, 3, 4, 5, 6, 7", "  "]).encode())
    form, found = read_labels_at(tmp_path, ["a.jpg"])
    assert form == "icdar"
    assert [polygon[0, 0] for polygon in found["a.jpg"].polygons] == list(range(9))
    assert {polygon.shape for polygon in found["a.jpg"].polygons} == {(4, 2)}
    assert found["a.jpg"].dont_care == [False, False, False, False, True, True, False, False, False]


def test_polygons_of_any_number_of_points():
    curve = ",".join(map(str, range(20)))
    text = f"{curve},a word, and 7\n\n{curve}\n{curve},###\n1,2,3,4,5,6\n{curve},0.93\n{curve},-1.5,2\n"
    annotation = parse_polygons("a.txt", text)
    assert [len(polygon) for polygon in annotation.polygons] == [10, 10, 10, 3, 10, 11]
    assert annotation.dont_care == [False, False, True, False, False, False]


def test_labelme_polygons_rectangles_and_dont_care():
    shapes = [
        {"label": "text", "points": QUAD, "shape_type": "oriented_rectangle"},
        {"label": "text", "points": QUAD, "shape_type": "polygon", "flags": {}},
        {"label": "text", "points": [[9, 8], [1, 2]], "shape_type": "rectangle"},
        {"label": "###", "points": QUAD},
        {"label": "text", "description": "###", "points": QUAD},
        {"label": "text", "points": QUAD, "flags": {"ignore": True}},
    ]
    text = json.dumps({"shapes": shapes, "imagePath": "..\\..\\a.jpg", "imageData": None})
    annotation = parse_labelme("a.json", text)
    assert points(annotation)[:3] == [QUAD, QUAD, [[1, 2], [9, 2], [9, 8], [1, 8]]]
    assert annotation.dont_care == [False, False, False, True, True, True]


def test_coco_parts_boxes_crowds_and_folders(tmp_path):
    flat = [value for point in QUAD for value in point]
    content = {
        "images": [{"id": "x", "file_name": "images\\train/a.jpg"}, {"id": 7, "file_name": "b.jpg"}],
        "annotations": [
            {"image_id": "x", "segmentation": [flat, flat[:6]]},
            {"image_id": "x", "segmentation": [], "bbox": [1, 2, 3, 4], "ignore": 1},
            {"image_id": "x", "segmentation": [[]], "bbox": [1, 2, 3, 4]},
            {"image_id": "x", "segmentation": {"counts": "..", "size": [9, 9]}, "bbox": [1, 2, 3, 4], "iscrowd": 1},
        ],
    }
    path = tmp_path / "val.json"
    path.write_text(json.dumps(content))
    form, found = read_labels_at(path, ["a.jpg", "b.jpg"])
    assert form == "coco" and list(found) == ["a.jpg", "b.jpg"] and found["b.jpg"].polygons == []
    box = [[1, 2], [4, 2], [4, 6], [1, 6]]
    assert points(found["a.jpg"]) == [QUAD, QUAD[:3], box, box, box]
    assert found["a.jpg"].dont_care == [False, False, True, False, True]
    assert found["a.jpg"].scores is None


# ---- what the set is called and where it lies


@pytest.mark.parametrize(
    ("lines", "form"),
    [
        (["1,2,3,4,5,6,7,8,12,000"] * 3, "icdar"),
        (["1,2,3,4,5,6,7,8,a", "1,2,3,4,5,6,7,8,9,10,11,12,13,14,a"], "polygons"),
        ([], "icdar"),
    ],
)
def test_text_files_are_recognized(tmp_path, lines, form):
    (tmp_path / "a.txt").write_text("\n".join(lines))
    assert read_labels_at(tmp_path, ["a.jpg"])[0] == form


@pytest.mark.parametrize("pattern", ["{}.txt", "gt_{}.txt", "poly_gt_{}.txt", "res_{}.txt", "{}.jpg.txt", "gt_{}.TXT"])
def test_text_files_are_named_after_images(tmp_path, pattern):
    for name, x in (("a b", 1), ("영수증", 2)):
        (tmp_path / pattern.format(name)).write_text(f"{x},2,3,4,5,6,7,8\n")
    (tmp_path / "._a b.txt").write_bytes(b"\0\x05\x16\x07 what macOS leaves behind")
    _, found = read_labels_at(tmp_path, ["영수증.jpg", "a b.jpg", "without.jpg"])
    assert [(name, annotation.polygons[0][0, 0]) for name, annotation in found.items()] == [
        ("영수증.jpg", 2),
        ("a b.jpg", 1),
    ]


def test_a_prefix_that_belongs_to_the_image_stays(tmp_path):
    (tmp_path / "gt_a.txt").write_text("1,2,3,4,5,6,7,8\n")
    assert list(read_labels_at(tmp_path, ["gt_a.jpg"])[1]) == ["gt_a.jpg"]


def write_text_labels(folder, annotations, _):
    folder.mkdir(parents=True)
    for name, annotation in annotations.items():
        lines = []
        for polygon, ignore in zip(annotation.polygons, annotation.dont_care, strict=True):
            text = "###" if ignore else "it's, 1"
            flat = ",".join(map(str, polygon.ravel().tolist()))
            lines.append(f"{flat},{text}")
        (folder / f"gt_{Path(name).stem}.txt").write_text("\n".join(lines))


def write_labelme(folder, annotations, _):
    folder.mkdir(parents=True, exist_ok=True)
    for name, annotation in annotations.items():
        shapes = [
            {"label": "###" if ignore else "text", "points": polygon.tolist(), "shape_type": "polygon"}
            for polygon, ignore in zip(annotation.polygons, annotation.dont_care, strict=True)
        ]
        (folder / f"{Path(name).stem}.json").write_text(json.dumps({"shapes": shapes}))


def write_zip(path, annotations, _):
    path.parent.mkdir()
    write_labels(path, "icdar", annotations)


def write_one_file(path, annotations, form):
    path.parent.mkdir(exist_ok=True, parents=True)
    write_labels(path, form, annotations)


@pytest.mark.parametrize(
    ("place", "write", "form"),
    [
        ("jsons/train.json", write_one_file, "coco"),
        ("labels/train.json", write_one_file, "coco"),
        ("labels/train.zip", write_zip, "polygons"),
        ("labels/train", write_text_labels, "icdar"),
        ("labels/train/Label.txt", write_one_file, "ppocrlabel"),
        ("labels/train", write_labelme, "labelme"),
        ("images/train", write_labelme, "labelme"),
    ],
)
def test_a_data_set_in_any_format_gives_the_same_samples(rendered, small, tmp_path, capsys, place, write, form):
    images, annotations, _ = read_split(rendered, "train")
    (tmp_path / "images" / "train").mkdir(parents=True)
    for name, path in images.items():
        (tmp_path / "images" / "train" / name).symlink_to(path)
    expected = {name: annotations[name] for name in sorted(annotations)}
    write(tmp_path / place, expected, form)
    ours, found, _ = read_split(tmp_path, "train")
    assert f"{tmp_path / place.removesuffix('/Label.txt')}: annotations of the format {form}" in capsys.readouterr().out
    assert list(ours) == list(expected)
    for annotation, theirs in zip(found.values(), expected.values(), strict=True):
        assert points(annotation) == points(theirs) and annotation.dont_care == theirs.dont_care
    assert list(read_images(tmp_path, "train")) == list(expected)
    config = small.changed(data=str(tmp_path), format=form)
    sample = TextDataset(config, "train", train=True)[0]
    assert sample["prob_map"].any()


def test_format_insists(rendered, tmp_path, small):
    data = tmp_path / "data"
    (data / "labels" / "val").mkdir(parents=True)
    (data / "images" / "val").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(data / "images" / "val" / "a.jpg")
    (data / "labels" / "val" / "a.txt").write_text("1,2,3,4,5,6,7,8,9,10\n")
    (data / "labels" / "val" / "a.json").write_text('{"shapes": []}')
    with pytest.raises(UserError, match=r"labels/val: holds \.txt and \.json files; .*--format"):
        read_split(data, "val")
    for form, counts in (("icdar", [4]), ("polygons", [5]), ("labelme", [])):
        assert [len(each) for each in read_split(data, "val", form).annotations["a.jpg"].polygons] == counts
    with pytest.raises(UserError, match=r'labels/val/a\.json: lacks "images" or "annotations"'):
        read_split(data, "val", "coco")
    (data / "labels" / "val" / "a.json").unlink()
    with pytest.raises(UserError, match=r"labels/val: holds no annotations \(\.json files\); .* --format"):
        read_split(data, "val", "coco")
    with pytest.raises(UserError, match=r'lacks "images" or "annotations", the lists of COCO'):
        read_split(rendered, "val", "coco")


# ---- broken files


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_icdar, "1,2,3,4,5,6,7,8,a\n\n1,2,3,4,a\n", "line 3: must begin with x1,y1"),
        (parse_icdar, "1,2,3,4,5,6,7,nan,a", "line 1: must begin"),
        (parse_icdar, "1,2,3,4,5,6,1e999,8,a", "line 1: must begin"),
        (parse_polygons, "1,2,3,4,5,a", "line 1: must begin with x1,y1,x2,y2,x3,y3, not '1,2,3,4,5,a'"),
        (parse_labelme, "{", "not JSON"),
        (parse_labelme, "[]", 'lacks "shapes"'),
        (parse_labelme, '{"shapes": [5]}', "shape 1: must be an object"),
        (parse_labelme, '{"shapes": [{"points": [[1, NaN]]}]}', "shape 1: a coordinate is not a finite"),
        (
            parse_labelme,
            '{"shapes": [{"points": [[1, 2], [3, 4]], "shape_type": "circle"}]}',
            "is a circle of 2 points",
        ),
        (parse_labelme, '{"shapes": [{"points": [[1, 2]], "shape_type": "polygon"}]}', "is a polygon of 1 points"),
    ],
)
def test_broken_text_is_named_with_its_line(parse, text, message):
    with pytest.raises(UserError) as caught:
        parse("folder/a.txt", text)
    assert str(caught.value).startswith("folder/a.txt: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"image_id": 1, "segmentation": []}], "put the images in too"),
        ({"images": []}, "the lists of COCO"),
        ({"images": [{"id": 1}], "annotations": []}, "image 1: must have"),
        ({"images": [{"id": [], "file_name": "a.jpg"}], "annotations": []}, "image 1: must have"),
        ({"images": [{"id": 1, "file_name": "x/.."}], "annotations": []}, "not a plain file name"),
        (
            {"images": [{"id": 1, "file_name": "a/b"}, {"id": 2, "file_name": "c/b"}], "annotations": []},
            "twice",
        ),
        ({"images": [], "annotations": [{"image_id": 1}]}, "annotation 1: its image_id is"),
        ({"images": [], "annotations": [{"image_id": {}}]}, "annotation 1: its image_id"),
    ]
    + [
        ({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, **word}]}, message)
        for word, message in [
            ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "pairs of numbers"),
            ({"segmentation": [[1, 2, 3, 4]]}, "x1, y1, x2, y2, x3, y3"),
            ({"segmentation": [[1, 2, 3, 4, 5, "6"]]}, "pairs of numbers"),
            ({"segmentation": {"counts": ""}}, "mask"),
            ({"segmentation": []}, "neither a segmentation nor a bbox"),
            ({"bbox": [1, 2, 3, None]}, "not a finite number"),
            ({"bbox": [1e308, 0, 1e308, 1]}, "a coordinate is beyond"),
        ]
    ],
)
def test_broken_coco_is_named(tmp_path, content, message):
    path = tmp_path / "val.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        read_labels_at(path, [])
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"b.txt": b""}, r"b\.txt: there is no image 'b'"),
        ({"a.txt": b"", "a.jpg.txt": b""}, "annotations of a.jpg are there twice"),
        ({"twin.txt": b""}, r"may be on twin\.jpg or twin\.png"),
        ({"a.txt": "합계".encode("cp949")}, "not text in UTF-8"),
        ({"a.md": b""}, "holds no annotations"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_files_on_no_image_or_not_of_text_are_named(tmp_path, files, message, zipped):
    place = tmp_path / ("val.zip" if zipped else "val")
    if zipped:
        with zipfile.ZipFile(place, "w") as archive:
            for name, data in files.items():
                archive.writestr(f"gt/{name}", data)
    else:
        place.mkdir()
        for name, data in files.items():
            (place / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        read_labels_at(place, ["a.jpg", "twin.jpg", "twin.png"])
    assert str(caught.value).startswith(str(place))


def test_a_path_in_a_file_leads_nowhere(tmp_path):
    """Names in a zip, in COCO and in LabelMe may hold folders; only images of the data set are meant."""
    with zipfile.ZipFile(tmp_path / "val.zip", "w") as archive:
        archive.writestr("../../a.txt", "1,2,3,4,5,6,7,8\n")
        archive.writestr("__MACOSX/._a.txt", b"\xff")
    assert list(read_labels_at(tmp_path / "val.zip", ["a.jpg"])[1]) == ["a.jpg"]
    content = {"images": [{"id": 1, "file_name": "../../../etc/passwd.jpg"}], "annotations": []}
    (tmp_path / "jsons").mkdir()
    (tmp_path / "jsons" / "val.json").write_text(json.dumps(content))
    (tmp_path / "images" / "val").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / "val" / "a.jpg")
    with pytest.raises(UserError, match=r"images/val/passwd\.jpg: no such image, but jsons/val\.json names it"):
        read_split(tmp_path, "val")


def test_a_broken_zip_is_named(tmp_path):
    path = tmp_path / "val.zip"
    path.write_bytes(b"no zip")
    with pytest.raises(UserError, match=r"val\.zip: not a zip file"):
        read_labels_at(path, ["a.jpg"])
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "1,2,3,4,5,6,7,8\n")
    path.write_bytes(path.read_bytes().replace(b"1,2,3", b"1,2,4"))
    with pytest.raises(UserError, match=r"val\.zip: a\.txt: cannot be read \(Bad CRC"):
        read_labels_at(path, ["a.jpg"])


pieces = st.sampled_from(
    ["x:", "y:", "[[", "]]", ",", " ", "\n", "1", "-2.5", "9" * 30, "'#'", "###", "nan", "영", "{"]
)


@pytest.mark.parametrize("form", list(IMAGE_PARSERS))
@hostile
@given(text=st.lists(pieces, max_size=40).map("".join) | st.text(max_size=60))
def test_any_text_of_a_format_is_read_or_rejected(form, text):
    try:
        annotation = IMAGE_PARSERS[form]("a.txt", text)
    except UserError as error:
        assert str(error).startswith("a.txt: ")
    else:
        assert all(len(polygon) >= 3 and np.isfinite(polygon).all() for polygon in annotation.polygons)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.integers(0, 2),
    lambda inner: (
        st.lists(inner, max_size=8)
        | st.dictionaries(
            st.sampled_from(["images", "annotations", "id", "file_name", "image_id", "segmentation", "bbox"]), inner
        )
    ),
    max_leaves=15,
)


@hostile
@given(
    images=st.lists(st.fixed_dictionaries({"id": st.integers(0, 2), "file_name": st.text(max_size=3)}), max_size=2),
    annotations=st.lists(st.fixed_dictionaries({"image_id": st.integers(0, 2), "segmentation": json_values})),
    other=json_values,
)
def test_any_coco_is_read_or_rejected(tmp_path_factory, images, annotations, other):
    path = tmp_path_factory.mktemp("coco") / "a.json"
    for content in ({"images": images, "annotations": annotations}, {"images": [other], "annotations": []}, [other]):
        path.write_text(json.dumps(content))
        try:
            read_labels_at(path, [])
        except UserError as error:
            assert str(error).startswith(str(path))


# ---- files as other tools write them

CASES = Path(__file__).resolve().parents[2] / "shared" / "cases" / "formats"
LINE = "LINE"
SAID = {  # words of the error, LINE for any; the others are read, with H-Mean 1 unless a number says otherwise
    **dict.fromkeys(["bom_every_line", "comment_header", "coco_two_points_bbox", "comp_flat_points", "comp_nan"], LINE),
    **dict.fromkeys(["comp_null_words", "comp_words_list", "float_exp", "float_nan", "labelme_circle"], LINE),
    **dict.fromkeys(["fullwidth_comma", "semicolons", "spaces", "tabs"], "separated by commas"),
    **dict.fromkeys(["icdar2013", "icdar2013_train"], "ICDAR 2013"),
    "cp949": "save it as UTF-8",
    "utf16": "UTF-16",
    "coco_rle": "export polygons",
    "labelme_linestrip": "a linestrip of 4 points",
    "labelme_point": "a point of 1 points",
    "labelme_other_size": "1280 x 960 px, but the image has 640 x 480 px",
    "label_studio": "Label Studio, which is not read; export COCO",
    "mmocr1": "MMOCR 1.x",
    "textocr": "TextOCR",
    "via": "VIA",
    "td500": "MSRA-TD500",
    "voc": "Pascal VOC",
    "yolo": "YOLO",
    "dota": "DOTA",
    "funsd": "FUNSD",
    "comp_three_points": 0.7059,
    "coco_multipart": 0.9565,
    "labelme_empty": 0.0,
    "coco_missing_image": 0.5,
}


def score_case(folder):
    """H-Mean and flags of the image's words, as of `evaluate.py --submission truth.csv`."""
    annotations = read_split(folder, "val", need_images=False).annotations
    truth = read_detections(folder / "truth.csv", list(annotations))
    metric = CLEval()
    for name, annotation in annotations.items():
        found = truth[name].polygons if name in truth else []
        metric.update(annotation.polygons, found, annotation.dont_care)
    assert truth.keys() <= annotations.keys()
    return round(metric.compute().hmean, 4), annotations["receipt 1.jpg"].dont_care


@pytest.mark.skipif(not CASES.is_dir(), reason="the folder shared/cases/formats is not there")
def test_every_case_is_read_rightly_or_named(capsys):
    for folder in sorted(path for path in CASES.iterdir() if path.is_dir()):
        expected = SAID.get(folder.name, 1.0)
        if isinstance(expected, float):
            hmean, flags = score_case(folder)
            assert hmean == expected, folder.name
            assert flags in ([False] * len(flags), [False, False, True]), folder.name
        else:
            with pytest.raises(UserError) as caught:
                score_case(folder)
            assert str(folder) in str(caught.value), folder.name
            assert expected == LINE or expected in str(caught.value), folder.name
    said = capsys.readouterr().err
    assert "comp_three_points/jsons/val.json: 1 of 2 outlines have fewer than four points" in said
    assert "zigzag/labels/val: 2 of 3 outlines now begin at the upper left" in said
    assert "skipped" not in said


LABELS = "labels/val/receipt 1.txt"
QUADS = ["50,40,250,40,250,80,50,80", "60,150,300,120,305,160,65,190", "400,300,560,300,560,330,400,330"]


def folder_of(tmp_path, files):
    """A data set of one image of 640 x 480, with these label files by path."""
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    (tmp_path / "images" / "val").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (640, 480)).save(tmp_path / "images" / "val" / "receipt 1.jpg")
    return tmp_path


def flags_of(tmp_path, files):
    """The don't care flags of the image of `folder_of`, as read."""
    return read_split(folder_of(tmp_path, files), "val").annotations["receipt 1.jpg"].dont_care


def coco(image=(), **word):
    """COCO of the three quads, `word` in the last of them."""
    words = [{"image_id": 1, "segmentation": [[float(value) for value in quad.split(",")]]} for quad in QUADS]
    words[2] |= word
    names = [{"id": 1, "name": "text"}, {"id": 2, "name": "Don't Care"}, {"id": 3, "name": "ignored_text"}]
    names.append({"id": 4, "name": "text", "supercategory": "ignore"})
    return {
        "images": [{"id": 1, "file_name": "receipt 1.jpg", **dict(image)}],
        "annotations": words,
        "categories": names,
    }


@pytest.mark.parametrize(
    "files",
    [
        {LABELS: "\n".join(f"{quad},{text}" for quad, text in zip(QUADS, ["a", "b,c", " '###' "], strict=True))},
        *(
            {LABELS: "\n".join(f"{quad},{flag},{text}" for quad, flag in zip(QUADS, flags, strict=True))}
            for flags, text in [("001", '"9,00"'), ("001", "'9,00'"), (["false", "False", "True"], "“9,00”")]
        ),
        {LABELS: "\n".join(f"{quad},{text}" for quad, text in zip(QUADS, ["0,합계", "0,9,00", "1, a b"], strict=True))},
        *(
            {LABELS: "\n".join(f"{quad},{text}" for quad, text in zip(QUADS, ["*", "a # b", hidden], strict=True))}
            for hidden in ["####", "“###”", "«###»", "＃＃＃", " '＃＃＃＃＃' ", "Latin,„####“", '""###""', "#" * 40]
        ),
        {"jsons/val.json": coco(attributes={"text": "“###”"})},
        {"jsons/val.json": coco(label="＃＃＃")},
        {"jsons/val.json": coco(attributes={"class": "not legible"})},
        {
            LABELS: "\n".join(
                f"{quad},{text}" for quad, text in zip(QUADS, ["1,2,3,4,5,6", "7,8,9,0", "###"], strict=True)
            )
        },
        *(
            {"jsons/val.json": coco(**word)}
            for word in [
                {"ignore": "1"},
                {"category_id": "2"},
                {"category_id": 3},
                {"attributes": {"text": "###"}},
                {"attributes": {"legible": False}},
                {"attributes": [{"name": "illegible", "value": "True"}]},
                *({"legibility": value} for value in ("illegible", " Not legible ", False, 0, "false")),
                {"care": False},
                {"extra": {"ignore": True}},
                {"tags": "illegible"},
                {"tags": ["###"]},
                {"transcription": ["###"]},
                {"category_id": 4},
                {"iscrowd": 1.0},
                {"tags": ["difficult"]},
                {"attributes": ["illegible"]},
                {"flags": ["ignore"]},
            ]
        ),
    ],
)
def test_dont_care_is_seen_in_every_dialect(tmp_path, files):
    assert flags_of(tmp_path, files) == [False, False, True]


def test_whether_texts_have_flags_before_them_is_decided_for_all_files_of_a_set(tmp_path):
    files = {LABELS: ["0,합계", "0,12.00", "0,b"], "labels/val/b.txt": ["0,1.00", "0,2.00", "1,3.00"]}
    files |= {"labels/val/c.txt": ["1,Cola", "2,Brot", "3,Bier"], "labels/val/d.txt": ["1,Cola"]}
    expected = {"receipt 1.jpg": [False] * 3, "b.jpg": [False, False, True], "c.jpg": [False] * 3, "d.jpg": [False]}
    for names in (["receipt 1.jpg", "b.jpg"], ["c.jpg", "d.jpg"]):
        data = tmp_path / names[0]
        for name in names:
            path = f"labels/val/{Path(name).stem}.txt"
            texts = [f"{quad},{text}" for quad, text in zip(QUADS, files[path], strict=False)]
            folder_of(data, {path: "\n".join(texts)})
            Image.new("RGB", (640, 480)).save(data / "images" / "val" / name)
        found = read_split(data, "val").annotations
        assert {name: found[name].dont_care for name in names} == {name: expected[name] for name in names}


@pytest.mark.parametrize(
    "texts",
    [
        ["*", "**", "* * *"],  # stars stand beside prices on receipts
        ["##", "#1", "No. ###"],
        ["1,500", "0,99", "1,50 EUR"],  # commas within numbers, not flags
        ["1,a", "b", "0,c"],
        ["1", "0", "1"],
        ["'###", "“###", "say, ###”"],
    ],
)
def test_texts_that_only_look_like_dont_care_are_words(tmp_path, texts):
    labels = "\n".join(f"{quad},{text}" for quad, text in zip(QUADS, texts, strict=True))
    assert flags_of(tmp_path, {LABELS: labels}) == [False, False, False]


def test_what_does_not_say_dont_care_is_a_word(tmp_path):
    word = {"attributes": {"legible": "true", "difficult": "false", "note": "ignore"}, "legibility": "legible"}
    word |= {"extra": {"legibility": "1", "care": "", "tag": "legible"}}
    assert flags_of(tmp_path, {"jsons/val.json": coco(**word)}) == [False, False, False]
    with pytest.raises(UserError, match='annotation 3: "difficult" must be true or false'):
        flags_of(tmp_path, {"jsons/val.json": coco(attributes={"difficult": "maybe"})})


LABELME = {"shapes": [{"label": "text", "points": [[1, 2], [9, 2], [9, 8], [1, 8]], "shape_type": "polygon"}]}
LABEL_TXT = f"x/a.jpg\t{json.dumps(LABELME['shapes'])}\n"


@pytest.mark.parametrize(
    "label",
    [
        *("labels/val/x/a.txt", "labels/val/x/gt_a.txt", "labels/val/x/a.jpg.txt", "labels/val/x_a.txt"),
        *("labels/val/a.txt", "images/val/x/a.txt", "labels/val.zip: x/a.txt", "labels/val.zip: val/x/gt_a.txt"),
        *("labels/val/x/a.json", "images/val/x/a.json", "images/val/x/Label.txt", "labels/val/x/Label.txt"),
    ],
)
def test_labels_in_sub_folders_belong_to_the_images_there(tmp_path, label):
    content = json.dumps(LABELME) if label.endswith(".json") else "1,2,9,2,9,8,1,8,text\n"
    content = LABEL_TXT if label.endswith("Label.txt") else content
    path, _, inner = label.partition(": ")
    for place in (tmp_path / path, tmp_path / "images/val/x/a.jpg"):
        place.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(tmp_path / "images/val/x/a.jpg")
    if inner:
        with zipfile.ZipFile(tmp_path / path, "w") as archive:
            archive.writestr(inner, content)
            archive.writestr(".ipynb_checkpoints/a-checkpoint.txt", content)  # hidden, as in a folder
    else:
        (tmp_path / path).write_text(content)
    assert points(read_split(tmp_path, "val").annotations["x/a.jpg"]) == [LABELME["shapes"][0]["points"]]


def test_each_sub_folder_may_have_its_own_label_txt(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / "images/val" / folder).mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(tmp_path / "images/val" / folder / "a.jpg")
        (tmp_path / "images/val" / folder / "Label.txt").write_text(LABEL_TXT.replace("x/", f"{folder}/"))
    assert list(read_split(tmp_path, "val").annotations) == ["x/a.jpg", "y/a.jpg"]
    (tmp_path / "images/val/y/Label.txt").write_text(LABEL_TXT)
    with pytest.raises(UserError, match=r"y/Label.txt: line 1: annotations of x/a\.jpg are there twice"):
        read_split(tmp_path, "val")


def test_labels_of_images_in_sub_folders_are_written_where_they_are_read(tmp_path):
    for name in ("x/a.jpg", "y/a.jpg"):
        (tmp_path / "images/val" / name).parent.mkdir(parents=True)
        Image.new("RGB", (640, 480)).save(tmp_path / "images/val" / name)
    found = {name: Annotation([np.array(QUAD)], [False]) for name in ("x/a.jpg", "y/a.jpg")}
    images = {name: tmp_path / "images/val" / name for name in found}
    for form, out in (("labelme", "images/val"), ("icdar", "labels/val.zip")):
        (tmp_path / out).parent.mkdir(exist_ok=True)
        assert choose_format(tmp_path / out, form, list(found)) == form
        write_labels(tmp_path / out, form, found, images)
        read = read_split(tmp_path, "val", "polygons" if form == "icdar" else form).annotations
        assert {name: points(each) for name, each in read.items()} == {name: [QUAD] for name in found}
    assert json.loads((tmp_path / "images/val/x/a.json").read_text())["imagePath"] == "a.jpg"


@pytest.mark.parametrize(
    ("degrees", "first"), [(90, [320, 120]), ("270", [280, 360]), (-90.0, [280, 360]), (180, [180, 220])]
)
def test_boxes_of_cvat_are_turned(tmp_path, degrees, first):
    word = {"segmentation": [], "bbox": [180, 220, 240, 40], "attributes": {"rotation": degrees}}
    content = coco() | {"annotations": [{"image_id": "1", **word}]}
    [polygon] = (
        read_split(folder_of(tmp_path, {"jsons/val.json": content}), "val").annotations["receipt 1.jpg"].polygons
    )
    assert polygon[0].tolist() == first


def test_label_txt_is_read_beside_what_else_ppocrlabel_writes(tmp_path):
    words = [
        {"transcription": "a", "points": [[50, 40], [250, 40], [250, 80], [50, 80]], "difficult": flag}
        for flag in (False, "true")
    ]
    files = {"fileState.txt": "x/receipt 1.jpg\t1\n", "rec_gt.txt": "crop_img/a.jpg\ta\n", "Cache.cach": ""}
    files["Label.txt"] = f"val/receipt 1.jpg\t{json.dumps(words)}\n\n"
    assert flags_of(tmp_path, {f"images/val/{name}": text for name, text in files.items()}) == [False, True]


def test_sizes_that_labels_carry_are_compared_with_the_image_upright_and_as_stored(tmp_path):
    assert flags_of(tmp_path / "a", {"jsons/val.json": coco({"width": 640, "height": "480"})}) == [False] * 3
    with pytest.raises(UserError, match="320 x 240 px, but the image has 640 x 480 px; put the image"):
        flags_of(tmp_path / "b", {"jsons/val.json": coco({"width": 320, "height": 240})})
    turned = folder_of(tmp_path / "c", {"jsons/val.json": coco({"width": 640, "height": 480})})
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (640, 480)).save(turned / "images" / "val" / "receipt 1.jpg", exif=exif)
    with pytest.raises(UserError, match=r"640 x 480 px, but the image has 480 x 640 px; if its EXIF data"):
        read_split(turned, "val")


@pytest.mark.parametrize("labels", [QUADS[0], "-60,10,-20,10,-20,30,-60,30"])
def test_outlines_outside_of_their_images_are_counted(tmp_path, capsys, labels):
    data = folder_of(tmp_path, {LABELS: f"{labels},a\n10,10,30,10,30,20,10,20,b\n"})
    exif = Image.Exif()
    exif[0x0112] = 6  # the image is 100 px wide as stored; upright, the first word is beyond its right edge
    Image.new("RGB", (260, 100)).save(data / "images" / "val" / "receipt 1.jpg", exif=exif)
    assert len(read_split(data, "val").annotations["receipt 1.jpg"].polygons) == 2
    assert "labels/val: 1 outlines lie outside of their images, first in receipt 1.jpg; " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("X1,Y1,X2,Y2,X3,Y3,X4,Y4,Text", "a heading or a comment"),
        ("// made by a tool", "a heading or a comment"),
        ("50,40,200,40,TOTAL", "a box"),
        ("50,40,200,40", "a box"),
        (f"{QUADS[0]}\tTOTAL", "a comma must be between the numbers and the text"),
        (f"{QUADS[0]};TOTAL", "a comma must be between the numbers and the text"),
        (re.sub(r"(\d+)", r'"\1"', QUADS[0]), "without quotes and brackets"),
        (f"({QUADS[0]}),TOTAL", "without quotes and brackets"),
        ("\0".join(QUADS[0]), "UTF-16"),
    ],
)
def test_the_error_about_a_line_says_what_to_do(tmp_path, line, hint):
    with pytest.raises(UserError, match=f"receipt 1.txt: line 1: must begin with .*; .*{hint}"):
        flags_of(tmp_path, {LABELS: line})


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (
            {"receipt 1.jpg": {"img_dimensions": [480, 640], "img_hash": "x", "polygons": [[[1, 2]]]}},
            "labels.json of docTR",
        ),
        ({"_via_settings": {}, "_via_img_metadata": {}}, "VIA"),
        ([{"ocr": "a.jpg", "id": 1, "label": [{"original_width": 640}]}], "Label Studio"),
        ({"gt_1": [{"transcription": "a", "points": [[1, 2]]}]}, "ArT"),
        ([{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}], "put the images in too"),
        ({"info": {}, "annotations": [{"image_id": "a", "paragraphs": []}]}, "HierText"),
    ],
)
def test_json_of_other_tools_is_named(tmp_path, content, kind):
    with pytest.raises(UserError, match=kind):
        flags_of(tmp_path, {"jsons/val.json": content})


def test_coordinates_that_are_shares_of_the_image_are_named(tmp_path):
    with pytest.raises(UserError, match="shares of the image"):
        flags_of(tmp_path, {LABELS: "0.1,0.1,0.4,0.1,0.4,0.2,0.1,0.2,a"})


def test_a_word_without_area_in_the_corner_is_no_share_of_the_image(tmp_path):
    assert flags_of(tmp_path, {LABELS: "0,0,0,0,0,0,0,0,a"}) == [False]


def test_ctw1500_is_told_from_polygons_of_sixteen_points():
    offsets = [
        *(value for x in range(7) for value in (x * 30, 0)),
        *(value for x in range(6, -1, -1) for value in (x * 30, 40)),
    ]
    line = ",".join(map(str, [50, 40, 230, 80, *offsets]))
    assert parse_ctw1500("a.txt", line).polygons[0][:2].tolist() == [[50, 40], [80, 40]]
    curve = [*((50 + 20 * x, 40) for x in range(8)), *((50 + 20 * x, 80) for x in range(7, -1, -1))]
    curve_line = ",".join(str(value) for point in curve for value in point)
    files = [TextFile("a.txt", PurePosixPath("a.txt"), curve_line.encode)]
    assert recognize_lines(files) == "polygons"
    assert recognize_lines([TextFile("a.txt", PurePosixPath("a.txt"), line.encode)]) == "ctw1500"
