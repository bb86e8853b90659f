"""A table of numbers as a picture: a coloured cell for each, with the number in it."""

from collections.abc import Sequence

import cv2
import numpy as np

_CELL = (96, 44)  # width and height in pixels
_LEFT, _TOP, _BOTTOM, _RIGHT = 150, 84, 132, 30  # room in pixels for labels, title and legend
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_INK, _PAPER = (30, 30, 30), (255, 255, 255)


def draw_heat_map(
    values: np.ndarray,
    rows: Sequence[float],
    columns: Sequence[float],
    axes: tuple[str, str],
    title: str,
    marks: dict[str, tuple[int, int]],
) -> np.ndarray:
    """Draw (rows, columns) values, the highest brightest; the first row is at the bottom, as on a graph's axis.

    The lowest quarter is all of one colour: beside bad values the good ones could not be told apart.

    Args:
        values: (rows, columns) numbers between 0 and 1.
        rows, columns: the number that each row and column stands for.
        axes: what these numbers are, of rows and of columns.
        title: a line above.
        marks: cells, (row, column), to frame, by their legends; any after the first get a thinner frame.

    Returns:
        (height, width, 3) uint8 RGB.
    """
    width = max(_LEFT + len(columns) * _CELL[0] + _RIGHT, 60 + 11 * max(map(len, [title, *marks])))
    canvas = np.full((_TOP + len(rows) * _CELL[1] + _BOTTOM, width, 3), _PAPER, np.uint8)
    low, high = np.quantile(values, 0.25), values.max()
    levels = np.clip((values - low) / max(high - low, 1e-9), 0, 1) * 255
    colors = cv2.applyColorMap(np.rint(levels).astype(np.uint8), cv2.COLORMAP_VIRIDIS)[..., ::-1]

    def corner(row: int, column: int) -> tuple[int, int]:
        return _LEFT + column * _CELL[0], _TOP + (len(rows) - 1 - row) * _CELL[1]

    for row, column in np.ndindex(values.shape):
        x, y = corner(row, column)
        color = tuple(colors[row, column].tolist())
        cv2.rectangle(canvas, (x, y), (x + _CELL[0] - 2, y + _CELL[1] - 2), color, cv2.FILLED)
        _write(canvas, f"{values[row, column]:.4f}", (x + _CELL[0] // 2, y + _CELL[1] // 2), _readable_on(color))
    for row, value in enumerate(rows):
        _write(canvas, f"{value:g}", (_LEFT - 30, corner(row, 0)[1] + _CELL[1] // 2))
    for column, value in enumerate(columns):
        _write(canvas, f"{value:g}", (corner(0, column)[0] + _CELL[0] // 2, corner(0, 0)[1] + _CELL[1] + 16))
    _write(canvas, axes[0], (_LEFT // 2 - 10, _TOP - 20))
    _write(canvas, axes[1], (_LEFT + len(columns) * _CELL[0] // 2, corner(0, 0)[1] + _CELL[1] + 42))
    cv2.putText(canvas, title, (24, 36), _FONT, 0.6, _INK, 1, cv2.LINE_AA)

    for number, (legend, (row, column)) in enumerate(marks.items()):
        x, y = corner(row, column)
        inset, thickness = (0, 4) if number == 0 else (6, 2)
        color = (213, 94, 0)  # vermilion stays apart from viridis for the colour-blind
        cv2.rectangle(
            canvas, (x + inset, y + inset), (x + _CELL[0] - 2 - inset, y + _CELL[1] - 2 - inset), color, thickness
        )
        key = canvas.shape[0] - 50 + 26 * number
        cv2.rectangle(canvas, (26, key - 7), (46, key + 7), color, thickness)
        cv2.putText(canvas, legend, (60, key + 6), _FONT, 0.5, _INK, 1, cv2.LINE_AA)
    return canvas


def _write(canvas: np.ndarray, text: str, middle: tuple[int, int], color: tuple[int, int, int] = _INK) -> None:
    """Put text with its middle at a point."""
    (width, height), _ = cv2.getTextSize(text, _FONT, 0.5, 1)
    cv2.putText(canvas, text, (middle[0] - width // 2, middle[1] + height // 2), _FONT, 0.5, color, 1, cv2.LINE_AA)


def _readable_on(color: tuple[int, int, int]) -> tuple[int, int, int]:
    """Dark ink on a light color, white on a dark one."""
    return _INK if np.dot(color, (0.299, 0.587, 0.114)) > 120 else _PAPER
