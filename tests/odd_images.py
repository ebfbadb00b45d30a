"""A folder of images as people have them: a long tail, odd names, odd formats, a broken file."""

import io

import numpy as np

import timm_lt.data

# Class directories with their images; the glyphs of GlyphLT-100 stand for what people photograph.
CLASSES = {
    "ant": 60,
    "Bee": 50,
    "crème brûlée": 40,
    "dog #3": 30,
    "egg 100%": 24,
    "fig's": 20,
    "goat (old)": 16,
    "hare+tortoise": 12,
    "ibis, sacred": 10,
    "日本猿": 8,
    "kiwi & co": 6,
    "lynx.wild": 5,
}
NAMES = ["IMG_{}.JPG", "photo {}.jpg", "été {}.png", "{} #1.webp", "50% {}.png", "a'{}.jpeg"]
# The broken file; everything else can be read.
TRUNCATED = "ant/truncated.jpg"


def make_odd_images(root):
    """Writes the folder; returns the number of images that can be read, by class."""
    glyphs = timm_lt.data.create_dataset("glyph_lt", split="train")
    labels = np.asarray(glyphs.with_format("numpy")["label"][:])
    for label, (name, number) in enumerate(CLASSES.items()):
        folder = root / name
        folder.mkdir(parents=True)
        rows = np.flatnonzero(labels == label)[:number]
        for place, image in enumerate(glyphs.select(rows)["image"]):
            side = 32 + place % 3 * 8
            file = folder / NAMES[place % len(NAMES)].format(place)
            image.resize((side, 40)).save(file)
    odd = glyphs[0]["image"]
    odd.convert("L").save(root / "ant" / "grey.png")
    odd.convert("CMYK").save(root / "Bee" / "print.jpg")
    odd.resize((1, 1)).save(root / "crème brûlée" / "dot.png")
    whole = io.BytesIO()
    odd.resize((64, 64)).save(whole, "JPEG")
    (root / TRUNCATED).write_bytes(whole.getvalue()[:-600])
    (root / "ant" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    return {name: number + (place < 3) for place, (name, number) in enumerate(CLASSES.items())}
