"""Synthetic receipts: images that look photographed or scanned, with exact word polygons, any number from a seed.

    python -m dbnet.synth --out data/synth --train 200 --val 20 --test 10 --size 640 --seed 0 [--font Korean.ttf]

An image comes about in the order of this file: `compose_receipt` says what the receipt reads, `print_page` sets it in
ink on a flat page and knows the box of each word, `develop` turns ink into coloured paper, `place` chooses one
homography for the pixels and the word boxes, `photograph` or `scan` puts the paper into its scene, and `degrade` is
the camera: blur, noise, JPEG. All sizes follow `size`, so 640 and 1024 show the same kind of receipt.

The same seed gives the same words, layout and pixels on the same machine, for any number of workers. Another machine
may have other fonts (`system_fonts`) or another Pillow, and then it differs; Pillow's own font is enough to run.
"""

import argparse
import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from dbnet.errors import UserError, run_script

SPLITS = ("train", "val", "test")
SCAN_SHARE = 1 / 3  # of the images are flat scans, the others photographs
WORD_MARGIN = 0.06  # between ink and polygon, in font sizes: what an annotator leaves
FIXED_PITCH = 0.62  # width of a cell of the printer, in font sizes
MIN_CONTRAST = 24  # grey levels between ink and paper; fainter print is marked illegible
MIN_SIZE = 128  # of an image's long side: below it no line of print can be read
FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "/Library/Fonts", "C:/Windows/Fonts")
FONT_NAMES = ("DejaVuSans", "DejaVuSerif", "Liberation", "FreeSans", "FreeMono", "Arial", "cour", "Courier New")

Word = tuple[np.ndarray, str, bool]  # polygon (4, 2), transcription, illegible
Frame = tuple[int, int]  # width, height of the image


# ---- what a receipt says


def phrases(text: str) -> tuple[str, ...]:
    return tuple(text.split("|"))


@dataclass(frozen=True)
class Vocabulary:
    """The words of receipts in one language."""

    shops: tuple[str, ...]
    places: tuple[str, ...]
    items: tuple[str, ...]
    notes: tuple[str, ...]
    columns: tuple[tuple[str, ...], ...]
    """Heads of the table of items: name, quantity, unit price, amount; one of the tuples is taken."""
    fields: tuple[str, ...]
    """What a line of the header may name: a counter, a cashier, a number."""
    sums: tuple[tuple[str, ...], ...]
    """Subtotal, tax, total, payment, change: alternatives for each."""
    syllables: tuple[str, ...]
    """For made-up names, so that a detector cannot learn the list by heart."""
    cents: bool
    currencies: tuple[str, ...]


LATIN = Vocabulary(
    shops=phrases("Market|Cafe|Bakery|Trading Sdn Bhd|Hardware & Tools|Pharmacy|Books|Enterprise|Mini Mart|Grill"),
    places=phrases("Main Street|Jalan Besar|Park Avenue|Station Rd.|Taman Maju|Lot 12-A|High St|5th Floor"),
    items=phrases(
        "Milk 1L|Brown Bread|Coffee (L)|AA Battery x4|Green Tea|Olive Oil 500ml|Rice 5kg|Chicken Set|A4 Paper|Notebook|"
        "USB Cable 2m|Eggs 10pcs|Orange Juice|Soap|LED Bulb 9W|Paint Brush 2in|Iced Latte|Plastic Bag|Tape 48mm|Set #3"
    ),
    notes=phrases(
        "Thank you, please come again!|Goods sold are not returnable|Exchange within 7 days with receipt|Customer copy|"
        "Strictly no cash refund|Prices include service tax|Follow us at www.shop.example|*** Have a nice day :) ***|"
        "Please keep this receipt for your records|Opening hours 08:00 - 22:00"
    ),
    columns=(phrases("Item|Qty|Price|Amount"), phrases("Description|Qty|U/P|Total"), phrases("ITEM|#|@|AMT(RM)")),
    fields=phrases("Cashier:|Counter|Bill No:|Table|Ref.|Invoice #|Terminal ID|Member|GST ID :|Order"),
    sums=(
        phrases("Subtotal|Sub Total :|Total Excl. Tax"),
        phrases("Tax|GST 6% :|VAT 20%|Service Charge (10%)"),
        phrases("TOTAL|Grand Total :|Amount Due|Total (Inclusive of GST)"),
        phrases("Cash|VISA|Card Payment :|MASTERCARD **** 4021"),
        phrases("Change|CHANGE DUE :|Balance|Rounding Adj."),
    ),
    syllables=phrases("ba|ker|lin|mo|sa|ton|vi|rel|dun|hu|an|go|tes|pra|il|wen|cho|ris|mar|el|fu"),
    cents=True,
    currencies=("", "", "$", "RM", "EUR ", "£"),
)

