"""The folder of a run: when it may be written, resumed or deleted."""

import dataclasses

import pytest

from timm_lt.run.folder import LOCK, RECIPE, check_images, check_run_folder, prepare_run_folder
from timm_lt.run.recipe import DataRecipe, FeaturesRecipe, Recipe
from timm_lt.utils.checks import UsageError

FIRST = Recipe(epochs=3)
OTHER = Recipe(epochs=4, seed=1, heads={"ncm": {"metric": "euclidean"}})


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "a"
    prepare_run_folder(folder, FIRST)
    (folder / "state").mkdir()
    (folder / "state" / "weights").write_text("1")
    return folder


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_new_folders_may_be_used_and_others_are_left_alone(tmp_path, flags):
    check_run_folder(tmp_path / "new" / "run", FIRST, **flags)
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    check_run_folder(tmp_path / "empty", FIRST, **flags)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="files that are not a run"):
        check_run_folder(tmp_path, FIRST, **flags)
    with pytest.raises(UsageError, match="is a file"):
        check_run_folder(tmp_path / "thesis.tex", FIRST, **flags)


def test_a_run_is_only_touched_by_resume(run):
    assert (run / RECIPE).read_text() == FIRST.to_yaml()
    with pytest.raises(UsageError, match=r"holds a run; .*--resume.*--overwrite.*--output"):
        check_run_folder(run, FIRST)
    check_run_folder(run, FIRST, resume=True)
    prepare_run_folder(run, FIRST)
    assert (run / "state" / "weights").read_text() == "1"


def test_resume_refuses_another_recipe_and_names_the_differences(run):
    changed = dataclasses.replace(FIRST, heads=OTHER.heads, objective="class_mean")
    # What comes after training may change until the run is finished.
    check_run_folder(run, changed, resume=True)
    (run / "metrics.json").touch()
    with pytest.raises(UsageError, match="run of another recipe") as caught:
        check_run_folder(run, OTHER, resume=True)
    for words in ("epochs 3 there, 4 now", "seed 0 there, 1 now", "heads.crt {} there, None now"):
        assert words in str(caught.value)
    assert "heads.ncm.metric None there, 'euclidean' now" in str(caught.value)
    assert "optimizer" not in str(caught.value)
    (run / RECIPE).write_bytes(b"a: [1")
    with pytest.raises(UsageError, match=r"recipe\.yaml is not valid YAML"):
        check_run_folder(run, FIRST, resume=True)


def test_resume_refuses_other_images_and_names_the_splits(run):
    images = {split: {"images": 5, "sha256": split} for split in ("train", "val", "test")}
    check_images(run, images)
    prepare_run_folder(run, FIRST, images=images)
    check_images(run, images)
    other = images | {"train": {"images": 6, "sha256": "a"}, "test": {"images": 5, "sha256": "b"}}
    with pytest.raises(UsageError, match=r"images.*back.*--overwrite") as caught:
        check_images(run, other)
    assert "(train: 5 images there, 6 now; test: 5 images there, 5 now)" in str(caught.value)


def test_overwrite_deletes_only_when_prepared(run):
    check_run_folder(run, OTHER, overwrite=True)
    assert (run / "state" / "weights").exists()
    prepare_run_folder(run, OTHER, overwrite=True)
    assert {path.name for path in run.iterdir()} == {RECIPE, LOCK}
    assert (run / RECIPE).read_text() == OTHER.to_yaml()


def test_nothing_is_written_among_the_images(tmp_path):
    cache = FeaturesRecipe(cache_dir=str(tmp_path / "cache"))
    recipe = Recipe(data=DataRecipe("folder", str(tmp_path)), features=cache)
    with pytest.raises(UsageError) as caught:
        check_run_folder(tmp_path / "run", recipe)
    assert f"--output {tmp_path}/run lies in data.root {tmp_path}, where" in str(caught.value)
    assert f"features.cache_dir {tmp_path}/cache lies in data.root" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_kill_while_overwriting_or_starting_leaves_a_folder_that_can_be_used(run, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare_run_folder(run, OTHER, overwrite=True)
    check_run_folder(run, OTHER)
    # A kill in the middle of the first write leaves a temporary file only.
    run.mkdir()
    (run / ".recipe.yaml.x1y2").write_text("epo")
    check_run_folder(run, OTHER, resume=True)
    prepare_run_folder(run, OTHER)
    assert {path.name for path in run.iterdir()} == {RECIPE, LOCK}
    with pytest.raises(UsageError, match="cannot be written"):
        prepare_run_folder(run / RECIPE / "run", FIRST)
