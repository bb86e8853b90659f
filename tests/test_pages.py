"""Pages of PDF and TIFF files as images."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile
from support import CASE_SECONDS

from dbnet import images
from dbnet.config import Config
from dbnet.dataset import Batches, ImageDataset, TextDataset, make_loader
from dbnet.errors import ImageError, UserError
from dbnet.images import DPI, list_pages, name_stem, read_image, read_size
from dbnet.splits import find_images_at, read_split

ROOT = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT = 300, 200


@pytest.fixture
def pdf(tmp_path) -> Path:
    """Three pages: white with a red top-left quarter; the same standing on its side; and a large one, grey."""
    pixels = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    pixels[: HEIGHT // 2, : WIDTH // 2] = (200, 0, 0)
    first = Image.fromarray(pixels)
    others = [first.transpose(Image.Transpose.ROTATE_270), Image.new("L", (3000, 2000), 128)]
    path = tmp_path / "scan, 영수증.pdf"
    first.save(path, save_all=True, append_images=others, resolution=DPI, quality=95)
    return path


def page(path, number):
    return path.with_name(f"{path.name}#page={number}")


def test_pages_are_read_like_images(pdf):
    pages = list_pages(pdf)
    assert pages == [page(pdf, number) for number in (1, 2, 3)]
    pixels, size = read_image(pages[0])
    assert size == read_size(pages[0]) == (WIDTH, HEIGHT)
    assert pixels.shape == (HEIGHT, WIDTH, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels[50, 50].astype(int) - (200, 0, 0)).max() < 20 and pixels[150, 250].min() > 240
    pixels, size = read_image(pages[1])
    assert size == (HEIGHT, WIDTH)
    assert pixels[50, 150, 1] < 20 and pixels[250, 50].min() > 240


def test_a_page_is_rendered_no_larger_than_needed(pdf):
    pixels, size = read_image(page(pdf, 3), image_size=150)
    assert size == (3000, 2000) and pixels.shape == (100, 150, 3)
    assert abs(int(pixels[50, 50, 0]) - 128) < 4
    pixels, _ = read_image(page(pdf, 1), image_size=1000)
    assert pixels.shape == (HEIGHT, WIDTH, 3)


def test_a_huge_page_has_fewer_dots_an_inch(pdf, monkeypatch):
    monkeypatch.setattr("dbnet.images.MAX_PIXELS", 60_000)
    width, height = read_size(page(pdf, 3))
    assert 60_000 <= width * height < 61_000 and width / height == pytest.approx(1.5, abs=0.02)
    assert read_image(page(pdf, 3))[0].shape == (height, width, 3)


def test_a_loader_reads_pages_beside_images_and_names_the_broken(pdf, small):
    (pdf.parent / "broken.pdf").write_bytes(pdf.read_bytes()[:500])
    Image.new("RGB", (WIDTH, HEIGHT)).save(pdf.parent / "a.png")
    images = find_images_at([pdf.parent])
    assert list(images) == ["a.png", "broken.pdf", *(page(pdf, n).name for n in (1, 2, 3))]
    for workers in (0, 2):
        dataset = ImageDataset(list(images.values()), small)
        batches = list(make_loader(Batches(dataset, 3), workers, False))
        read = dict(
            pair for b in batches if "index" in b for pair in zip(b["index"].tolist(), b["size"].tolist(), strict=True)
        )
        assert read == {0: [300, 200], 2: [300, 200], 3: [200, 300], 4: [3000, 2000]}
        [(index, error)] = [failed for batch in batches for failed in batch["failed"]]
        assert index == 1 and "broken.pdf: cannot be read as a PDF" in error


def test_threads_may_read_pages_at_the_same_time(pdf):
    expected = [read_image(path)[0] for path in list_pages(pdf)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: read_image(page(pdf, number % 3 + 1))[0], range(24)))
    assert all(np.array_equal(pixels, expected[number % 3]) for number, pixels in enumerate(found))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{}#page=0", "no such page; the file has 3"),
        ("{}#page=4", "no such page; the file has 3"),
        ("{}", "a PDF of 3 pages; name one, e.g."),
        ("absent.pdf#page=1", "cannot be read (No such file or directory)"),
    ],
)
def test_a_page_that_is_not_there_is_named(pdf, name, message):
    path = pdf.with_name(name.format(pdf.name))
    with pytest.raises(ImageError) as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a PDF", b"%PDF-1.7\n%%EOF"])
def test_a_broken_pdf_is_named(tmp_path, content):
    (tmp_path / "a.pdf").write_bytes(content)
    with pytest.raises(ImageError, match=r"a\.pdf: cannot be read as a PDF"):
        list_pages(tmp_path / "a.pdf")


def test_without_pypdfium2_the_message_says_how_to_get_it(pdf, monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(UserError, match="pip install pypdfium2"):
        find_images_at([pdf])


def test_files_about_a_page_do_not_overwrite_each_other():
    assert [name_stem(name) for name in ("a.jpg", "a.b.png", "a.pdf#page=2")] == ["a", "a.b", "a.pdf#page=2"]


def test_a_page_is_a_place_and_its_file_is_all_of_them(pdf):
    assert list(find_images_at([page(pdf, 2)]).values()) == [page(pdf, 2)]
    assert list(find_images_at([pdf.parent / "*.pdf"]).values()) == list_pages(pdf)


# ---- hostile PDF files


def pdf_of_objects(*objects):
    """A PDF of these objects, numbered from 1; the first is the catalog."""
    data, places = b"%PDF-1.7\n", []
    for number, content in enumerate(objects, start=1):
        places.append(len(data))
        data += f"{number} 0 obj\n{content}\nendobj\n".encode()
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    start, size = len(data), len(objects) + 1
    return (
        data
        + f"xref\n0 {size}\n0000000000 65535 f \n{table}trailer\n<</Size {size}/Root 1 0 R>>\n".encode()
        + (f"startxref\n{start}\n%%EOF".encode())
    )


def stream(content, entries=""):
    return f"<<{entries}/Length {len(content)}>>\nstream\n{content}\nendstream"


def pdf_of_pages(count, claimed=None):
    """A PDF of small pages, each with the number of points wide that it is in the file, from 100."""
    kids = " ".join(f"{3 + i} 0 R" for i in range(count))
    pages = [f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 {100 + i} 50]>>" for i in range(count)]
    root = f"<</Type/Pages/Kids[{kids}]/Count {claimed or count}>>"
    return pdf_of_objects("<</Type/Catalog/Pages 2 0 R>>", root, *pages)


def pdf_of_nested_forms(depth, times):
    """A page that draws a form, which draws another so many times, and so on."""
    forms = []
    for level in range(depth):
        drawn = "/F Do " * times if level < depth - 1 else "0 0 1 1 re f"
        inner = f"/Resources<</XObject<</F {5 + level} 0 R>>>>" if level < depth - 1 else ""
        forms.append(stream(drawn, f"/Type/XObject/Subtype/Form/BBox[0 0 100 100]{inner}"))
    page = "<</Type/Page/Parent 2 0 R/MediaBox[0 0 100 100]/Contents 4 0 R/Resources<</XObject<</F 5 0 R>>>>>>"
    forms_from_5 = [forms[0].replace("/F 5 0 R", "/F 6 0 R")] + [
        form.replace(f"/F {5 + i} 0 R", f"/F {6 + i} 0 R") for i, form in enumerate(forms[1:], start=1)
    ]
    tree = "<</Type/Pages/Kids[3 0 R]/Count 1>>"
    return pdf_of_objects("<</Type/Catalog/Pages 2 0 R>>", tree, page, stream("/F Do"), *forms_from_5)


@pytest.mark.parametrize("claimed", [7, 5_000, 1_000_000])
def test_pages_that_are_only_claimed_are_not_listed(tmp_path, capsys, claimed):
    path = tmp_path / "lie.pdf"
    path.write_bytes(pdf_of_pages(2, claimed))
    started = time.process_time()
    assert list_pages(path) == [page(path, 1), page(path, 2)]
    assert f"lie.pdf: says that it has {claimed} pages; 2 can be opened" in capsys.readouterr().out
    assert time.process_time() - started < CASE_SECONDS  # of this process; the other has a limit of its own


def test_a_pdf_without_a_page_is_named(tmp_path):
    (tmp_path / "a.pdf").write_bytes(pdf_of_objects("<</Type/Catalog/Pages 2 0 R>>", "<</Type/Pages/Kids[]/Count 9>>"))
    with pytest.raises(ImageError, match="has no page that can be opened"):
        list_pages(tmp_path / "a.pdf")


def test_a_page_that_does_not_end_or_breaks_pdfium_ends_alone(tmp_path, pdf, monkeypatch):
    bomb = tmp_path / "bomb.pdf"
    bomb.write_bytes(pdf_of_nested_forms(12, 40))
    read_size(page(pdf, 1))  # from here on the process runs
    with monkeypatch.context() as patch, ThreadPoolExecutor(4) as pool:
        patch.setattr(images, "_PAGE_SECONDS", 2)
        broken = pool.submit(read_image, page(bomb, 1))
        waiting = [pool.submit(read_size, page(pdf, 1)) for _ in range(3)]
        with pytest.raises(ImageError, match=r"bomb\.pdf#page=1: takes more than 2 s or 3 GB to render, or breaks"):
            broken.result()
        assert {each.result() for each in waiting} == {(WIDTH, HEIGHT)}
    assert read_image(page(pdf, 1))[1] == (WIDTH, HEIGHT)
    images._renderer(os.getpid())[0].kill()  # as PDFium's own abort does
    with pytest.raises(ImageError, match="breaks PDFium"):
        read_size(page(pdf, 1))
    assert read_size(page(pdf, 1)) == (WIDTH, HEIGHT)


def test_an_answer_that_was_not_waited_for_is_not_taken_for_the_next_one(pdf, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(json, "loads", interrupt)
        read_image(page(pdf, 1))
    assert read_size(page(pdf, 3)) == (3000, 2000)


def test_all_pages_of_a_file_are_read_from_one_opening(tmp_path):
    """Opened anew for each page, a file of many takes a time that grows with their square."""
    path = tmp_path / "long.pdf"
    path.write_bytes(pdf_of_pages(3000))
    pages = list_pages(path)
    assert len(pages) == 3000
    for number in (2999, 0, 1500, *range(2000, 2300)):
        assert read_image(pages[number], 32)[1][0] == -(-(100 + number) * images.DPI // 72)


# ---- pages of TIFF files


@pytest.fixture
def tiff(tmp_path) -> Path:
    """Three pages: red, green, blue."""
    first, second, third = (Image.new("RGB", (60, 40), color) for color in ("red", "lime", "blue"))
    path = tmp_path / "fax, 팩스.TIF"
    first.save(path, "TIFF", save_all=True, append_images=[second, third], compression="tiff_lzw")
    return path


def test_each_page_of_a_tiff_is_an_image(tiff, tmp_path):
    pages = list_pages(tiff)
    assert [path.name for path in pages] == [f"{tiff.name}#page={number}" for number in (1, 2, 3)]
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    for path, color in [*zip(pages, colors, strict=True)][::-1] * 2:
        assert read_size(path) == (60, 40)
        pixels, size = read_image(path)
        assert size == pixels.shape[1::-1] == read_size(path) and (pixels == color).all()
    assert (read_image(tiff)[0] == colors[0]).all()
    one = tmp_path / "one.tif"
    Image.new("L", (8, 6)).save(one)
    assert list_pages(one) == [one] and read_size(page(one, 1)) == read_size(page(one, 1)) == (8, 6)
    for number in (0, 4):
        with pytest.raises(ImageError, match="no such page; the file has 3"):
            read_image(page(tiff, number))


def test_a_page_that_is_turned_has_the_size_of_its_pixels_however_often_it_is_read(tmp_path):
    path = tmp_path / "a.tif"
    other = Image.new("L", (30, 20))
    Image.new("RGB", (60, 40)).save(path, save_all=True, append_images=[other], tiffinfo={274: 6})
    for number, expected in ((1, (40, 60)), (2, (20, 30)), (1, (40, 60))):
        for _ in range(2):
            pixels, size = read_image(page(path, number))
            assert pixels.shape[1::-1] == size == read_size(page(path, number)) == expected


def test_a_broken_page_of_a_tiff_is_named_and_the_others_are_read(tmp_path):
    path = tmp_path / "a.tif"
    noise = [Image.effect_noise((64, 64), 50) for _ in range(2)]
    noise[0].save(path, save_all=True, append_images=noise[1:])
    data = path.read_bytes()
    assert len(list_pages(path)) == 2
    path.write_bytes(data[:5000])
    assert list_pages(path) == [page(path, 1), page(path, 2)]
    assert read_image(page(path, 1))[1] == (64, 64)
    with pytest.raises(ImageError, match=r"a\.tif"):
        read_image(page(path, 2))


def test_pages_behind_a_broken_place_of_a_tiff_are_said_to_be_lost(tiff, capsys):
    data, places = tiff.read_bytes(), [4]
    while (first := int.from_bytes(data[places[-1] : places[-1] + 4], "little")) and len(places) < 9:
        places.append(first + 2 + 12 * int.from_bytes(data[first : first + 2], "little"))
    assert len(places) == 4 and capsys.readouterr().out == ""
    first, beyond = data[4:8], (1 << 24).to_bytes(4, "little")
    lost = "broken behind page {}; pages that come after it are lost"
    for index, target, pages in ((2, first, 2), (3, first, 3), (2, beyond, 2), (3, beyond, 3), (1, beyond, 1)):
        place = places[index]
        tiff.write_bytes(data[:place] + target + data[place + 4 :])
        images._walk_pages.cache_clear()
        found = find_images_at([tiff.parent])
        said = capsys.readouterr().out
        assert len(found) == pages and lost.format(pages) in said and said.count("\n") == 1
        assert read_image(page(tiff, pages))[1] == read_image(tiff)[1]


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("tag", [258, 259])  # bits of a sample, compression
def test_a_page_of_a_tiff_of_an_unknown_kind_leaves_the_others(tiff, number, tag, capsys):
    data, place = bytearray(tiff.read_bytes()), 4
    for _ in range(number):
        directory = int.from_bytes(data[place : place + 4], "little")
        place = directory + 2 + 12 * int.from_bytes(data[directory : directory + 2], "little")
    entry = next(at for at in range(directory + 2, place, 12) if int.from_bytes(data[at : at + 2], "little") == tag)
    data[entry + 4 : entry + 12] = (1).to_bytes(4, "little") + (7777).to_bytes(4, "little")
    tiff.write_bytes(data)
    assert list_pages(tiff) == [page(tiff, each) for each in (1, 2, 3)]
    for each in (1, 2, 3):
        if each == number:
            with pytest.raises(ImageError, match=rf"{tiff.name}#page={number}: broken"):
                read_image(page(tiff, each))
        else:
            read_image(page(tiff, each))
    assert capsys.readouterr().out == ""


def test_a_file_of_several_pictures_that_are_no_pages_is_said(tmp_path, capsys):
    def save(name, kind):
        first, *others = (Image.new("RGB", (30, 20), color) for color in ("red", "lime", "blue"))
        first.save(tmp_path / name, kind, save_all=True, append_images=others)

    kinds = {"a.gif": "GIF", "a.webp": "WEBP", "a.png": "PNG", "scan.jpg": "TIFF", "scan.PNG": "TIFF"}
    for name, kind in kinds.items():
        save(name, kind)
    Image.new("RGB", (30, 20)).save(tmp_path / "one.gif")
    Image.new("RGB", (30, 20)).save(tmp_path / "one.png")
    save("phone.jpg", "MPO")  # as phones add a preview
    (tmp_path / "broken.gif").write_bytes(b"GIF89a" + bytes(20))
    assert len(find_images_at([tmp_path])) == 9
    said = capsys.readouterr().out.splitlines()
    assert sorted(said) == sorted(
        f"{tmp_path / name}: holds several pictures; only the first is read" for name in kinds
    )


def test_pages_are_trained_on_and_scored_like_images(tmp_path, pdf, tiff):
    names = [f"{pdf.name}#page=2", f"{tiff.name}#page=2", tiff.name]
    for split in ("train", "val"):
        folder = tmp_path / "data" / "images" / split
        folder.mkdir(parents=True)
        for path in (pdf, tiff):
            (folder / path.name).write_bytes(path.read_bytes())
        (tmp_path / "data" / "jsons").mkdir(exist_ok=True)
        words = {"words": {"1": {"points": [[5, 5], [35, 5], [35, 20], [5, 20]]}}}
        content = {"images": dict.fromkeys(names, words)}
        (tmp_path / "data" / "jsons" / f"{split}.json").write_text(json.dumps(content))
    config = Config(data=str(tmp_path / "data"), image_size=64, flip_p=0.0)
    assert list(read_split(config.data, "val").images) == [*names[:2], f"{tiff.name}#page=1"]
    dataset = TextDataset(config, "train", train=True)
    for _ in range(2):  # decoded, then from the cache
        assert [dataset[i]["image"][10, 10].argmax() for i in (1, 2)] == [1, 0]
        assert all(dataset[i]["prob_map"].any() for i in range(3))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of a process is not known here")
def test_a_page_that_the_users_memory_limit_keeps_from_rendering_is_a_lack_of_memory(tmp_path):
    """Such a limit holds for the process that renders too."""
    Image.new("L", (9000, 9000), 128).save(tmp_path / "large.pdf", resolution=DPI)
    code = f"""
