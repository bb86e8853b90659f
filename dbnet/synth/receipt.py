"""The print of a receipt: `compose_receipt` makes rows of text and graphics from the words of a language, and
`print_sheet` prints them on a flat sheet, with the box of each word. `scene` photographs or scans the sheet."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace as Vocabulary
from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFont

from dbnet.errors import library_errors

WORD_MARGIN = 0.06  # between ink and polygon, in font sizes, as annotators leave it
FIXED_PITCH = 0.62  # width of a letter's cell in fixed-pitch print, in font sizes
FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "/Library/Fonts", "C:/Windows/Fonts")
FONT_NAMES = ("DejaVuSans", "DejaVuSerif", "Liberation", "FreeSans", "FreeMono", "Arial", "cour", "Courier New")

_VOCABULARIES = json.loads(Path(__file__).with_name("vocabularies.json").read_text(encoding="utf-8"))
LATIN, KOREAN = (Vocabulary(**_VOCABULARIES[name]) for name in ("latin", "korean"))
"""Words of a language: `columns` are alternative headings of the table of items (name, quantity, unit price, amount),
`sums` alternative labels of subtotal, tax, total, payment and change, `syllables` parts of made-up names."""


class Cell(NamedTuple):
    """Text between two positions across the sheet (fractions of the print width); align 0 left, 0.5 centre, 1 right."""

    text: str
    left: float = 0.0
    right: float = 1.0
    align: float = 0.0


class Row(NamedTuple):
    """A line of print, a graphic, or a gap (with neither). `scale`: height in lines of body text."""

    cells: tuple[Cell, ...] = ()
    scale: float = 1.0
    bold: bool = False
    inverted: bool = False
    graphic: Callable[[Generator, np.ndarray], None] | None = None


def pick(rng: Generator, options: Sequence):
    """One of `options`, without rng.choice's conversion to an array."""
    return options[int(rng.integers(len(options)))]


def chance(rng: Generator, probability: float) -> bool:
    return bool(rng.random() < probability)


def digits(rng: Generator, *patterns: str) -> str:
    """One of `patterns` with each # replaced by a random digit: "Tel ##-### ####"."""
    return "".join(str(rng.integers(10)) if letter == "#" else letter for letter in pick(rng, patterns))


def made_up_name(rng: Generator, words: Vocabulary) -> str:
    return "".join(pick(rng, words.syllables) for _ in range(rng.integers(2, 4))).capitalize()


def money(rng: Generator, words: Vocabulary, largest: float = 100) -> str:
    amount = largest * rng.random() ** 2 + 0.5
    return f"{amount:,.2f}" if words.cents else f"{int(amount * 100) * 10:,}"


def compose_header(rng: Generator, words: Vocabulary) -> list[Row]:
    """Logo, shop name, address, phone, date and the numbers of the sale."""
    align = pick(rng, (0.5, 0.5, 0.5, 0.0))
    rows = [Row(graphic=draw_logo, scale=rng.uniform(2.5, 5)), Row(scale=0.4)] if chance(rng, 0.3) else []
    shop = f"{made_up_name(rng, words)} {pick(rng, words.shops)}"
    rows.append(Row((Cell(shop, align=align),), rng.uniform(1.2, 2.8), chance(rng, 0.6), chance(rng, 0.12)))
    for _ in range(rng.integers(1, 4)):
        place = f"{digits(rng, '#', '##,', 'No.##')} {pick(rng, words.places)}, {digits(rng, '#####')}"
        rows.append(Row((Cell(place, align=align),)))
    phone = digits(rng, "Tel: ##-### ####", "TEL ###-####-####", "(###) ###-####  Fax:##-#######")
    rows += [Row((Cell(phone, align=align),)), Row(scale=rng.uniform(0.3, 1))]
    date = digits(rng, "202#-1#-1#", "1#/0#/202#", "2#.1#.2#") + digits(rng, " 1#:3#", " 0#:1#:2# PM")
    rows.append(Row((Cell(date, 0, 0.66), Cell(digits(rng, "No. ####", "####"), 0.66, 1, 1.0))))
    for _ in range(rng.integers(0, 5)):
        value = pick(rng, (digits(rng, "######", "###-##-#####"), made_up_name(rng, words)))
        edge, side = pick(rng, ((0.35, 0.0), (0.45, 1.0)))
        rows.append(Row((Cell(pick(rng, words.fields), 0, edge), Cell(value, edge, 1, side))))
    return rows


