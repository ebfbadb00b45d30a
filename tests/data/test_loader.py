"""timm's loader over any sampler: the images that it shows, in one process and in two."""

import inspect
import json
import multiprocessing
import types
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration
from PIL import Image
from timm.data import FastCollateMixup, IterableImageDataset
from timm.data import create_loader as timm_create_loader
from timm.data.loader import PrefetchLoader
from timm.data.scheduled_sampler import ScheduledBatchSampler
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

import timm_lt
import train_lt
from timm_lt.data import loader as loader_module
from timm_lt.data.loader import NumberedSampler
from timm_lt.samplers import create_sampler

ROOT = Path(train_lt.__file__).parent
LABELS = [0] * 23 + [1] * 9 + [2] * 4 + [3]
# Pixels come back as they are.
RAW = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255), "num_workers": 0}
TRAINING = {**RAW, "is_training": True, "color_jitter": 0.0}


class Plain(Dataset):
    """Image ``i`` is of one colour, (i, label, 0), which survives resizing, cropping and flips."""

    def __init__(self, labels=LABELS, noise=False):
        self.labels, self.noise, self.transform, self.epochs = list(labels), noise, None, []

    def __len__(self):
        return len(self.labels)

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __getitem__(self, index):
        pixels = np.full((8, 8, 3), (index, self.labels[index], 0)).astype(np.uint8)
        if self.noise:
            pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        return (self.transform(image) if self.transform else image), self.labels[index]


def indices(batch):
    images, targets = batch
    # Without the prefetcher they come by way of fractions.
    images = images.float().round()
    assert (images == images[:, :, :1, :1]).all()
    assert images[:, 1, 0, 0].tolist() == targets.tolist()
    return [int(value) for value in images[:, 0, 0, 0].tolist()]


def flat(batches):
    return [index for batch in batches for index in batch]


def shown(loader):
    return [indices(batch) for batch in loader]


def chunks(stream, size):
    return [stream[i : i + size] for i in range(0, len(stream), size)]


def stream(sampler, epoch):
    return sampler.epoch_indices(epoch).tolist()


def balanced(**options):
    return create_sampler("class_balanced", LABELS, **{"num_samples": 40, **options})


def accelerator_of(**options):
    return Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**options))


