"""Pictures of 6x6 sudokus, drawn with Pillow: what the demo model's vision tower was trained to read.

Every picture is drawn from a `random.Random`, so a seed repeats it: size, font, colours, lines, margins,
tilt, perspective, shading, blur, noise and JPEG artefacts vary. Needs the extra `vision` (Pillow).
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import sudoku

if TYPE_CHECKING:
    from PIL import Image, ImageDraw
    from PIL.ImageFont import FreeTypeFont

__all__ = ["MAX_TILT", "Look", "draw"]

MAX_TILT = 6.0
"""Pictures are tilted by up to this many degrees."""
DEFAULT_FONT = ""
"""The font that comes with Pillow, in a list of font files."""
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Look:
    """How a puzzle is drawn.

    Attributes:
        size: side of the square picture in pixels.
        font: path of a font file, or "" for Pillow's own.
        digit_size: height of the font in shares of a cell.
        paper, ink, line, shade: colours of background, digits, lines, and of the shaded cells.
        shaded: which cells have the colour `shade`: none, the givens, or every other box.
        thin, thick: width of the lines between cells and of those around boxes, in shares of a cell.
        margins: (left, top, right, bottom) in shares of the side.
        tilt: degrees, counterclockwise.
        corners: shifts (x, y) of the four corners, in shares of the side, for perspective.
        light: (strength, direction in radians) of a brightness gradient; strength 0 for none.
        blur: radius of a Gaussian blur in thousandths of the side.
        noise: standard deviation of the noise, of 255.
        jpeg: JPEG quality that the picture went through, or None.
    """

    size: int = 384
    font: str = DEFAULT_FONT
    digit_size: float = 0.7
    paper: Colour = (255, 255, 255)
    ink: Colour = (20, 20, 20)
    line: Colour = (60, 60, 60)
    shade: Colour = (230, 230, 230)
    shaded: str = "none"
    thin: float = 0.03
    thick: float = 0.08
    margins: tuple[float, float, float, float] = (0.05, 0.05, 0.05, 0.05)
    tilt: float = 0.0
    corners: tuple[tuple[float, float], ...] = ((0.0, 0.0),) * 4
    light: tuple[float, float] = (0.0, 0.0)
    blur: float = 0.0
    noise: float = 0.0
    jpeg: int | None = None

    @classmethod
    def random(
        cls, rng: random.Random, fonts: Sequence[str] = (DEFAULT_FONT,), difficulty: float = 1.0
    ) -> Look:
        """A random look; `difficulty` 0 to 1 scales tilt, perspective, margins, blur and noise."""
        paper, ink, line, shade = _colours(rng)
        margin = 0.02 + 0.08 * difficulty * rng.random()
        margins = tuple(max(0.01, margin + 0.03 * difficulty * rng.uniform(-1, 1)) for _ in range(4))
        bend = 0.03 * difficulty * rng.random()
        return cls(
            size=rng.randint(256, 448),
            font=rng.choice(fonts),
            digit_size=rng.uniform(0.55, 0.95),
            paper=paper,
            ink=ink,
            line=line,
            shade=shade,
            shaded=rng.choices(("none", "givens", "boxes"), (6, 2, 2))[0],
            thin=rng.uniform(0.015, 0.06),
            thick=rng.uniform(0.04, 0.14),
            margins=margins,  # type: ignore[arg-type]
            tilt=MAX_TILT * difficulty * rng.uniform(-1, 1) * (rng.random() < 0.8),
            corners=tuple((bend * rng.uniform(-1, 1), bend * rng.uniform(-1, 1)) for _ in range(4)),
            light=(0.4 * difficulty * rng.random() * (rng.random() < 0.6), rng.uniform(0, 2 * math.pi)),
            blur=difficulty * rng.uniform(0, 3.5) * (rng.random() < 0.5),
            noise=difficulty * rng.uniform(0, 14) * (rng.random() < 0.6),
            jpeg=rng.randint(30, 95) if rng.random() < 0.4 else None,
        )


def draw(puzzle: str, look: Look, rng: random.Random) -> Image.Image:
    """Draw `puzzle` (36 characters of `1` to `6` and `.`); returns an RGB image of `look.size` squared.

    `rng` places the digits within their cells and makes the noise.
    """
    from PIL import Image, ImageFilter

    image = _flat(puzzle, look, rng)
    image = image.transform(
        (look.size, look.size),
        Image.Transform.PERSPECTIVE,
        _coefficients(_quad(look), image.size[0]),
        Image.Resampling.BICUBIC,
        fillcolor=look.paper,
    )
    if look.blur:
        image = image.filter(ImageFilter.GaussianBlur(look.blur * look.size / 1000))
    if look.light[0] or look.noise:
        image = _lit(image, look, rng)
    if look.jpeg is not None:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=look.jpeg)
        image = Image.open(buffer).convert("RGB")
    return image


def cells_at(points: np.ndarray, look: Look) -> np.ndarray:
    """The cell at each of `points` (..., 2), x and y in shares of the side: 0 to 35, or -1 outside; int64."""
    border, cell = _measures(look)
    a, b, c, d, e, f, g, h = _coefficients(_quad(look), 2 * border + sudoku.SIZE * cell)
    x, y = points[..., 0] * look.size, points[..., 1] * look.size
    scale = cell * (g * x + h * y + 1)
    column = np.floor((a * x + b * y + c) / scale - border / cell).astype(np.int64)
    row = np.floor((d * x + e * y + f) / scale - border / cell).astype(np.int64)
    inside = (row >= 0) & (row < sudoku.SIZE) & (column >= 0) & (column < sudoku.SIZE)
    return np.where(inside, row * sudoku.SIZE + column, -1)


def _measures(look: Look) -> tuple[int, int]:
    """(border, side of a cell) of the flat puzzle in pixels."""
    cell = round(look.size * 0.9 / sudoku.SIZE)
    return max(2, round(look.thick * cell)), cell


def _colours(rng: random.Random) -> tuple[Colour, Colour, Colour, Colour]:
    """Paper, ink, lines and shading, dark on light or light on dark, far enough apart to be read."""
    light = [rng.randint(185, 255) for _ in range(3)]
    dark = [rng.randint(0, 110) for _ in range(3)]
    if rng.random() < 0.4:  # grey
        light, dark = [light[0]] * 3, [dark[0]] * 3
    paper, ink = (light, dark) if rng.random() < 0.75 else (dark, light)
    share = rng.uniform(0.35, 1.0)
    line = [round(p + share * (rng.choice((i, c)) - p)) for p, i, c in zip(paper, ink, dark, strict=True)]
    if sum(abs(a - b) for a, b in zip(line, paper, strict=True)) < 120:
        line = [round(p + 0.7 * (i - p)) for p, i in zip(paper, ink, strict=True)]
    step = rng.uniform(0.05, 0.25)
    shade = [round(p + step * (i - p)) for p, i in zip(paper, ink, strict=True)]
    return tuple(paper), tuple(ink), tuple(line), tuple(shade)  # type: ignore[return-value]


@lru_cache(maxsize=4096)
def _font(path: str, pixels: int) -> FreeTypeFont:
    from PIL import ImageFont

    return ImageFont.truetype(path, pixels) if path else ImageFont.load_default(pixels)  # type: ignore[return-value]


def _flat(puzzle: str, look: Look, rng: random.Random) -> Image.Image:
    """The puzzle without margins, tilt and noise, cells of equal size."""
    from PIL import Image, ImageDraw

    if len(puzzle) != sudoku.N_CELLS or not set(puzzle) <= set("123456."):
        raise ValueError(f"a 6x6 puzzle is 36 cells of 1 to 6 and '.', row by row; got {puzzle!r}")
    border, cell = _measures(look)
    side = cell * sudoku.SIZE + 2 * border
    image = Image.new("RGB", (side, side), look.paper)
    pen = ImageDraw.Draw(image)
    font = _font(look.font, max(8, round(cell * look.digit_size)))
    for index, digit in enumerate(puzzle):
        row, column = divmod(index, sudoku.SIZE)
        left, top = border + column * cell, border + row * cell
        box = row // sudoku.BOX_ROWS + column // sudoku.BOX_COLUMNS
        if (look.shaded == "givens" and digit != ".") or (look.shaded == "boxes" and box % 2):
            pen.rectangle((left, top, left + cell, top + cell), fill=look.shade)
        if digit != ".":
            x = left + cell / 2 + 0.06 * cell * rng.uniform(-1, 1)
            y = top + cell / 2 + 0.06 * cell * rng.uniform(-1, 1)
            _digit(pen, digit, x, y, font, look.ink)
    for n in range(sudoku.SIZE + 1):
        at = border + n * cell
        for vertical, every in ((True, sudoku.BOX_COLUMNS), (False, sudoku.BOX_ROWS)):
            width = max(1, round((look.thick if n % every == 0 else look.thin) * cell))
            ends = (border, side - border)
            line = ((at, ends[0]), (at, ends[1])) if vertical else ((ends[0], at), (ends[1], at))
            pen.line(line, fill=look.line, width=width)
    return image


def _digit(pen: ImageDraw.ImageDraw, digit: str, x: float, y: float, font: FreeTypeFont, ink: Colour) -> None:
    left, top, right, bottom = font.getbbox(digit)
    pen.text((x - (left + right) / 2, y - (top + bottom) / 2), digit, font=font, fill=ink)


def _quad(look: Look) -> list[tuple[float, float]]:
    """The corners of the flat puzzle (top left, clockwise) in pixels of the picture."""
    left, top, right, bottom = look.margins
    angle = math.radians(look.tilt)
    width, height = 1 - left - right, 1 - top - bottom
    centre_x, centre_y = left + width / 2, top + height / 2
    # A tilted square needs more room: shrink it so that its corners stay inside.
    shrink = 1 / (abs(math.cos(angle)) + abs(math.sin(angle)))
    points = []
    for (sign_x, sign_y), (move_x, move_y) in zip(
        ((-1, -1), (1, -1), (1, 1), (-1, 1)), look.corners, strict=True
    ):
        x, y = sign_x * width / 2 * shrink, sign_y * height / 2 * shrink
        turned_x = x * math.cos(angle) + y * math.sin(angle)
        turned_y = -x * math.sin(angle) + y * math.cos(angle)
        points.append(
            (look.size * (centre_x + turned_x + move_x), look.size * (centre_y + turned_y + move_y))
        )
    return points


def _coefficients(quad: list[tuple[float, float]], side: int) -> list[float]:
    """Pillow's perspective coefficients, which map a point of the picture to one of the flat puzzle."""
    source = ((0, 0), (side, 0), (side, side), (0, side))
    rows, values = [], []
    for (x, y), (u, v) in zip(quad, source, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.linalg.solve(np.array(rows, np.float64), np.array(values, np.float64)).tolist()


def _lit(image: Image.Image, look: Look, rng: random.Random) -> Image.Image:
    """With a brightness gradient and noise."""
    from PIL import Image

    pixels: np.ndarray = np.asarray(image, np.float32)
    strength, direction = look.light
    if strength:
        ramp = np.linspace(-0.5, 0.5, look.size, dtype=np.float32)
        slope = math.cos(direction) * ramp[None, :] + math.sin(direction) * ramp[:, None]
        pixels = pixels * (1 - strength / 2 + strength * slope)[..., None]
    if look.noise:
        generator = np.random.default_rng(rng.getrandbits(32))
        pixels = pixels + look.noise * generator.standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


def font_files(folder: str | Path) -> list[str]:
    """The font files below a folder that have all six digits, sorted by name."""
    from PIL import ImageFont

    found = []
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix.lower() not in (".ttf", ".otf"):
            continue
        try:
            font = ImageFont.truetype(str(path), 24)
            masks = {bytes(font.getmask(digit)) for digit in "123456"}
        except OSError:
            continue
        if len(masks) == 6:
            found.append(str(path))
    return found
