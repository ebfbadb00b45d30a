"""``timm-lt predict``: names of classes, images that cannot be read, columns of a table."""

import csv
import json

import pytest
import timm
import torch
from PIL import Image

from timm_lt.cli import main

NAMES = ["owl", "Eule, klein", "[bold]crow", "ibis"]


@pytest.fixture
def predict(tmp_path, monkeypatch, capsys):
    """Runs the command on weights of four classes and some images; returns status and output."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=4).state_dict(), "own.pth")
    for k, color in enumerate(["red", "green", "blue"]):
        Image.new("RGB", (40, 40), color).save(f"{k}.png")
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n\n", encoding="utf-8")
    (tmp_path / "broken.png").write_bytes(b"no image")

    def run(*arguments):
        status = main(["predict", "test_resnet", *arguments, "--checkpoint", "own.pth"])
        return status, *capsys.readouterr()

    return run


def test_names_of_ones_own_stand_in_table_csv_and_json(predict):
    images, own = ["0.png", "1.png", "2.png", "--top", "4"], ("--names", "names.txt")
    numbers = json.loads(predict(*images, "--json")[1])
    named = json.loads(predict(*images, *own, "--json")[1])
    expected = [[NAMES[int(c["name"])] for c in entry["classes"]] for entry in numbers]
    assert [[c["name"] for c in entry["classes"]] for entry in named] == expected
    assert [[c["probability"] for c in entry["classes"]] for entry in named] == [
        [c["probability"] for c in entry["classes"]] for entry in numbers
    ]
    rows = csv.DictReader(predict(*images, *own, "--format", "csv")[1].splitlines())
    assert [[row[f"class_{k}"] for k in (1, 2, 3, 4)] for row in rows] == expected
    shown = predict(*images, *own)[1].splitlines()[1:]
    for line, name in zip(shown, [name for names in expected for name in names], strict=True):
        assert name in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nb\nc\n", "has 3 names; write a line with the name of each of the model's 4 classes"),
        ("", "has 0 names"),
        ("a\n\nc\nd", "has 3 names"),
        ("a\nb\nc\n\udcff", "UTF-8"),
        (None, "does not exist"),
    ],
)
def test_a_file_of_names_that_does_not_fit_is_one_line(text, message, predict, tmp_path):
    if text is not None:
        (tmp_path / "own.txt").write_bytes(text.encode("utf-8", "surrogateescape"))
    status, out, error = predict("0.png", "--names", "own.txt")
    assert (status, out) == (2, "")
    assert error.startswith("error: --names: own.txt ")
    assert message in error
    assert error.count("\n") == 1


def test_an_image_that_cannot_be_read_is_there_with_its_reason(predict):
    images = ["0.png", "broken.png", "1.png", "--top", "1"]
    entries, rows, table = (predict(*images, "--format", form) for form in ("json", "csv", "table"))
    assert entries[0] == rows[0] == table[0] == 2
    reasons = [entry.get("error") for entry in json.loads(entries[1])]
    assert reasons == [None, "it is not an image, or has a format that Pillow does not read", None]
    found = list(csv.DictReader(rows[1].splitlines()))
    assert [row["image"] for row in found] == images[:3]
    assert [row["error"] or None for row in found] == reasons
    assert list(found[1].values()) == ["broken.png", "", "", reasons[1]]
    assert reasons[1] in " ".join(table[1].split())
    # None of them can be read.
    assert (
        predict("broken.png", "--format", "csv")[1] == f'image,error\nbroken.png,"{reasons[1]}"\n'
    )


def test_there_are_no_more_columns_than_classes(predict):
    _, out, _ = predict("0.png", "1.png", "--format", "csv", "--top", "99")
    header, *rows = csv.reader(out.splitlines())
    pairs = [f"{kind}_{k}" for k in (1, 2, 3, 4) for kind in ("class", "probability")]
    assert header == ["image", *pairs]
    for row in rows:
        assert sum(map(float, row[2::2])) == pytest.approx(1, abs=1e-5)


@pytest.fixture
def mixed(predict, tmp_path):
    """A folder with two images among files of other kinds, at two depths."""
    folder = tmp_path / "mixed"
    (folder / "deeper").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(folder / "a.jpg")
    Image.new("RGB", (8, 8), "blue").save(folder / "deeper" / "z.png")
    # A raw file is a TIFF whose first image is a preview: Pillow would decode that.
    Image.new("RGB", (8, 8), "red").save(folder / "e.NEF", "TIFF")
    (folder / "b.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(300))
    (folder / "f.jpg").symlink_to("nowhere.jpg")
    for name in ("notes.txt", "deeper/manual.pdf", "deeper/more.txt"):
        (folder / name).write_text("text")
    for name in (".DS_Store", "Thumbs.db", ".hidden.jpg"):
        (folder / name).write_bytes(b"x")
    return folder


def test_a_folder_is_read_or_named_file_by_file(predict, mixed):
    status, out, error = predict("mixed", "--format", "csv", "--top", "1")
    assert status == 2
    found = {row["image"]: row["error"] for row in csv.DictReader(out.splitlines())}
    assert found == {
        "mixed/a.jpg": "",
        "mixed/b.heic": "files with the suffix .heic are not read; convert images to JPEG",
        "mixed/deeper/z.png": "",
        "mixed/e.NEF": "files with the suffix .nef are not read; convert images to JPEG",
        "mixed/f.jpg": "neither a file nor a directory",
    }
    line, last = error.splitlines()
    assert "skipped: 3 (2 .txt, 1 .pdf): mixed/" in line
    assert last.startswith("error: 3 of 5 images cannot be read: mixed/b.heic (")
    for hidden in ("DS_Store", "Thumbs", "hidden"):
        assert hidden not in out + error
    (mixed / "only").mkdir()
    (mixed / "only" / "notes.txt").touch()
    assert predict("mixed/only")[2] == "error: no images in mixed/only; found only 1 .txt\n"
    gone = "error: gone.png does not exist; expected an image or a folder of images\n"
    assert predict("gone.png")[2] == gone
    # Files that are named themselves: a text is not an image, and a raw file is not read either.
    assert "suffix .txt are not read" in predict("mixed/notes.txt", "--format", "csv")[1]
    assert predict("mixed/e.NEF", "--format", "csv")[0] == 2


def test_pillows_warnings_are_not_shown(predict, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)
    (tmp_path / "large").mkdir()
    # EXIF data that are cut off, and a palette with transparency in bytes.
    exif = b"Exif\0\0II*\0\x08\0\0\0\x09\0" + bytes(4)
    Image.new("RGB", (180, 180)).save(tmp_path / "large" / "0.jpg", exif=exif)
    palette = Image.new("P", (7, 7))
    palette.putpalette([1, 2, 3, 4, 5, 6])
    palette.save(tmp_path / "large" / "palette.png", transparency=b"\x00\x80")
    Image.new("RGB", (300, 300)).save(tmp_path / "large" / "too large.png")
    _, out, error = predict("large", "--json", "--workers", "1")
    assert error.startswith("error: 1 of 3 images cannot be read: large/too large.png (it has ")
    assert error.endswith("more than 0 million pixels, the most that Pillow reads)\n")
    unread = [entry["image"] for entry in json.loads(out) if "error" in entry]
    assert unread == ["large/too large.png"]
