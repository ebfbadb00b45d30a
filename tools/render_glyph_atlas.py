"""Renders the atlas of GlyphLT-100: ``python tools/render_glyph_atlas.py DST``.

The result ships as package data in ``timm_lt/data/glyph_atlas``, so that neither fonts nor a
rasteriser are needed at run time and the data set does not change with them. This script is how it
was made.
"""

import argparse
import hashlib
import json
import sys
import unicodedata
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, features

NUM_CLASSES = 100
CELL = 48  # pixels per atlas cell
GLYPH = 40  # longer side of a glyph in its cell; the rest is margin
FACES = tuple(
    f"{family}{style}.ttf"
    for family, styles in {
        "DejaVuSans": ("", "-Bold", "-Oblique", "-BoldOblique"),
        "DejaVuSerif": ("", "-Bold", "-Italic", "-BoldItalic"),
        "DejaVuSansMono": ("", "-Bold", "-Oblique", "-BoldOblique"),
        "STIXGeneral": ("", "Bol", "Italic", "BolIta"),
    }.items()
    for style in styles
)

# Latin letters and digits come first and are all used unless they look alike, so that anyone can
# read most classes; the other scripts then take turns.
READABLE = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
SCRIPTS = ("GREEK ", "CYRILLIC ", "LATIN ", " SIGN")
BLOCKS = (range(0xA2, 0x2B0), range(0x370, 0x530), range(0x20A0, 0x20C0))
CATEGORIES = {"Lu", "Ll", "Lo", "Sc"}  # letters and currency
# Rarity must depend neither on the alphabet nor on difficulty: with this seed the
# many-, medium- and few-shot classes are equally hard when a model is trained on balanced counts.
PERMUTATION_SEED = 33
MAX_MEAN_SIMILARITY = 0.86  # a pair above it is alike in general: O and D, P and p
MAX_FACE_SIMILARITY = (
    0.96  # a pair above it is the same in some face: an italic Cyrillic te is an m
)

# Judged by eye on the rendered sheet: each looks like the glyph on its right once size and slant
# vary.
LOOKALIKES = {"O": "0", "o": "0", "I": "1", "U": "u", "j": "J", "p": "P"} | {
    "\N{CYRILLIC SMALL LETTER HARD SIGN}": "\N{CYRILLIC CAPITAL LETTER HARD SIGN}",
    "\N{CYRILLIC SMALL LETTER DJE}": "\N{CYRILLIC CAPITAL LETTER DJE}",
    "\N{CYRILLIC SMALL LETTER EF}": "\N{CYRILLIC CAPITAL LETTER EF}",
    "\N{GREEK SMALL LETTER DIGAMMA}": "f",
    "\N{LATIN SMALL LETTER DZ DIGRAPH}": "\N{LATIN SMALL LETTER DEZH DIGRAPH}",
    "\N{CURRENCY SIGN}": "any glyph in front of a circle",
}

README = """\
# Glyph atlas

`atlas.png` holds renderings of 100 characters (rows, in the order of `classes.json`) in 16 font
faces (columns): DejaVu Sans, Serif and Sans Mono in four styles each, STIXGeneral in four, as
bundled with matplotlib. Nothing of the font files themselves is included. The fonts' licences are
beside this file; `python tools/render_glyph_atlas.py` made it.
"""


def font_folder() -> Path:
    """Returns the folder of the fonts that matplotlib bundles."""
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def candidates(fonts: Path) -> list[str]:
    """Returns the characters that every face has: no accents, punctuation, or lookalikes."""
    charmaps = [set(FT2Font(str(fonts / face)).get_charmap()) for face in FACES]
    common = set.intersection(*charmaps)
    others = [
        chr(code)
        for block in BLOCKS
        for code in block
        if unicodedata.category(chr(code)) in CATEGORIES
        and not unicodedata.decomposition(chr(code))
    ]
    return [char for char in [*READABLE, *others] if ord(char) in common and char not in LOOKALIKES]