def compose_items(rng: Generator, words: Vocabulary, line_count: float) -> list[Row]:
    """The table of items in about `line_count` lines: at least one item, each in one or two lines."""
    one_line, gap = chance(rng, 0.6), pick(rng, (0.0, 0.0, 0.3))
    edges = (0, 0.48, 0.58, 0.79, 1) if one_line else (0, 0.35, 0.52, 0.76, 1)

    def table_row(texts: Sequence[str], **look) -> Row:
        return Row(tuple(map(Cell, texts, edges[:-1], edges[1:], (0.0, 1.0, 1.0, 1.0))), **look)

    rule = Row(graphic=pick(rng, (draw_rule, draw_dashes)), scale=0.6)
    head = table_row(pick(rng, words.columns), bold=chance(rng, 0.4), inverted=chance(rng, 0.12))
    rows, used = [rule, head, rule], 2.2
    while used < line_count or len(rows) == 3:
        name = f"{made_up_name(rng, words)} {pick(rng, words.items)}" if chance(rng, 0.5) else pick(rng, words.items)
        numbers = digits(rng, "1", "2", "#", "1#"), money(rng, words), money(rng, words)
        if one_line:
            rows.append(table_row((name, *numbers)))
        else:
            rows += [Row((Cell(name),)), table_row((digits(rng, "#######", "###########"), *numbers))]
        rows.append(Row(scale=gap))
        used += (1 if one_line else 2) + gap
    return [*rows, rule]


def compose_sums(rng: Generator, words: Vocabulary) -> list[Row]:
    """Subtotal, tax, total, payment and change; the total may be large, bold or inverted."""
    currency, left = pick(rng, words.currencies), pick(rng, (0.0, 0.0, 0.2))
    look = {"scale": pick(rng, (1.0, 1.2, 1.5, 1.8)), "bold": chance(rng, 0.7), "inverted": chance(rng, 0.15)}
    rows = []
    for kind, labels in enumerate(words.sums):
        cells = Cell(pick(rng, labels), left, 0.64), Cell(currency + money(rng, words, 500), 0.64, 1, 1.0)
        if kind == 2 or chance(rng, 0.85):
            rows.append(Row(cells, **(look if kind == 2 else {})))
    return rows


def compose_footer(rng: Generator, words: Vocabulary) -> list[Row]:
    """Payment details, notes, small print, a barcode or a matrix code."""
    rows = [Row(graphic=pick(rng, (draw_rule, draw_dashes)) if chance(rng, 0.5) else None, scale=0.6)]
    for _ in range(pick(rng, (0, 0, 2, 4))):
        cells = Cell(pick(rng, words.fields), 0, 0.5), Cell(digits(rng, "########", "#### **** ##"), 0.5, 1, 1.0)
        rows.append(Row(cells, scale=0.9))
    rows += [Row((Cell(pick(rng, words.notes), align=0.5),)) for _ in range(rng.integers(1, 4))]
    if chance(rng, 0.35):
        text = " ".join(pick(rng, words.notes) for _ in range(rng.integers(3, 7)))
        rows.append(Row((Cell(text),), scale=rng.uniform(0.65, 0.85)))
    if chance(rng, 0.4):
        rows += [Row(scale=0.5), Row(graphic=draw_barcode, scale=rng.uniform(1.5, 3))]
        rows.append(Row((Cell(digits(rng, "#############", "# ###### ######"), align=0.5),), scale=0.8))
    elif chance(rng, 0.3):
        rows += [Row(scale=0.5), Row(graphic=draw_matrix_code, scale=rng.uniform(3, 6))]
    return rows


def compose_receipt(rng: Generator, words: Vocabulary, line_count: float) -> list[Row]:
    """The rows of a receipt of 70 to 100% of `line_count` lines, or more if its fixed parts and one item need more."""
    head, sums, foot = compose_header(rng, words), compose_sums(rng, words), compose_footer(rng, words)
    fixed = sum(row.scale for row in (*head, *sums, *foot))
    rows = head + compose_items(rng, words, line_count * rng.uniform(0.7, 1.0) - fixed) + sums + foot
    if chance(rng, 0.5):
        rows = [row._replace(cells=tuple(cell._replace(text=cell.text.upper()) for cell in row.cells)) for row in rows]
    return rows


# ---- graphics, drawn into empty ink (height, width) uint8: 255 where something is printed


