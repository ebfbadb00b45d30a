"""The packaged checkpoint: offline, small, and as good as its table says."""

import json
from pathlib import Path

import pytest
import timm
import torch

import timm_lt
from timm_lt.data import create_splits
from timm_lt.models.published import CHECKPOINTS

FOLDER = CHECKPOINTS / "lt_test_resnet.glyph_lt"
METRICS = json.loads((FOLDER / "metrics.json").read_text())


@pytest.fixture(scope="module")
def test_split():
    splits = create_splits("glyph_lt")
    images = splits.images("test", size=None, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    return images.__getitems__(list(range(len(images))))


@pytest.mark.slow
@pytest.mark.parametrize("head", METRICS["heads"])
def test_its_table_still_holds(test_split, head):
    images, targets = test_split
    model = timm.create_model("lt_test_resnet.glyph_lt", pretrained=True, head=head).eval()
    with torch.inference_mode():
        preds = torch.cat([model(part).argmax(1) for part in images.split(500)])
    right = (preds == targets).double()
    counts = torch.tensor(METRICS["class_counts"])[targets]
    figures = METRICS["heads"][head]
    # fp16 weights may tip a few of the 5,000 images; the test split is balanced.
    assert right.mean().item() == pytest.approx(figures["all"], abs=0.004)
    assert right[counts > 100].mean().item() == pytest.approx(figures["many_shot"], abs=0.006)
    assert right[counts < 20].mean().item() == pytest.approx(figures["few_shot"], abs=0.006)


def test_it_shows_what_heads_do():
    joint = METRICS["heads"]["linear"]
    for name in ("crt", "tau_norm", "lws", "ncm", "logit_adjusted"):
        assert METRICS["heads"][name]["all"] >= joint["all"] + 0.06
        assert METRICS["heads"][name]["few_shot"] >= joint["few_shot"] + 0.20


def test_it_is_small_and_fp16():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_500_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".yaml", ".md", ".png"}
    from safetensors import safe_open

    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        assert file.get_tensor("fc.weight").dtype == torch.float16


def test_stored_tau_is_the_default_and_can_be_changed():
    stored = METRICS["selection"]["tau_norm"]["tau"]
    model = timm.create_model("lt_test_resnet.glyph_lt", pretrained=True, head="tau_norm")
    assert model.get_classifier().tau == stored
    other = timm.create_model("lt_test_resnet.glyph_lt", pretrained=True, head="tau_norm", tau=0.3)
    assert other.get_classifier().tau == 0.3


def test_another_number_of_classes_gets_a_fresh_head():
    model = timm.create_model("lt_test_resnet", pretrained=True, num_classes=7, head="lws")
    kept = timm.create_model("lt_test_resnet", pretrained=True)
    assert torch.equal(model.layer4[0].conv1.weight, kept.layer4[0].conv1.weight)
    assert model.get_classifier().out_features == 7
    with pytest.raises(timm_lt.UsageError, match="fit_head"):
        model.eval()(torch.zeros(1, 3, 32, 32))


def test_the_folder_is_an_ordinary_decoupled_checkpoint():
    model = timm_lt.create_model(f"local-dir:{FOLDER}", head="crt")
    assert model.get_classifier().kind == "crt"
    assert Path(FOLDER / "README.md").read_text().startswith("---\n")
