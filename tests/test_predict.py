"""``timm-lt predict``: names of one's own, images that cannot be read, columns of a table."""

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
    images = ["0.png", "1.png", "2.png", "--top", "4"]
    numbers = json.loads(predict(*images, "--json")[1])
    assert all(sorted(c["name"] for c in e["classes"]) == list("0123") for e in numbers)
    expected = [[NAMES[int(c["name"])] for c in entry["classes"]] for entry in numbers]
    found = json.loads(predict(*images, "--names", "names.txt", "--json")[1])
    assert [[c["name"] for c in entry["classes"]] for entry in found] == expected
    for entry, number in zip(found, numbers, strict=True):
        assert [c["probability"] for c in entry["classes"]] == [
            c["probability"] for c in number["classes"]
        ]
    rows = list(
        csv.DictReader(predict(*images, "--names", "names.txt", "--format", "csv")[1].splitlines())
    )
    assert [[row[f"class_{k}"] for k in (1, 2, 3, 4)] for row in rows] == expected
    shown = predict(*images, "--names", "names.txt")[1].splitlines()[1:]
    for line, name in zip(shown, [name for names in expected for name in names], strict=True):
        assert name in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nb\nc\n", "has 3 lines, and the model tells 4 classes apart"),
        ("a\nb\nc\nd\ne\n", "has 5 lines, and the model tells 4 classes apart"),
        ("", "has 0 lines"),
        ("a\n\nc\nd", "has no name in line 2"),
        ("a\nb\nc\n\udcff", "cannot be read: it is no UTF-8 text"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_file_of_names_that_does_not_fit_is_one_line(text, message, predict, tmp_path):
    if text is not None:
        (tmp_path / "own.txt").write_bytes(text.encode("utf-8", "surrogateescape"))
    status, out, error = predict("0.png", "--names", "own.txt")
    assert (status, out) == (2, "")
    assert error.startswith("error: --names own.txt ")
    assert message in error
    assert error.count("\n") == 1


def test_an_image_that_cannot_be_read_is_there_with_its_reason(predict):
    images = ["0.png", "broken.png", "1.png", "--top", "1"]
    entries, rows, table = (predict(*images, "--format", form) for form in ("json", "csv", "table"))
    assert entries[0] == rows[0] == table[0] == 2
    reasons = [entry.get("error") for entry in json.loads(entries[1])]
    assert reasons == [None, "it is no image, or of no format that Pillow reads", None]
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
    status, out, _ = predict("0.png", "1.png", "--format", "csv", "--top", "99")
    columns = ["image", *(f"{kind}_{k}" for k in (1, 2, 3, 4) for kind in ("class", "probability"))]
    header, *rows = csv.reader(out.splitlines())
    assert (status, header) == (0, columns)
    for row in rows:
        assert len(row) == len(columns)
        assert sum(map(float, row[2::2])) == pytest.approx(1, abs=1e-5)