def draw_rule(rng: Generator, ink: np.ndarray) -> None:
    for y in (np.linspace(0.4, 0.6, rng.integers(1, 3)) * len(ink)).astype(int):
        ink[y : y + max(1, len(ink) // 12)] = 255


def draw_dashes(rng: Generator, ink: np.ndarray) -> None:
    period = max(4, round(len(ink) * rng.uniform(0.4, 1.2)))
    dashes = np.arange(ink.shape[1]) % period < period * rng.uniform(0.3, 0.8)
    draw_rule(rng, ink)
    ink *= dashes


def draw_marks(rng: Generator, ink: np.ndarray) -> None:
    """A row of asterisks, dashes or the like: print that is not text."""
    height, width = ink.shape
    row, thickness = pick(rng, "*-=_.#") * math.ceil(width / (0.6 * height)), 1 + height // 24
    cv2.putText(ink, row, (0, height * 3 // 4), cv2.FONT_HERSHEY_SIMPLEX, height / 30, 255, thickness, cv2.LINE_AA)


def draw_barcode(rng: Generator, ink: np.ndarray) -> None:
    width = ink.shape[1]
    bars = np.repeat(rng.random(int(rng.integers(50, 96))) < 0.5, max(1, width // 130)).astype(np.uint8) * 255
    left = (width - min(len(bars), width)) // 2
    ink[:, left : left + len(bars)] = bars[:width]


def draw_matrix_code(rng: Generator, ink: np.ndarray) -> None:
    modules = (rng.random((25, 25)) < 0.5).astype(np.uint8) * 255
    finder = np.pad(np.pad(np.full((3, 3), 255, np.uint8), 1), 1, constant_values=255)
    modules[:7, :7] = modules[:7, -7:] = modules[-7:, :7] = finder
    side, left = min(ink.shape), (ink.shape[1] - min(ink.shape)) // 2
    ink[:side, left : left + side] = cv2.resize(modules, (side, side), interpolation=cv2.INTER_NEAREST)


def draw_logo(rng: Generator, ink: np.ndarray) -> None:
    """One to three shapes on top of each other around the middle."""
    height, width = ink.shape
    for shade in (255, 0, 255)[: rng.integers(1, 4)]:
        axes = (int(height * rng.uniform(0.2, 0.9)), int(height * rng.uniform(0.15, 0.45)))
        centre = (width // 2 + int(rng.normal(0, height / 4)), height // 2)
        if chance(rng, 0.5):
            cv2.ellipse(ink, centre, axes, 0, 0, 360, shade, pick(rng, (-1, 2, 3)), cv2.LINE_AA)
        else:
            angles = np.sort(rng.uniform(0, 2 * math.pi, rng.integers(3, 8)))
            points = centre + np.stack([np.cos(angles), np.sin(angles)], 1) * axes
            cv2.fillPoly(ink, [points.astype(np.int32)], shade, cv2.LINE_AA)


class Typeface(NamedTuple):
    """A font file ("" for Pillow's own) and its use in print."""

    path: str
    fixed_pitch: bool  # every glyph in a cell of the same width, as thermal printers do
    stretch: float  # width of the glyphs relative to the font's


@lru_cache(maxsize=256)
def load_font(path: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font at `size` pixels. Raises UserError for a file that is missing or not a font."""
    if not path:
        return ImageFont.load_default(size)
    with library_errors(f"--font {path}: cannot be used", "give a .ttf or .otf file"):
        return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=64)
def has_glyph(path: str, letter: str) -> bool:
    """Whether the font has `letter`: whether it draws another picture than for a code point that no font has."""
    font = load_font(path, 32)
    return bytes(font.getmask(letter)) not in (b"", bytes(font.getmask("\U0010fffe")))


@lru_cache(maxsize=1)
def system_fonts() -> tuple[str, ...]:
    """Plain text fonts in the usual folders of this machine, if there are any."""
    found = (path for folder in FONT_FOLDERS for path in sorted(Path(folder).rglob("*.ttf")))
    return tuple(str(path) for path in found if path.name.startswith(FONT_NAMES))


def choose_print(rng: Generator, fonts: Sequence[str], others: Sequence[str]) -> tuple[Typeface, Vocabulary]:
    """A typeface (in 3 of 4 receipts one of `fonts`, if given; else Pillow's own or one of `others`) and its words."""
    path = pick(rng, fonts) if fonts and chance(rng, 0.75) else pick(rng, ("", *others))
    fixed_pitch = not path and chance(rng, 0.5)
    face = Typeface(path, fixed_pitch, stretch=rng.uniform(0.75, 1.0 if fixed_pitch else 1.1))
    return face, KOREAN if has_glyph(path, "가") and chance(rng, 0.8) else LATIN


@lru_cache(maxsize=4096)
def word_ink(face: Typeface, size: int, bold: bool, text: str) -> tuple[np.ndarray, int]:
    """The ink (height, width) of a word, cropped to it, and the row of its top relative to the baseline (negative)."""
    font = load_font(face.path, size)
    pitch = round(size * FIXED_PITCH) if face.fixed_pitch else 0
    length = pitch * len(text) if pitch else math.ceil(font.getlength(text))
    canvas = Image.new("L", (length + 2 * size, 3 * size))
    pen = ImageDraw.Draw(canvas)
    if pitch:
        for position, letter in enumerate(text):
            pen.text((size + (position + 0.5) * pitch, 2 * size), letter, 255, font, anchor="ms")
    else:
        pen.text((size, 2 * size), text, 255, font, anchor="ls")
    ink = cv2.resize(np.asarray(canvas), None, fx=face.stretch, fy=1.0, interpolation=cv2.INTER_AREA)
    if bold:  # printed twice, a little to the right
        strike = max(1, round(size / 16))
        ink[:, strike:] = np.maximum(ink[:, strike:], ink[:, :-strike].copy())
    x, y, width, height = cv2.boundingRect(ink)
    return ink[y : y + height, x : x + width], y - 2 * size


@dataclass
class Sheet:
    """Print on flat paper: (height, width) uint8 ink; each cell's words: text and box x0, y0, x1, y1 in pixels."""

    ink: np.ndarray
    cells: list[list[tuple[str, np.ndarray]]] = field(default_factory=list)

    def labels(self, lines: bool) -> list[tuple[str, np.ndarray]]:
        """Text and box of each word or, with `lines`, of all words of each cell together."""
        if not lines:
            return [word for cell in self.cells for word in cell]
        return [(" ".join(text for text, _ in cell), enclosing_box([box for _, box in cell])) for cell in self.cells]


def enclosing_box(boxes: Sequence) -> np.ndarray:
    """x0, y0, x1, y1 around all of `boxes` (n, 4)."""
    return np.concatenate([np.min(boxes, axis=0)[:2], np.max(boxes, axis=0)[2:]])


def print_row(sheet: Sheet, row: Row, face: Typeface, size: int, band: tuple[int, int, int, int]) -> str:
    """Print the cells of `row` into a band x0, y0, x1, y1 of the sheet; return text that did not fit the last cell."""
    x0, y0, x1, y1 = band
    if row.inverted:
        sheet.ink[y0:y1, x0:x1] = 255
    padding = size // 3 if row.inverted else 0
    across, baseline = x1 - x0 - 2 * padding, (y0 + y1 + round(size * 0.66)) // 2
    space = max(3, round(size * face.stretch * (0.6 if face.fixed_pitch else 0.32)))
    margin = (WORD_MARGIN * size + 0.5) * np.array((-1, -1, 1, 1))
    for cell in row.cells:
        room = (cell.right - cell.left) * across - (size * 0.4 if cell.right < 1 else 0)
        rest, width, words = cell.text.split(), 0, list[tuple[str, np.ndarray, np.ndarray]]()
        while rest:
            ink, rise = word_ink(face, size, row.bold, rest[0])
            left = width + space if words else 0
            if ink.size == 0 or left + ink.shape[1] > room:
                break
            width = left + ink.shape[1]
            words.append((rest.pop(0), ink, np.array((left, rise, width, rise + ink.shape[0]))))
        origin = (round(x0 + padding + cell.left * across + cell.align * (room - width)), baseline) * 2
        for _, ink, box in words:
            left, top, right, bottom = box + origin
            spot = sheet.ink[top:bottom, left:right]
            spot[:] = spot - np.minimum(ink, spot) if row.inverted else np.maximum(spot, ink)
        sheet.cells += [[(text, box + origin + margin) for text, _, box in words]] if words else []
    return " ".join(rest) if words else ""


def print_sheet(rng: Generator, width: int, height: int, face: Typeface, words: Vocabulary, varied: bool) -> Sheet:
    """Print a receipt on a sheet `width` pixels wide and at most `height` high; rows that do not fit are left out."""
    sample = "Grand Total 12,345.67 abc"
    letter = FIXED_PITCH if face.fixed_pitch else load_font(face.path, 100).getlength(sample) / 100 / len(sample)
    size = max(8, round(width / rng.uniform(34, 62) / (letter * face.stretch)))
    leading = rng.uniform(0.95, 1.1) if varied and chance(rng, 0.3) else rng.uniform(1.1, 1.5)
    margin = top = max(4, round(width * rng.uniform(0.03, 0.1)))
    sheet = Sheet(np.zeros((height, width), np.uint8))
    rows = compose_receipt(rng, words, (height - 2 * margin) / (size * leading))[::-1]
    for _ in range(rng.integers(0, 5) if varied else 0):
        rows.insert(int(rng.integers(len(rows))), Row(graphic=pick(rng, (draw_marks, draw_rule)), scale=0.8))
    while rows:
        row = rows.pop()
        row_size = max(7, round(size * row.scale))
        bottom = top + round((row_size if row.cells else size * row.scale) * leading)
        if bottom + margin > height:
            break
        if row.graphic:
            row.graphic(rng, sheet.ink[top:bottom, margin : width - margin])
        elif row.cells:
            rest = print_row(sheet, row, face, row_size, (margin, top, width - margin, bottom))
            if rest and len(row.cells) == 1:
                rows.append(row._replace(cells=(row.cells[0]._replace(text=rest),)))
        top = bottom
    sheet.ink = sheet.ink[: top + margin]
    return sheet