KOREAN = Vocabulary(
    shops=phrases("마트|편의점|식당|커피|베이커리|약국|서점|치킨|문구|정육점|분식|주식회사"),
    places=phrases("서울특별시 강남구|경기도 성남시 분당구|부산광역시 해운대구|테헤란로 152|중앙로 27번길 3|1층 101호"),
    items=phrases(
        "아메리카노(R)|카페라떼|김치찌개|삼겹살 200g|바나나우유|새우깡|신선한 계란 10구|햇반 210g|생수 2L|두부|비빔밥|"
        "공기밥|콜라 500ml|종량제봉투 20L|A4 용지|칫솔 세트|참치 김밥|식빵|사과 1봉|소주"
    ),
    notes=phrases(
        "감사합니다 또 오세요|교환 및 환불은 7일 이내 영수증 지참|신용카드 매출전표|고객용|부가세 포함 금액입니다|"
        "포인트 적립은 당일에 한합니다|현금영수증 (소득공제)|이용해 주셔서 감사합니다|문의 고객센터 1588-0000"
    ),
    columns=(phrases("상품명|수량|단가|금액"), phrases("메뉴|수량|단가|금액"), phrases("품명|수량|가격|합계")),
    fields=phrases("대표자:|담당자|영수증번호|POS:|테이블|사업자번호:|승인번호|가맹점|주문번호"),
    sums=(
        phrases("과세물품가액|공급가액|소계"),
        phrases("부가세|부 가 세|세액"),
        phrases("합계|총 금 액|결제금액|합 계 금 액"),
        phrases("신용카드|현금|받은금액|카드 결제"),
        phrases("거스름돈|할인금액|포인트"),
    ),
    syllables=phrases("가|나|다|라|한|솔|미|정|우|리|동|네|행|복|빛|새|봄|별|해|온"),
    cents=False,
    currencies=("", "", "₩"),
)


@dataclass(frozen=True)
class Cell:
    """Text between two positions across the page (fractions of the print width); align 0 left, 0.5 centre, 1 right."""

    text: str
    left: float = 0.0
    right: float = 1.0
    align: float = 0.0


@dataclass(frozen=True)
class Row:
    """A line of print, a graphic, or (with neither) a gap. `scale` is its height in lines of body text."""

    cells: tuple[Cell, ...] = ()
    scale: float = 1.0
    bold: bool = False
    inverted: bool = False
    graphic: Callable[[np.random.Generator, int, int], np.ndarray] | None = None
    """Called with (rng, height, width); returns ink (height, width) uint8, 255 = printed."""


def pick(rng: np.random.Generator, options: Sequence):
    """One of `options`; unlike rng.choice it neither copies nor converts them."""
    return options[int(rng.integers(len(options)))]


def chance(rng: np.random.Generator, probability: float) -> bool:
    return bool(rng.random() < probability)


def digits(rng: np.random.Generator, *patterns: str) -> str:
    """One of `patterns` with each # replaced by a random digit: "Tel ##-### ####"."""
    return "".join(str(rng.integers(10)) if letter == "#" else letter for letter in pick(rng, patterns))


def made_up_name(rng: np.random.Generator, words: Vocabulary) -> str:
    return "".join(pick(rng, words.syllables) for _ in range(rng.integers(2, 4))).capitalize()


def money(rng: np.random.Generator, words: Vocabulary, largest: float = 100) -> str:
    amount = largest * rng.random() ** 2 + 0.5
    return f"{amount:,.2f}" if words.cents else f"{int(amount * 100) * 10:,}"


def compose_header(rng: np.random.Generator, words: Vocabulary) -> list[Row]:
    """Logo, shop name, address, phone, date and the numbers of the sale."""
    align = pick(rng, (0.5, 0.5, 0.5, 0.0))

    def line(text: str, **look) -> Row:
        return Row((Cell(text, align=align),), **look)

    rows = [Row(graphic=draw_logo, scale=rng.uniform(2.5, 5)), Row(scale=0.4)] if chance(rng, 0.3) else []
    shop = f"{made_up_name(rng, words)} {pick(rng, words.shops)}"
    rows.append(line(shop, scale=rng.uniform(1.2, 2.8), bold=chance(rng, 0.6), inverted=chance(rng, 0.12)))
    for _ in range(rng.integers(1, 4)):
        rows.append(line(f"{digits(rng, '#', '##,', 'No.##')} {pick(rng, words.places)}, {digits(rng, '#####')}"))
    rows.append(line(digits(rng, "Tel: ##-### ####", "TEL ###-####-####", "(###) ###-####  Fax:##-#######")))
    rows.append(Row(scale=rng.uniform(0.3, 1)))
    date = digits(rng, "202#-1#-1#", "1#/0#/202#", "2#.1#.2#") + digits(rng, " 1#:3#", " 0#:1#:2# PM")
    rows.append(Row((Cell(date, 0, 0.66), Cell(digits(rng, "No. ####", "####"), 0.66, 1, 1.0))))
    for _ in range(rng.integers(0, 5)):
        value = pick(rng, (digits(rng, "######", "###-##-#####"), made_up_name(rng, words)))
        edge, side = pick(rng, ((0.35, 0.0), (0.45, 1.0)))
        rows.append(Row((Cell(pick(rng, words.fields), 0, edge), Cell(value, edge, 1, side))))
    return rows