import resource
from pathlib import Path
from dbnet import images
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20),) * 2)
try:
    images.read_image(Path({str(tmp_path)!r}) / "large.pdf#page=1")
except MemoryError as error:
    print("no memory")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "no memory\n", result.stderr


def test_a_page_of_a_tiff_is_found_without_a_walk_over_those_before(tmp_path, monkeypatch):
    path = tmp_path / "long.tif"
    first, *others = [Image.new("L", (8, 8), number) for number in range(40)]
    first.save(path, save_all=True, append_images=others)
    steps = []
    seek = TiffImageFile._seek
    monkeypatch.setattr(TiffImageFile, "_seek", lambda image, frame: (steps.append(frame), seek(image, frame))[1])
    assert [int(read_image(page)[0][0, 0, 0]) for page in list_pages(path)] == list(range(40))
    assert len(steps) < 5 * 40


def test_a_pdf_has_no_more_pages_than_bytes(tmp_path):
    """Its tree of pages names the same page a million times."""
    kids = "\n".join(
        f"{n} 0 obj<</Type/Pages/Count {10 ** (8 - n)}/Kids[{f'{n + 1} 0 R ' * 10}]>>endobj" for n in range(2, 8)
    )
    page = "8 0 obj<</Type/Page/Parent 7 0 R/MediaBox[0 0 9 9]>>endobj"
    path = tmp_path / "again.pdf"
    path.write_text(f"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n{kids}\n{page}\ntrailer<</Root 1 0 R>>\n")
    assert 0 < len(list_pages(path)) <= path.stat().st_size


def test_a_named_page_is_not_called_the_first_picture_and_an_animation_by_the_suffix_of_a_tiff_is(tiff, capsys):
    assert len(find_images_at([page(tiff, 2), page(tiff, 3)])) == 2 and capsys.readouterr().out == ""
    moving = tiff.with_name("moving.tif")
    Image.new("RGB", (9, 9), "red").save(moving, "GIF", save_all=True, append_images=[Image.new("RGB", (9, 9))])
    assert find_images_at([moving]) == {moving.name: moving}
    assert capsys.readouterr().out == f"{moving}: holds several pictures; only the first is read\n"
