import pytest

from timm_lt.run.folder import LOCK, RECIPE, check_images, check_run_folder, prepare_run_folder
from timm_lt.run.recipe import Recipe
from timm_lt.utils.checks import UsageError

FIRST = Recipe(epochs=3)
OTHER = Recipe(epochs=4, seed=1, heads={"ncm": {"metric": "euclidean"}})


def check(folder, recipe=FIRST, *, resume=False, overwrite=False):
    check_run_folder(folder, recipe, resume=resume, overwrite=overwrite)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "a"
    prepare_run_folder(folder, FIRST, overwrite=False)
    (folder / "state").mkdir()
    (folder / "state" / "weights").write_text("1")
    return folder


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_new_and_empty_folders_may_be_used(tmp_path, flags):
    check(tmp_path / "new" / "run", **flags)
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    check(tmp_path / "empty", **flags)


def test_a_run_is_only_touched_by_resume(run):
    assert (run / RECIPE).read_text() == FIRST.to_yaml()
    with pytest.raises(UsageError, match=r"holds a run; .*--resume.*--overwrite.*--output"):
        check(run)
    check(run, resume=True)
    prepare_run_folder(run, FIRST, overwrite=False)
    assert (run / "state" / "weights").read_text() == "1"


def test_resume_refuses_another_recipe_and_names_the_differences(run):
    (run / "metrics.json").touch()  # finished: its heads are made
    with pytest.raises(UsageError, match="run of another recipe") as caught:
        check(run, OTHER, resume=True)
    message = str(caught.value)
    assert "epochs 3 there, 4 now" in message
    assert "seed 0 there, 1 now" in message
    assert "heads.ncm.metric None there, 'euclidean' now" in message
    assert "heads.crt {} there, None now" in message
    assert "optimizer" not in message


def test_resume_refuses_other_images_and_names_the_splits(run):
    images = {split: {"images": 5, "sha256": split} for split in ("train", "val", "test")}
    check_images(run, images)
    prepare_run_folder(run, FIRST, overwrite=False, images=images)
    check_images(run, images)
    other = images | {"train": {"images": 6, "sha256": "a"}, "test": {"images": 5, "sha256": "b"}}
    with pytest.raises(UsageError, match=r"images.*back.*--overwrite") as caught:
        check_images(run, other)
    assert "(train: 5 images there, 6 now; test: 5 images there, 5 now)" in str(caught.value)


def test_overwrite_deletes_only_when_prepared(run):
    check(run, OTHER, overwrite=True)
    assert (run / "state" / "weights").exists()
    prepare_run_folder(run, OTHER, overwrite=True)
    assert {path.name for path in run.iterdir()} == {RECIPE, LOCK}
    assert (run / RECIPE).read_text() == OTHER.to_yaml()


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_what_is_not_a_run_is_refused(tmp_path, flags):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="files that are not a run"):
        check(tmp_path, **flags)
    with pytest.raises(UsageError, match="is a file"):
        check(tmp_path / "thesis.tex", **flags)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_resume_and_overwrite_exclude_each_other(tmp_path):
    with pytest.raises(UsageError, match="choose one"):
        check(tmp_path, resume=True, overwrite=True)


@pytest.mark.parametrize("content", [b"a: [1", b"\xff\xfe\xff"])
def test_resume_of_a_broken_recipe_says_so(run, content):
    (run / RECIPE).write_bytes(content)
    with pytest.raises(UsageError, match=r"recipe\.yaml is not valid YAML"):
        check(run, resume=True)
    check(run, overwrite=True)


def test_a_kill_while_overwriting_or_starting_leaves_a_folder_that_can_be_used(
    tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    prepare_run_folder(folder, FIRST, overwrite=False)
    (folder / "heads").mkdir()
    (folder / "heads" / "crt.safetensors").write_bytes(b"")

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare_run_folder(folder, OTHER, overwrite=True)
    check_run_folder(folder, OTHER, resume=False, overwrite=False)
    # A kill in the middle of the first write leaves a temporary file only.
    folder.mkdir()
    (folder / ".recipe.yaml.x1y2").write_text("epo")
    check_run_folder(folder, OTHER, resume=True, overwrite=False)
    prepare_run_folder(folder, OTHER, overwrite=False)
    assert {path.name for path in folder.iterdir()} == {RECIPE, LOCK}


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        prepare_run_folder(tmp_path / "file" / "run", FIRST, overwrite=False)