def compose_items(rng: np.random.Generator, words: Vocabulary, line_count: float) -> list[Row]:
    """The table of items in about `line_count` lines (at least one item), with one or two lines an item."""
    one_line, gap = chance(rng, 0.6), pick(rng, (0.0, 0.0, 0.3))
    edges = (0, 0.48, 0.58, 0.79, 1) if one_line else (0, 0.35, 0.52, 0.76, 1)

    def table_row(texts: Sequence[str], **look) -> Row:
        aligns = (0.0, 1.0, 1.0, 1.0)
        return Row(tuple(map(Cell, texts, edges[:-1], edges[1:], aligns)), **look)

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


def compose_sums(rng: np.random.Generator, words: Vocabulary) -> list[Row]:
    """Subtotal, tax, total, payment and change; the total may be large, bold or inverted."""
    currency, left = pick(rng, words.currencies), pick(rng, (0.0, 0.0, 0.2))
    look = {"scale": pick(rng, (1.0, 1.2, 1.5, 1.8)), "bold": chance(rng, 0.7), "inverted": chance(rng, 0.15)}
    rows = []
    for kind, labels in enumerate(words.sums):
        cells = Cell(pick(rng, labels), left, 0.64), Cell(currency + money(rng, words, 500), 0.64, 1, 1.0)
        if kind == 2:
            rows.append(Row(cells, **look))
        elif chance(rng, 0.85):
            rows.append(Row(cells))
    return rows


def compose_footer(rng: np.random.Generator, words: Vocabulary) -> list[Row]:
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


def compose_receipt(rng: np.random.Generator, words: Vocabulary, line_count: float) -> list[Row]:
    """The rows of a receipt of 70 to 100% of `line_count` lines, where its fixed parts leave room for items."""
    head, sums, foot = compose_header(rng, words), compose_sums(rng, words), compose_footer(rng, words)
    fixed = sum(row.scale for row in (*head, *sums, *foot))
    rows = head + compose_items(rng, words, line_count * rng.uniform(0.7, 1.0) - fixed) + sums + foot
    if chance(rng, 0.5):
        rows = [replace(row, cells=tuple(replace(cell, text=cell.text.upper()) for cell in row.cells)) for row in rows]
    return rows


# ---- ink: (height, width) uint8, 255 where the printer prints