@pytest.fixture
def one_process():
    """Makes an accelerator of one process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerator_of
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("use_prefetcher", [True, False])
def test_an_epoch_is_the_stream_of_the_sampler(use_prefetcher, num_workers):
    sampler = balanced()
    options = {**TRAINING, "num_workers": num_workers, "use_prefetcher": use_prefetcher}
    data = Plain()
    loader = timm_lt.create_loader(data, 8, 8, sampler=sampler, **options)
    assert isinstance(loader.loader, PrefetchLoader if use_prefetcher else DataLoader)
    assert len(loader) == 5
    for epoch in (0, 1, 5, 0):
        loader.set_epoch(epoch)
        assert shown(loader) == chunks(stream(sampler, epoch), 8)
    assert data.epochs == [0, 1, 5, 0]
    assert loader.sampler is sampler
    assert loader.dataset is data


def test_pixels_are_those_of_timm_for_the_same_images():
    sampler = balanced(num_samples=22)
    order = sampler.epoch_indices().tolist()
    loader = timm_lt.create_loader(Plain(noise=True), 16, 5, sampler=sampler, num_workers=0)

    # timm's own over the same images in that order.
    class Permuted(Plain):
        def __len__(self):
            return len(order)

        def __getitem__(self, row):
            return super().__getitem__(order[row])

    permuted, device = Permuted(noise=True), torch.device("cpu")
    expected = timm_create_loader(permuted, 16, 5, num_workers=0, device=device)
    for (images, targets), (images_, targets_) in zip(loader, expected, strict=True):
        assert images.equal(images_)
        assert targets.equal(targets_)


@pytest.mark.parametrize(
    "options",
    [
        {"num_workers": 1, "persistent_workers": True, "worker_seeding": "part"},
        {"num_workers": 1, "persistent_workers": False, "pin_memory": True},
        {"num_workers": 0, "is_training": False},
        {"num_workers": 1, "use_multi_epochs_loader": True},
        {"num_workers": 1, "use_prefetcher": False},
    ],
)
def test_every_other_setting_stays_and_no_worker_starts(options):
    before = multiprocessing.active_children()
    options = {"is_training": True, **options}
    ours = timm_lt.create_loader(Plain(), 8, 4, sampler=balanced(), **options).loader
    theirs = timm_create_loader(Plain(), 8, 4, device=torch.device("cpu"), **options)
    assert multiprocessing.active_children() == before
    assert type(ours) is type(theirs)
    if isinstance(ours, PrefetchLoader):
        ours, theirs = ours.loader, theirs.loader
    assert type(ours) is type(theirs)
    # Whatever a DataLoader has, in this version of torch.
    settings = set(inspect.signature(DataLoader).parameters)
    for name in settings - {"dataset", "shuffle", "sampler", "batch_sampler"}:
        mine, other = getattr(ours, name), getattr(theirs, name)
        if name == "worker_init_fn":
            mine, other = ((f.func, f.keywords) for f in (mine, other))
        assert mine == other, name


def test_evaluation_shows_every_draw_of_any_sampler_and_timm_has_its_own_order_without_one():
    loader = timm_lt.create_loader(Plain(), 8, 8, sampler=range(10), **RAW)
    assert shown(loader) == [list(range(8)), [8, 9]]
    loader = timm_lt.create_loader(Plain(), 8, 2, sampler=[4, 2, 4, 0], **RAW)
    assert shown(loader) == [[4, 2], [4, 0]]
    assert shown(timm_lt.create_loader(Plain(), 8, 8, **RAW)) == chunks(list(range(37)), 8)
    random_order = timm_lt.create_loader(Plain(), 8, 8, **TRAINING)
    random_order.set_epoch(3)
    first, second = (flat(shown(random_order)) for _ in range(2))
    assert first != second
    assert len(set(first)) == 32


class Own(Plain):
    """Items of a layout of their own, whatever transform is set."""

    def __init__(self, layout):
        super().__init__()
        self.layout, self.drawn = layout, Plain()

    def __getitem__(self, index):
        return self.layout(*self.drawn[index])


ROWS = range(len(LABELS))
PAIRS = [Plain()[row] for row in ROWS]
TENSORS = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image, _ in PAIRS])
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
TABLE = datasets.Dataset.from_dict(
    {"image": [image for image, _ in PAIRS], "label": LABELS}, FEATURES
)
OTHERS = {
    "subset": lambda: Subset(Plain(), ROWS),
    "one after the other": lambda: ConcatDataset([Subset(Plain(), ROWS[:9]), PAIRS[9:]]),
    "pairs": lambda: PAIRS,
    "three parts": lambda: Own(lambda image, label: (image, label, "file")),
    "mapping": lambda: Own(lambda image, label: {"y": label, "img": image}),
    "transform that is not used": lambda: Own(lambda image, label: (image, label)),
    "label in an array": lambda: Own(lambda image, label: (image, np.array(label, np.uint8))),
    "images as arrays": lambda: Own(lambda image, label: (np.array(image), label)),
    "tensors": lambda: TensorDataset(TENSORS, torch.tensor(LABELS)),
    "table": lambda: TABLE.rename_columns({"image": "picture", "label": "labels"}),
    "table as tensors": lambda: TABLE.with_format("torch"),
    "table with a transform": lambda: TABLE.with_transform(lambda rows: {**rows}),
}


@pytest.mark.parametrize("layout", OTHERS)
def test_a_data_set_of_any_layout_shows_its_images(layout):
    data, sampler = OTHERS[layout](), balanced()
    options = {**RAW, "use_prefetcher": layout != "mapping"}
    loader = timm_lt.create_loader(data, 8, 8, sampler=sampler, **options)
    assert shown(loader) == chunks(sampler.epoch_indices().tolist(), 8)
    assert timm_lt.dataset_labels(loader.dataset).tolist() == LABELS
    assert getattr(data, "transform", None) is None


def test_paths_of_files_are_images_and_tensors_stay_as_they_are_without_a_prefetcher(tmp_path):
    for row in (3, 24):
        PAIRS[row][0].save(tmp_path / f"{row}.png")
    data = [(str(tmp_path / "24.png"), 1), (tmp_path / "3.png", 0)]
    assert shown(timm_lt.create_loader(data, 8, 2, **RAW)) == [[24, 3]]
    data = TensorDataset(TENSORS / 255, torch.tensor(LABELS))
    ((images, labels),) = timm_lt.create_loader(data, 4, 37, use_prefetcher=False, num_workers=0)
    assert images.equal(TENSORS / 255)
    assert labels.tolist() == LABELS


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (TensorDataset(TENSORS / 255, torch.tensor(LABELS)), r"Tensor of shape \(3, 8, 8\), .*32"),
        (Own(lambda image, label: (image, "ant")), "item 0 of a Own has a Image .* label 'ant'"),
        (Plain([0.5] * 8), "item 0 of a Plain has a Image and the label 0.5; .* integer labels"),
        (Own(lambda image, label: image), "item 0 of a Own is a Image; expected an image and its"),
        (Own(lambda image, label: 1 // 0), "item 0 of a Own cannot be drawn .ZeroDivisionError"),
        (Subset(PAIRS, []), "the 0 images of an epoch do not fill a batch"),
        (TABLE.select_columns(["label"]), "no column of images; the columns are label"),
        ("photos", "a str is not a data set"),
        (DataLoader(PAIRS), "a DataLoader is not a data set"),
    ],
)
def test_data_sets_that_cannot_be_loaded_are_refused(data, words):
    with pytest.raises(timm_lt.UsageError, match=words):
        next(iter(timm_lt.create_loader(data, 8, 8, **RAW)))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_mixup_can_be_turned_off(num_workers):
    mixup = FastCollateMixup(mixup_alpha=1.0, label_smoothing=0.0, num_classes=4)
    options = {**TRAINING, "collate_fn": mixup, "num_workers": num_workers}
    sampler = balanced()
    loader = timm_lt.create_loader(Plain(), 8, 8, sampler=sampler, **options)
    drawn = torch.tensor([LABELS[i] for i in sampler.epoch_indices()])
    hard = torch.nn.functional.one_hot(drawn, 4).float()
    for enabled in (True, False):
        loader.mixup_enabled = enabled
        assert loader.mixup_enabled == enabled
        loader.set_epoch(0)
        targets = torch.cat([labels for _, labels in loader])
        assert targets.equal(hard) != enabled
        # The classes of a batch are those of its images.
        assert torch.allclose(targets.view(-1, 8, 4).sum(1), hard.view(-1, 8, 4).sum(1))


def test_use_multi_epochs_loader_goes_on_by_itself():
    sampler = balanced()
    options = {**TRAINING, "use_multi_epochs_loader": True}
    loader = timm_lt.create_loader(Plain(), 8, 8, sampler=sampler, **options)
    loader.set_epoch(2)
    for epoch in (2, 3, 4):
        assert shown(loader) == chunks(stream(sampler, epoch), 8)
        loader.set_epoch(epoch + 1)


SCHEDULED = {"input_size_choices": [8, 16, 24], "batch_size_choices": [9, 4, 3]}


def by_hand(order, epoch, **options):
    """The scheduled batches of a list of images: (images, side) each."""
    batches = ScheduledBatchSampler(order, [9, 4, 3], seed=5, **options)
    batches.set_epoch(epoch)
    return [([i for i, _ in batch], [8, 16, 24][batch[0][1]]) for batch in batches]


def shown_with_sides(loader):
    return [(indices(batch), batch[0].shape[-1]) for batch in loader]


@pytest.mark.parametrize(
    "options",
    [{}, {"num_batches": 9}, {"batch_choice_schedule": "progressive", "batch_schedule_epochs": 3}],
)
def test_scheduled_sizes(options):
    sampler = balanced()
    loader = timm_lt.create_loader(
        Plain(), 8, 8, sampler=sampler, batch_choice_seed=5, **SCHEDULED, **options, **TRAINING
    )
    names = {"batch_choice_schedule": "choice_schedule", "batch_schedule_epochs": "schedule_epochs"}
    options = {names.get(name, name): value for name, value in options.items()}
    sides = set()
    for epoch in (0, 2, 1):
        loader.set_epoch(epoch)
        batches = shown_with_sides(loader)
        assert batches == by_hand(stream(sampler, epoch), epoch, **options)
        assert len(loader) == len(batches)
        sides |= {side for _, side in batches}
    assert sides == {8, 16, 24}
    assert loader.sampler is sampler


def test_iterable_data_sets_load_as_in_timm():
    class Reader(list):
        epoch = None

        def set_epoch(self, epoch):
            self.epoch = epoch

    data = IterableImageDataset(None, reader=Reader(PAIRS[:6]))
    loader = timm_lt.create_loader(data, 8, 4, **RAW)
    loader.set_epoch(1)
    assert data.reader.epoch == 1
    assert shown(loader) == [[0, 1, 2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"is_trainig": True}, r"unknown option .*'is_trainig' \(did you mean 'is_training'\?\)"),
        ({"num_aug_repeats": 3}, "num_aug_repeats= does not go with sampler="),
        ({"sampler": create_sampler("reversed", [0, 1])}, "from 2 labels, but the data set has 37"),
        ({"batch_size": 41, "is_training": True}, "the 40 images of .* do not fill a batch of 41"),
    ],
)
def test_mistakes_are_named(options, message):
    options = {"sampler": balanced(), "batch_size": 8, **options}
    with pytest.raises(timm_lt.UsageError, match=message):
        timm_lt.create_loader(Plain(), 8, **options)


def test_several_processes_need_the_accelerator(monkeypatch, one_process):
    with pytest.raises(timm_lt.UsageError, match="distributed= does not go with accelerator="):
        timm_lt.create_loader(Plain(), 8, 8, accelerator=one_process(), distributed=True)
    monkeypatch.setattr(loader_module, "is_initialized", lambda: True)
    state = types.SimpleNamespace(num_processes=2)
    monkeypatch.setattr(loader_module, "PartialState", lambda: state)
    loader = timm_lt.create_loader(Plain(), 8, 8, sampler=balanced(), **RAW)
    with pytest.raises(timm_lt.UsageError, match="accelerate runs 2 processes, each of which"):
        next(iter(loader))


@pytest.mark.parametrize("use_prefetcher", [True, False])
@pytest.mark.parametrize("split_batches", [True, False])
def test_accelerate_in_one_process(one_process, split_batches, use_prefetcher):
    options = {**TRAINING, "accelerator": one_process(split_batches=split_batches)}
    options["use_prefetcher"] = use_prefetcher
    sampler = balanced()
    loader = timm_lt.create_loader(Plain(), 8, 8, sampler=sampler, **options)
    assert len(loader) == 5
    # Accelerate counts by itself, and from any epoch that is set.
    assert [flat(shown(loader)) for _ in range(2)] == [stream(sampler, e) for e in (0, 1)]
    loader.set_epoch(7)
    assert [flat(shown(loader)) for _ in range(2)] == [stream(sampler, e) for e in (7, 8)]
    options |= {**SCHEDULED, "batch_choice_seed": 5}
    loader = timm_lt.create_loader(Plain(), 8, 8, sampler=sampler, **options)
    for epoch in (4, 0):
        loader.set_epoch(epoch)
        assert shown_with_sides(loader) == by_hand(stream(sampler, epoch), epoch)


def test_gather_for_metrics_counts_draws_not_images(one_process):
    accelerator = one_process()
    for num_samples in (5, 8, 10, 45):
        sampler = balanced(num_samples=num_samples)
        options = {**RAW, "sampler": sampler, "accelerator": accelerator}
        loader = timm_lt.create_loader(Plain(), 8, 4, **options)
        gathered = [indices(accelerator.gather_for_metrics(batch)) for batch in loader]
        assert gathered == chunks(sampler.epoch_indices().tolist(), 4)


def test_gradients_are_accumulated_to_the_last_batch(one_process):
    accelerator = one_process()
    accelerator.gradient_accumulation_steps = 3
    options = {**TRAINING, "sampler": balanced(), "accelerator": accelerator}
    steps = []
    for _ in timm_lt.create_loader(Plain(), 8, 8, **options):
        with accelerator.accumulate(torch.nn.Linear(1, 1)):
            steps.append(accelerator.sync_gradients)
    assert steps == [False, False, True, False, True]


def test_draws_are_images_and_numbers_that_never_come_again():
    sampler = create_sampler("class_balanced", [0] * 7 + [1] * 3, num_samples=12, seed=4)
    numbered = NumberedSampler(sampler, 10, 9)
    seen = []
    for epoch in (0, 1, 5):
        numbered.set_epoch(epoch)
        draws = list(numbered)
        assert len(draws) == len(numbered) == 9
        images = sampler.epoch_indices(epoch)[:9].tolist()
        expected = [(9 * epoch + number, image) for number, image in enumerate(images)]
        assert [divmod(draw, 10) for draw in draws] == expected
        seen += draws
    assert len(set(seen)) == 27


# Two processes. ----------------------------------------------------------------------------------

RANKS = """
import json, sys
sys.path.insert(0, {tests!r})
from test_loader import ranks_of_accelerate, ranks_of_torch
{function}({folder!r})
"""


def ranks_of_accelerate(folder):
    found = {}
    for split in (True, False):
        accelerator = accelerator_of(split_batches=split)
        assert accelerator.num_processes == 2
        found["rank"] = accelerator.process_index
        options = {**TRAINING, "accelerator": accelerator, "sampler": balanced()}
        loader = timm_lt.create_loader(Plain(), 8, 8, **options)
        found[f"training {split}"] = epochs_of(loader)
        gathered = found[f"evaluation {split}"] = {}
        for num_images in range(1, 22):
            data = Plain((LABELS * 2)[:num_images])
            loader = timm_lt.create_loader(data, 8, 4, accelerator=accelerator, **RAW)
            gathered[num_images] = gather(accelerator, loader)
        for num_samples in (5, 8, 11):
            sampler = balanced(num_samples=num_samples)
            own = {"sampler": sampler, "accelerator": accelerator, **RAW}
            loader = timm_lt.create_loader(Plain(), 8, 4, **own)
            gathered[f"draws {num_samples}"] = gather(accelerator, loader)
        found[f"errors {split}"] = [
            error_of(sampler=balanced()),
            error_of(accelerator=accelerator, **SCHEDULED, is_training=True),
            error_of(accelerator=accelerator, batch_size=32, is_training=True),
        ]
        AcceleratorState._reset_state(reset_partial_state=False)
    (Path(folder) / f"{found['rank']}.json").write_text(json.dumps(found))
    accelerator.wait_for_everyone()
    accelerator.end_training()


def epochs_of(loader):
    found = {}
    for epoch in (0, 1, 6):
        loader.set_epoch(epoch)
        found[epoch] = shown(loader)
    return found


def gather(accelerator, loader):
    return [index for batch in loader for index in indices(accelerator.gather_for_metrics(batch))]


def error_of(batch_size=8, **options):
    try:
        next(iter(timm_lt.create_loader(Plain(), 8, batch_size, **options)))
    except timm_lt.UsageError as error:
        return str(error)
    return ""


def ranks_of_torch(folder):
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    options = {**TRAINING, "distributed": True}
    loader = timm_lt.create_loader(Plain(), 8, 4, sampler=balanced(num_samples=41), **options)
    found = {"training": epochs_of(loader)}
    found["timm"] = epochs_of(timm_lt.create_loader(Plain(), 8, 4, **options))
    loader = timm_lt.create_loader(Plain(), 8, 4, **{**RAW, "distributed": True})
    found["evaluation"] = shown(loader)
    found["error"] = error_of(sampler=range(37), distributed=True)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run_ranks(server, function, folder):
    script = folder / "ranks.py"
    tests = str(Path(__file__).parent)
    script.write_text(RANKS.format(tests=tests, function=function, folder=str(folder)))
    for rank in server.on_ranks(2, script=script):
        assert rank.status == 0, rank.err
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_of_accelerate(server, tmp_path):
    ranks = run_ranks(server, "ranks_of_accelerate", tmp_path)
    for epoch in (0, 1, 6):
        batches = chunks(stream(balanced(), epoch), 8)
        split = [rank["training True"][str(epoch)] for rank in ranks]
        assert split == [[b[:4] for b in batches], [b[4:] for b in batches]]
        # Five batches: in training the last has no partner and is left out.
        whole = [rank["training False"][str(epoch)] for rank in ranks]
        assert whole == [batches[0:4:2], batches[1:4:2]]
    for split_batches in ("True", "False"):
        for rank in ranks:
            evaluation = rank[f"evaluation {split_batches}"]
            for num_images in range(1, 22):
                assert evaluation[str(num_images)] == list(range(num_images))
            for n in (5, 8, 11):
                assert evaluation[f"draws {n}"] == stream(balanced(num_samples=n), 0)
            without, scheduled, short = rank[f"errors {split_batches}"]
            assert "accelerate runs 2 processes" in without
            assert "input_size_choices does not go with several processes" in scheduled
            # 37 images fill one batch of 32, but not one in each of two processes.
            assert ("37 images of an epoch do not fill a batch of 32" in short) == (
                split_batches == "False"
            )


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_of_torch(server, tmp_path):
    ranks = run_ranks(server, "ranks_of_torch", tmp_path)
    for epoch in (0, 1, 6):
        drawn = stream(balanced(num_samples=41), epoch)
        drawn.append(drawn[0])
        for rank in range(2):
            assert ranks[rank]["training"][str(epoch)] == chunks(drawn[rank::2], 4)[:5]
        images = [index for rank in ranks for batch in rank["timm"][str(epoch)] for index in batch]
        assert len(images) == 2 * 16
        assert len(set(images)) >= 31
    assert ranks[0]["timm"]["0"] != ranks[0]["timm"]["1"]
    evaluation = [flat(rank["evaluation"]) for rank in ranks]
    assert evaluation == [list(range(0, 37, 2)), [*range(1, 37, 2), 0]]
    for rank in ranks:
        assert "every process would draw the same from a range" in rank["error"]
