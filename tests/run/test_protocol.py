"""The protocol "paper": the test split is selected on where a paper did so, and all say so."""

import json

import pytest

import train_lt
from timm_lt.checkpoint import read_checkpoint
from timm_lt.cli import main
from timm_lt.data import create_dataset, create_splits, register_dataset
from timm_lt.data.sources import DATASETS, SELECTED_ON_TEST
from timm_lt.utils.checks import UsageError

NOTE = "hyper-parameters and the epoch were selected on the test split"


@pytest.fixture(params=["with a validation split", "without"])
def paper(request):
    @register_dataset("digits_of_a_paper", selected_on_test="Doe et al., 2020")
    def source():
        splits = ["train", "test"] if request.param == "without" else ["train", "val", "test"]
        return {split: create_dataset("digits_lt", split=split) for split in splits}

    yield "digits_of_a_paper"
    del DATASETS._parts["digits_of_a_paper"], SELECTED_ON_TEST["digits_of_a_paper"]


def test_validation_is_the_test_split_and_nothing_is_held_out(paper):
    splits = create_splits(paper, protocol="paper")
    assert splits.val_source == "test"
    assert len(splits.datasets["train"]) == 389 == int(splits.class_counts.sum())
    assert len(splits.datasets["test"]) == 300
    assert splits.datasets["val"]["image"][7] == splits.datasets["test"]["image"][7]
    assert splits.labels["val"].equal(splits.labels["test"])
    assert create_splits(paper).val_source in ("train", "val")
    message = r"test split.*no paper.*'glyph_lt'.*standard"
    with pytest.raises(UsageError, match=message):
        create_splits("glyph_lt", protocol="paper")


@pytest.mark.slow
def test_a_run_says_it_everywhere(paper, tmp_path, capsys):
    folder, heads = tmp_path / "run", "{linear: {}, tau_norm: {}, auto: {}}"
    options = ["--output", str(folder), "--data.name", paper, "--epochs", "2", "--heads", heads]
    assert train_lt.main(["lt_test_resnet.digits_lt", *options, "--protocol", "paper"]) == 0
    assert NOTE in " ".join(capsys.readouterr().out.split())
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["protocol"], metrics["validation"]) == ("paper", "test")
    assert NOTE in metrics["note"]
    for record in metrics["selection"].values():
        # Of a balanced split the objective is accuracy, and what was selected is what is reported.
        assert (record["objective"], record["split"]) == ("all", "test")
    tau = metrics["selection"]["tau_norm"]
    assert tau["val_accuracy"] == pytest.approx(metrics["heads"]["tau_norm"]["all"], abs=1e-6)
    history = sorted((folder / "state").glob("epoch_*"))[-1] / "history.json"
    validated = [record["val"]["all"] for record in json.loads(history.read_text())["epochs"]]
    assert max(validated) == pytest.approx(metrics["heads"]["linear"]["all"], abs=1e-6)
    assert read_checkpoint(folder).protocol == "paper"
    assert main(["list", str(folder)]) == 0
    assert NOTE in " ".join(capsys.readouterr().out.split())
    card = " ".join((folder / "README.md").read_text().split())
    assert card.count(NOTE) == 1
    assert "for overall accuracy on test" in card
    assert "protocol: paper" in (folder / "recipe.yaml").read_text()