def draw_rule(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    ink = np.zeros((height, width), np.uint8)
    for y in np.linspace(height * 0.4, height * 0.6, rng.integers(1, 3)).astype(int):
        ink[y : y + max(1, height // 12)] = 255
    return ink


def draw_dashes(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    period = max(4, round(height * rng.uniform(0.4, 1.2)))
    dashes = np.arange(width) % period < period * rng.uniform(0.3, 0.8)
    return draw_rule(rng, height, width) * dashes.astype(np.uint8)


def draw_barcode(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    bars = np.repeat(rng.random(int(rng.integers(50, 96))) < 0.5, max(1, width // 130)).astype(np.uint8) * 255
    ink = np.zeros((height, width), np.uint8)
    left = (width - min(len(bars), width)) // 2
    ink[:, left : left + len(bars)] = bars[:width]
    return ink


def draw_matrix_code(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    modules = (rng.random((25, 25)) < 0.5).astype(np.uint8) * 255
    finder = np.pad(np.pad(np.full((3, 3), 255, np.uint8), 1), 1, constant_values=255)
    modules[:7, :7] = modules[:7, -7:] = modules[-7:, :7] = finder
    side = min(height, width)
    ink = np.zeros((height, width), np.uint8)
    left = (width - side) // 2
    ink[:side, left : left + side] = cv2.resize(modules, (side, side), interpolation=cv2.INTER_NEAREST)
    return ink


def draw_logo(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A few filled and hollow shapes on top of each other around the middle."""
    ink = np.zeros((height, width), np.uint8)
    for shade in (255, 0, 255)[: rng.integers(1, 4)]:
        axes = (int(height * rng.uniform(0.2, 0.9)), int(height * rng.uniform(0.15, 0.45)))
        centre = (width // 2 + int(rng.normal(0, height / 4)), height // 2)
        if chance(rng, 0.5):
            cv2.ellipse(ink, centre, axes, 0, 0, 360, shade, pick(rng, (-1, 2, 3)), cv2.LINE_AA)
        else:
            angles = np.sort(rng.uniform(0, 2 * math.pi, rng.integers(3, 8)))
            points = np.array(centre) + np.stack([np.cos(angles) * axes[0], np.sin(angles) * axes[1]], 1)
            cv2.fillPoly(ink, [points.astype(np.int32)], shade, cv2.LINE_AA)
    return ink


@dataclass(frozen=True)
class Typeface:
    """A font file ("" for Pillow's own) and how the printer uses it."""

    path: str
    fixed_pitch: bool
    """Set every glyph in a cell of the same width, as thermal printers do."""
    stretch: float
    """Width of the glyphs relative to the font's."""


@lru_cache(maxsize=256)
def load_font(path: str, size: int) -> ImageFont.FreeTypeFont:
    """The font at `size` pixels. Raises UserError for a file that is missing or no font."""
    try:
        if not path:
            return ImageFont.load_default(size)
        return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        reason = "it does not exist" if not Path(path).is_file() else str(error)
        raise UserError(f"--font {path}: cannot be used ({reason}); give a .ttf or .otf file") from None
    except ImportError:
        raise UserError("this Pillow has no FreeType; mend: pip install --force-reinstall 'Pillow>=10.1'") from None


@lru_cache(maxsize=64)
def has_glyph(path: str, letter: str) -> bool:
    """Whether the font draws `letter` in another way than a code point that no font has."""
    font = load_font(path, 32)
    return bytes(font.getmask(letter)) not in (b"", bytes(font.getmask("\U0010fffe")))


@lru_cache(maxsize=1)
def system_fonts() -> tuple[str, ...]:
    """Plain text fonts in this machine's usual folders, for variety beyond Pillow's own; often none."""
    found = (path for folder in FONT_FOLDERS for path in sorted(Path(folder).rglob("*.ttf")))
    return tuple(str(path) for path in found if path.name.startswith(FONT_NAMES))


def choose_typeface(rng: np.random.Generator, fonts: Sequence[str]) -> Typeface:
    """A user's font in 3 of 4 receipts where there is one, else Pillow's own or one of the system."""
    path = pick(rng, fonts) if fonts and chance(rng, 0.75) else pick(rng, ("", *system_fonts()))
    if not path and chance(rng, 0.5):
        return Typeface(path, fixed_pitch=True, stretch=rng.uniform(0.75, 1.0))
    return Typeface(path, fixed_pitch=False, stretch=rng.uniform(0.75, 1.1))


@lru_cache(maxsize=4096)
def word_ink(face: Typeface, size: int, bold: bool, text: str) -> tuple[np.ndarray, int]:
    """The ink (height, width) of a word, cropped to it, and the row of its top relative to the baseline (negative)."""
    font = load_font(face.path, size)
    pitch = round(size * FIXED_PITCH) if face.fixed_pitch else 0
    length = pitch * len(text) if pitch else math.ceil(font.getlength(text))
    canvas = Image.new("L", (length + 2 * size, 3 * size))
    draw = ImageDraw.Draw(canvas)
    if pitch:
        for position, letter in enumerate(text):
            draw.text((size + (position + 0.5) * pitch, 2 * size), letter, 255, font, anchor="ms")
    else:
        draw.text((size, 2 * size), text, 255, font, anchor="ls")
    ink = cv2.resize(np.asarray(canvas), None, fx=face.stretch, fy=1.0, interpolation=cv2.INTER_AREA)
    if bold:  # the printer strikes twice
        strike = max(1, round(size / 16))
        ink[:, strike:] = np.maximum(ink[:, strike:], ink[:, :-strike].copy())
    x, y, width, height = cv2.boundingRect(ink)
    return ink[y : y + height, x : x + width], y - 2 * size


def letter_width(face: Typeface) -> float:
    """The mean advance of a letter or digit in font sizes."""
    sample = "Grand Total 12,345.67 abc"
    natural = FIXED_PITCH if face.fixed_pitch else load_font(face.path, 100).getlength(sample) / 100 / len(sample)
    return natural * face.stretch


@dataclass
class Page:
    """Print on flat paper: ink (height, width) uint8, and for each word its box x0, y0, x1, y1 in pixels and text."""

    ink: np.ndarray
    boxes: list[tuple[float, float, float, float]]
    texts: list[str]


def fit_words(text: str, face: Typeface, size: int, bold: bool, room: float) -> tuple[list, int]:
    """As many words of `text` as fit in `room` pixels: (word, ink, top, left) of each, and the width of all."""
    space = max(3, round(size * face.stretch * (0.6 if face.fixed_pitch else 0.32)))
    words, width = [], 0
    for word in text.split():
        ink, top = word_ink(face, size, bold, word)
        left = width + space if words else 0
        if ink.size == 0 or left + ink.shape[1] > room:
            break
        words.append((word, ink, top, left))
        width = left + ink.shape[1]
    return words, width


def print_row(page: Page, row: Row, face: Typeface, size: int, band: tuple[int, int, int, int]) -> str:
    """Set the cells of `row` into a band x0, y0, x1, y1 of the page; returns the text of its last cell left over."""
    x0, y0, x1, y1 = band
    if row.inverted:
        page.ink[y0:y1, x0:x1] = 255
    padding = size // 3 if row.inverted else 0
    start, across = x0 + padding, x1 - x0 - 2 * padding
    baseline = (y0 + y1 + round(size * 0.66)) // 2
    margin = WORD_MARGIN * size + 0.5
    words = []
    for cell in row.cells:
        room = (cell.right - cell.left) * across - (size * 0.4 if cell.right < 1 else 0)
        words, width = fit_words(cell.text, face, size, row.bold, room)
        origin = round(start + cell.left * across + cell.align * (room - width))
        for text, ink, offset, shift in words:
            left, top = origin + shift, baseline + offset
            right, bottom = left + ink.shape[1], top + ink.shape[0]
            spot = page.ink[top:bottom, left:right]
            spot[:] = spot - np.minimum(ink, spot) if row.inverted else np.maximum(spot, ink)
            page.boxes.append((left - margin, top - margin, right + margin, bottom + margin))
            page.texts.append(text)
    return " ".join(row.cells[-1].text.split()[len(words) :]) if words else ""


def print_page(rng: np.random.Generator, width: int, height: int, face: Typeface, words: Vocabulary) -> Page:
    """Set a receipt on a page `width` pixels wide and at most `height` high (rows that do not fit are left out)."""
    size = max(8, round(width / rng.uniform(34, 62) / letter_width(face)))
    leading = rng.uniform(1.1, 1.5)
    margin = max(4, round(width * rng.uniform(0.03, 0.1)))
    page = Page(np.zeros((height, width), np.uint8), [], [])
    rows = compose_receipt(rng, words, (height - 2 * margin) / (size * leading))[::-1]
    top = margin
    while rows:
        row = rows.pop()
        row_size = max(7, round(size * row.scale))
        bottom = top + round((row_size if row.cells else size * row.scale) * leading)
        if bottom + margin > height:
            break
        if row.graphic:
            page.ink[top:bottom, margin:-margin] = row.graphic(rng, bottom - top, width - 2 * margin)
        elif row.cells:
            rest = print_row(page, row, face, row_size, (margin, top, width - margin, bottom))
            if rest and len(row.cells) == 1:
                rows.append(replace(row, cells=(replace(row.cells[0], text=rest),)))
        top = bottom
    page.ink = page.ink[: top + margin]
    return page


# ---- paper: (height, width, 3) uint8 RGB


def smooth_noise(rng: np.random.Generator, height: int, width: int, rows: int, columns: int) -> np.ndarray:
    """(height, width) float32, about 0 to 1, smooth between rows x columns random values."""
    return cv2.resize(rng.random((rows, columns), np.float32), (width, height), interpolation=cv2.INTER_CUBIC)


@lru_cache(maxsize=1)
def noise_tile() -> np.ndarray:
    """(2048, 2048) int16 Gaussian noise of deviation 32, made once: images take random windows of it."""
    return np.random.default_rng(0).normal(0, 32, (2048, 2048)).astype(np.int16)


def noise_window(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(height, width) int16 noise of deviation 32 from a random place of the tile, wrapped around."""
    rows = (int(rng.integers(2048)) + np.arange(height)) % 2048
    columns = (int(rng.integers(2048)) + np.arange(width)) % 2048
    return noise_tile()[rows[:, None], columns]


def to_image(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).astype(np.uint8)


def print_strength(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """How dark the printer prints at each place: (height, width) float32, 0 nothing to 1 full."""
    strength = 1 - rng.uniform(0, 0.5) * smooth_noise(rng, height, width, 5, 3)
    strength *= rng.uniform(0.55, 1.0)
    if chance(rng, 0.25):  # dead or worn dots of the print head
        strength *= 1 - 0.6 * (rng.random(width, np.float32) < rng.uniform(0.02, 0.15))
    if chance(rng, 0.15):  # a patch bleached by heat or light, past reading in the middle
        y, x = np.ogrid[:height, :width]
        distance = np.hypot(x - rng.uniform(0, width), y - rng.uniform(0, height)) / (width * rng.uniform(0.2, 0.5))
        strength *= np.clip(distance**3, 0.02, 1)
    return np.clip(strength, 0, 1).astype(np.float32)


def fold_shading(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Light on folded, crumpled paper: (height, width) float32 factors around 1."""
    shading = 1 + rng.uniform(0, 0.12) * (smooth_noise(rng, height, width, 9, 5) - 0.5)
    for axis, length in ((0, height), (1, width)):
        for _ in range(rng.integers(0, 4 - 2 * axis)):
            distance = (np.arange(length, dtype=np.float32) - rng.uniform(0.1, 0.9) * length) / height
            profile = 1 + rng.uniform(-0.18, 0.18) * np.sign(distance) * np.exp(-np.abs(distance) / 0.08)
            profile -= rng.uniform(0, 0.2) * (np.abs(distance) < 1.5 / height)
            shading *= profile[:, None] if axis == 0 else profile
    return shading


def draw_pen(rng: np.random.Generator, paper: np.ndarray) -> None:
    """A ring, tick or scribble by hand: no text."""
    height, width = paper.shape[:2]
    turn = np.linspace(0, rng.uniform(3, 16), 40)
    centre = rng.uniform(0.2, 0.8, 2) * (width, height)
    radius = width * rng.uniform(0.04, 0.14, 2)
    points = centre + np.stack([np.cos(turn), np.sin(turn)], 1) * radius + np.outer(turn, rng.normal(0, width / 100, 2))
    colour = pick(rng, ((30, 40, 150), (40, 40, 40), (170, 30, 40)))
    cv2.polylines(paper, [np.round(points).astype(np.int32)], False, colour, max(1, width // 180), cv2.LINE_AA)


def develop(rng: np.random.Generator, page: Page, flat: bool) -> tuple[np.ndarray, np.ndarray]:
    """Paper (height, width, 3) uint8 with the page printed on it, and the contrast of print there in grey levels."""
    height, width = page.ink.shape
    brightness, warmth = (rng.uniform(243, 255), 0) if flat else (rng.uniform(205, 248), rng.uniform(-4, 12))
    white = np.float32([brightness, brightness - warmth * 0.4, brightness - warmth]) + rng.uniform(-2, 2, 3)
    ink = np.float32(pick(rng, ((20, 20, 24), (45, 45, 50), (60, 50, 110), (70, 60, 50)))) + rng.uniform(-15, 25)
    strength = print_strength(rng, height, width)
    alpha = strength * page.ink * np.float32(1 / 255)
    if chance(rng, 0.5):  # rough print
        alpha *= np.clip(1 + noise_window(rng, height, width) * np.float32(rng.uniform(0, 0.01)), 0, 1)
    tone = white + alpha[..., None] * np.float32(ink - white)
    paper = to_image(tone if flat else tone * fold_shading(rng, height, width)[..., None])
    if chance(rng, 0.2):
        draw_pen(rng, paper)
    return paper, strength * float(white.mean() - ink.mean())


# ---- scene: where the paper lies, and what is around it


def corners(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    """(4, 2) float64: the corners of a box, clockwise from the top left."""
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], np.float64)


def transform(homography: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(n, 2) points through a (3, 3) homography."""
    return cv2.perspectiveTransform(np.asarray(points, np.float64).reshape(1, -1, 2), homography)[0]


def place(rng: np.random.Generator, page: Page, frame: Frame, flat: bool) -> np.ndarray:
    """The (3, 3) homography from page to image: tilt and perspective, then all words brought inside `frame` (w, h)."""
    height, width = page.ink.shape
    outline = corners(0, 0, width, height)
    angle = math.radians(rng.normal(0, 0.8 if flat else 5))
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    seen = outline @ turn + (0 if flat else rng.uniform(-0.06, 0.06, (4, 2)) * width)
    homography = cv2.getPerspectiveTransform(outline.astype(np.float32), seen.astype(np.float32))
    boxes = np.array(page.boxes)
    text = transform(homography, corners(*boxes[:, :2].min(0), *boxes[:, 2:].max(0)))
    low, high = text.min(0), text.max(0)
    room = np.array(frame) - 4.0
    zoom = min(1.0, *(room / (high - low)))
    shift = 2 + (room - zoom * (high - low)) * rng.uniform(0.3, 0.7, 2) - zoom * low
    return np.array([[zoom, 0, shift[0]], [0, zoom, shift[1]], [0, 0, 1]]) @ homography


def table_top(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A background (height, width, 3) uint8: wood, cloth or plain, with things lying about."""
    colour = np.float32(rng.uniform(30, 210) + np.multiply((1, 0.2, -1), rng.uniform(-10, 45)) + rng.uniform(-8, 8, 3))
    grain = smooth_noise(rng, height, width, *pick(rng, ((60, 3), (3, 60), (40, 30), (4, 4)))) - 0.5
    if chance(rng, 0.12):  # a checked cloth
        y, x = np.ogrid[:height, :width]
        pace = rng.uniform(60, 250) / height
        grain += 0.5 * np.sign(np.sin(y * pace) + np.sin(x * pace))
    scene = to_image(colour + grain[..., None] * rng.uniform(15, 60, 3).astype(np.float32))
    for _ in range(rng.integers(0, 6)):  # cups, cables, cards, phones, other pieces of paper
        shade = rng.integers(*pick(rng, ((0, 80), (0, 256), (190, 250))), 3).tolist()
        place, end = (rng.random((2, 2)) * (width, height)).astype(int).tolist()
        radius = int(height * rng.uniform(0.02, 0.2))
        if chance(rng, 0.25):
            cv2.circle(scene, place, radius, shade, pick(rng, (-1, 2, 5)), cv2.LINE_AA)
        elif chance(rng, 0.25):
            cv2.line(scene, place, end, shade, radius // 8 + 1, cv2.LINE_AA)
        else:
            box = cv2.boxPoints((place, (2 * radius, 3 * radius), rng.uniform(0, 180)))
            cv2.fillConvexPoly(scene, box.astype(np.int32), shade, cv2.LINE_AA)
    return scene


def uneven_light(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """(height, width, 3) float32 factors: a slope of light, its colour, at times the photographer's shadow."""
    light = 1 - rng.uniform(0, 0.5) * smooth_noise(rng, height, width, 2, 2)
    if chance(rng, 0.35):
        shadow = np.zeros((height // 4, width // 4), np.float32)
        outline = rng.uniform(-0.3, 1.3, (3, 2)) * (width / 4, height / 4)
        cv2.fillConvexPoly(shadow, outline.astype(np.int32), rng.uniform(0.15, 0.45))
        light -= cv2.resize(cv2.GaussianBlur(shadow, (0, 0), width * rng.uniform(0.005, 0.03)), (width, height))
    warmth = rng.normal(0, 0.05)
    return light[..., None] * np.float32([1 + warmth, 1, 1 - warmth])


def photograph(rng: np.random.Generator, paper: np.ndarray, homography: np.ndarray, frame: Frame) -> np.ndarray:
    """The paper on a table, its shadow beside it, in uneven light: (h, w, 3) uint8 for a frame (w, h)."""
    width, height = frame
    outline = transform(homography, corners(0, 0, paper.shape[1], paper.shape[0]))
    mask = np.zeros((height, width), np.float32)
    cv2.fillConvexPoly(mask, np.round(outline * 16).astype(np.int32), 1.0, shift=4)
    reach = width // 20 + 1
    table = (
        table_top(rng, width, height)
        * (1 - np.float32(rng.uniform(0, 0.6)) * cv2.blur(mask, (reach, reach)))[..., None]
    )
    sheet = cv2.warpPerspective(paper, homography, frame, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    covered = cv2.blur(mask, (3, 3))[..., None]
    return to_image((table + (sheet - table) * covered) * uneven_light(rng, width, height))


def scan(rng: np.random.Generator, paper: np.ndarray, homography: np.ndarray, frame: Frame) -> np.ndarray:
    """The paper on the white of a flatbed scanner, at times with hard contrast: (h, w, 3) uint8 for a frame (w, h)."""
    lid = [int(rng.integers(244, 256))] * 3
    image = cv2.warpPerspective(paper, homography, frame, flags=cv2.INTER_LINEAR, borderValue=lid)
    if chance(rng, 0.3):
        image = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if chance(rng, 0.4):
        image = cv2.convertScaleAbs(image, alpha=1.25, beta=0)
    return image


def degrade(rng: np.random.Generator, image: np.ndarray, size: int, flat: bool) -> np.ndarray:
    """What lens, sensor and file do: blur, loss of resolution, noise, JPEG. (h, w, 3) uint8 to the same."""
    height, width = image.shape[:2]
    if chance(rng, 0.2):
        share = rng.uniform(0.6, 0.9)
        image = cv2.resize(image, None, fx=share, fy=share, interpolation=cv2.INTER_AREA)
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    elif chance(rng, 0.2):  # the hand moved
        reach = max(2, round(size / 640 * rng.uniform(2, 4)))
        image = cv2.blur(image, pick(rng, ((1, reach), (reach, 1))))
    elif chance(rng, 0.6):
        image = cv2.GaussianBlur(image, (0, 0), size / 640 * rng.uniform(0.3, 0.5 if flat else 0.9))
    noise = noise_window(rng, height, width) * np.float32(rng.uniform(0, 0.08 if flat else 0.3))
    image = cv2.add(image, cv2.merge([noise, noise, noise]), dtype=cv2.CV_8U)
    if chance(rng, 0.5):
        _, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(30, 85))])
        image = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    return image


def render_receipt(
    rng: np.random.Generator, size: int = 640, fonts: Sequence[str] = ()
) -> tuple[np.ndarray, list[Word]]:
    """One receipt: image (height, width, 3) uint8 RGB, long side about `size`, and its words.

    A word is (polygon, transcription, illegible): polygon (4, 2) float64 in pixels of the image, clockwise from the
    word's top left, tight around its ink, always inside the image; illegible where the print is too faint to read.
    `fonts` are files to prefer over Pillow's own; those with Hangul give Korean receipts. Raises UserError for a
    file that is no font.
    """
    flat = chance(rng, SCAN_SHARE)
    face = choose_typeface(rng, fonts)
    words = KOREAN if has_glyph(face.path, "가") and chance(rng, 0.8) else LATIN
    long_side = round(size * rng.uniform(0.9, 1.0))
    if flat:
        width = round(long_side * rng.uniform(0.38, 0.75))
        page = print_page(rng, width, long_side, face, words)
        frame = width, max(page.ink.shape[0], round(long_side * rng.uniform(0.85, 1.0)))
    else:
        aspect = pick(rng, (9 / 16, 9 / 16, 3 / 4, 3 / 4, 2 / 3, 1.0))
        frame = round(long_side * aspect), long_side
        page_width = round(min(frame[0] * rng.uniform(0.6, 0.98), long_side * 0.7))
        page = print_page(rng, page_width, round(long_side * rng.uniform(0.85, 1.05)), face, words)
    homography = place(rng, page, frame, flat)
    paper, contrast = develop(rng, page, flat)
    image = (scan if flat else photograph)(rng, paper, homography, frame)
    outlines = []
    for box, text in zip(page.boxes, page.texts, strict=True):
        x0, y0, x1, y1 = (max(0, round(edge)) for edge in box)
        faint = float(contrast[y0:y1, x0:x1].mean()) < MIN_CONTRAST
        polygon = transform(homography, corners(*box) - 0.5) + 0.5  # OpenCV counts from the centre of pixel 0
        outlines.append((polygon, text, faint))
    return degrade(rng, image, size, flat), outlines


# ---- data set on disk


def write_image(job: tuple[str, int], folder: Path, size: int, seed: int, fonts: Sequence[str]) -> tuple[str, dict]:
    """Render and write image `index` of `split`; returns its file name and its entry of the json."""
    split, index = job
    image, words = render_receipt(np.random.default_rng([seed, SPLITS.index(split), index]), size, fonts)
    name = f"synth_{split}_{index:05d}.jpg"
    _, encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
    (folder / "images" / split / name).write_bytes(encoded.tobytes())
    entries = {}
    for number, (polygon, text, illegible) in enumerate(words, 1):
        points = polygon.round(2).tolist()
        entries[f"{number:04d}"] = {"points": points, "transcription": text, "illegibility": illegible}
    return name, {"img_w": image.shape[1], "img_h": image.shape[0], "words": entries}


def check_request(folder: Path, counts: dict[str, int], size: int, seed: int, fonts: Sequence[str]) -> None:
    """Raises UserError, naming the flag and the mend, for what `write_dataset` cannot or must not do."""
    for name, value in (*counts.items(), ("seed", seed)):
        if value < 0:
            raise UserError(f"--{name} {value}: give 0 or more")
    if not any(counts.values()):
        raise UserError("--train, --val and --test are all 0: ask for at least one image")
    if size < MIN_SIZE:
        raise UserError(f"--size {size}: give at least {MIN_SIZE} pixels")
    for path in ("", *fonts):
        load_font(path, 16)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {folder}: is not empty, and nothing is overwritten; delete it or name a new folder")


def write_dataset(
    folder: str | Path,
    train: int = 200,
    val: int = 20,
    test: int = 10,
    size: int = 640,
    seed: int = 0,
    fonts: Sequence[str] = (),
    workers: int | None = None,
) -> int:
    """Write a data set of receipts in the layout that `dbnet.annotations` reads, and return the number of its words.

    `folder` must be absent or empty. The jsons come last, so that an interrupted run is no data set. Image i of a
    split depends on (seed, split, i) alone: not on `workers` (processes; default: one per CPU) nor on the counts.
    Workers are spawned, so a script calls this under `if __name__ == "__main__"`. Raises UserError for a request that
    cannot be met.
    """
    folder, counts, fonts = Path(folder), {"train": train, "val": val, "test": test}, tuple(map(str, fonts))
    check_request(folder, counts, size, seed, fonts)
    jobs = [(split, index) for split in SPLITS for index in range(counts[split])]
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    images: dict[str, dict[str, dict]] = {split: {} for split in SPLITS}
    render = partial(write_image, folder=folder, size=size, seed=seed, fonts=fonts)
    try:
        for split in SPLITS:
            (folder / "images" / split).mkdir(parents=True, exist_ok=True)
        processes = partial(ProcessPoolExecutor, workers, get_context("spawn"), cv2.setNumThreads, (1,))
        with processes() if workers > 1 else nullcontext() as pool:
            entries = pool.map(render, jobs, chunksize=4) if pool else map(render, jobs)
            for (split, _), (name, entry) in zip(jobs, tqdm(entries, "receipts", len(jobs), unit="image"), strict=True):
                images[split][name] = entry
        (folder / "jsons").mkdir()
        for split in SPLITS:
            text = json.dumps({"images": images[split]}, ensure_ascii=False)
            (folder / "jsons" / f"{split}.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror}); choose another folder") from None
    return sum(len(entry["words"]) for split in SPLITS for entry in images[split].values())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dbnet.synth", description="Write a data set of synthetic receipts."
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make; must be absent or empty")
    for split, count in zip(SPLITS, (200, 20, 10), strict=True):
        parser.add_argument(
            f"--{split}", type=int, default=count, metavar="N", help=f"{split} images (default {count})"
        )
    parser.add_argument("--size", type=int, default=640, help="long side of the images in pixels (default 640)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same data set (default 0)")
    parser.add_argument(
        "--font", action="append", default=[], metavar="FILE", help="a .ttf or .otf to print with; repeatable"
    )
    args = parser.parse_args(arguments)
    words = write_dataset(args.out, args.train, args.val, args.test, args.size, args.seed, args.font)
    print(f"{args.out}: {args.train} train, {args.val} val, {args.test} test images with {words} words")


if __name__ == "__main__":
    run_script(main)