def draw_glyph(char: str, font: ImageFont.FreeTypeFont) -> NDArray[np.uint8]:
    """Draws a glyph centred in its cell, scaled so that its longer side is ``GLYPH`` pixels.

    It is drawn large and then averaged down: hinting and rounding at 48 pixels would distort
    the strokes.

    Shape:
        Returns ``(CELL, CELL)``, 0 for background.
    """
    left, top, right, bottom = (int(edge) for edge in font.getbbox(char))
    large = Image.new("L", (right - left + 8, bottom - top + 8))
    ImageDraw.Draw(large).text((4 - left, 4 - top), char, font=font, fill=255)
    large = large.crop(large.getbbox())
    scale = GLYPH / max(large.size)
    width, height = (max(1, round(side * scale)) for side in large.size)
    cell = Image.new("L", (CELL, CELL))
    small = large.resize((width, height), Image.Resampling.BOX)
    cell.paste(small, ((CELL - width) // 2, (CELL - height) // 2))
    return np.asarray(cell)


def draw_glyphs(chars: list[str], fonts: Path) -> NDArray[np.uint8]:
    """Draws every character in every face.

    Shape:
        Returns ``(len(chars), 16, CELL, CELL)``.
    """
    layout = ImageFont.Layout.BASIC  # always there, unlike Raqm, and one glyph needs no shaping
    faces = [ImageFont.truetype(str(fonts / face), 200, layout_engine=layout) for face in FACES]
    return np.stack([[draw_glyph(char, face) for face in faces] for char in chars])


def similarity(cells: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Returns the correlation of each pair of glyphs in each face, at a quarter of the resolution.

    Shape:
        ``cells (N, 16, CELL, CELL)``; returns ``(16, N, N)``.
    """
    number, faces = cells.shape[:2]
    blocks = cells.reshape(number, faces, CELL // 3, 3, CELL // 3, 3)
    values = blocks.mean((3, 5), dtype=np.float32).reshape(number, faces, -1).transpose(1, 0, 2)
    values = values - values.mean(-1, keepdims=True)
    values = values / np.linalg.norm(values, axis=-1, keepdims=True)
    return np.asarray(values @ values.transpose(0, 2, 1), np.float32)


def choose_classes(chars: list[str], cells: NDArray[np.uint8]) -> list[int]:
    """Chooses the classes: the readable ones, then the least similar of each script in turn.

    Shape:
        ``cells (N, 16, CELL, CELL)``; returns ``NUM_CLASSES`` indices into ``chars``.
    """
    per_face = similarity(cells)
    # Rounded, so that the order of a sum cannot decide between two candidates.
    mean, highest = per_face.mean(0).round(4), per_face.max(0).round(4)
    alike = (mean > MAX_MEAN_SIMILARITY) | (highest > MAX_FACE_SIMILARITY)
    chosen: list[int] = []
    for index, char in enumerate(chars):
        if char in READABLE and not alike[index, chosen].any():
            chosen.append(index)
    scripts = [[i for i, char in enumerate(chars) if belongs(char, script)] for script in SCRIPTS]
    turn = 0
    while len(chosen) < NUM_CLASSES:
        free = [i for i in scripts[turn % len(scripts)] if not alike[i, chosen].any()]
        if free:
            chosen.append(min(free, key=lambda i: (mean[i, chosen].max(), i)))
        turn += 1
        if turn > len(chars):
            raise RuntimeError(f"only {len(chosen)} glyphs are distinct enough")
    return chosen


def belongs(char: str, script: str) -> bool:
    """Returns whether a character outside ``READABLE`` belongs to the script."""
    return char not in READABLE and script in unicodedata.name(char)


def class_name(char: str) -> str:
    """Returns an ASCII name for tables.

    >>> class_name("a"), class_name("7"), class_name("Σ"), class_name("€")
    ('latin_small_a', 'digit_seven', 'greek_capital_sigma', 'euro_sign')
    """
    name = unicodedata.name(char).replace(" LETTER", "").replace("-", " ")
    return "_".join(name.lower().split())


def render(destination: Path) -> None:
    """Writes ``atlas.png``, ``classes.json``, a note and the fonts' licences to a folder.

    Row c of the atlas is class c, column f is face f. The 16 grey levels are enough for 32-pixel
    images and halve the file.
    """
    fonts = font_folder()
    chars = candidates(fonts)
    cells = draw_glyphs(chars, fonts)
    chosen = choose_classes(chars, cells)
    order = np.random.default_rng(PERMUTATION_SEED).permutation(len(chosen))
    chosen = [chosen[i] for i in order]
    levels = (cells[chosen].astype(np.uint16) + 8) // 17
    sheet = levels.transpose(0, 2, 1, 3).reshape(len(chosen) * CELL, len(FACES) * CELL) * 17
    destination.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(sheet.astype(np.uint8))
    image.save(destination / "atlas.png", optimize=True)
    about = {
        "cell": CELL,
        "faces": {face: hashlib.sha256((fonts / face).read_bytes()).hexdigest() for face in FACES},
        "rendered_with": rasteriser(),
        "classes": [
            {"name": class_name(chars[i]), "char": chars[i], "code_point": f"U+{ord(chars[i]):04X}"}
            for i in chosen
        ],
    }
    text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
    (destination / "classes.json").write_text(text, encoding="utf-8")
    (destination / "README.md").write_text(README, encoding="utf-8")
    for licence in ("LICENSE_DEJAVU", "LICENSE_STIX"):
        (destination / licence).write_bytes((fonts / licence).read_bytes())


def rasteriser() -> dict[str, str]:
    """Returns the versions of the libraries that determine the bytes of the atlas."""
    libraries = ("freetype2", "zlib_ng", "zlib")
    versions = {name: features.version(name) or "none" for name in libraries}
    return {"pillow": features.version("pil") or "none", **versions}


def main(arguments: list[str] | None = None) -> int:
    """Renders the atlas to the folder named on the command line."""
    parser = argparse.ArgumentParser(
        prog="python tools/render_glyph_atlas.py",
        description="Render the GlyphLT-100 atlas from matplotlib's fonts.",
    )
    parser.add_argument("destination", metavar="DST", type=Path, help="folder to write to")
    render(parser.parse_args(arguments).destination)
    return 0


if __name__ == "__main__":
    sys.exit(main())
