"""What a recipe has: dataclasses with the meaning, the type and the default of every key."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from timm_lt.fitting import DEFAULT_HEADS
from timm_lt.metrics import OBJECTIVES
from timm_lt.utils.checks import (
    UsageError,
    check_background,
    check_choice,
    check_integer,
    check_number,
)
from timm_lt.utils.files import yaml_text

# The order of class directories in timm's ReaderImageFolder, and in torchvision's ImageFolder.
ClassOrder = Literal["timm", "sorted"]


@dataclass(frozen=True)
class DataRecipe:
    """Which images.

    Args:
        name: A registered data set; `timm-lt list` names them.
        root: Folder with the files, for data sets that read files.
        options: Options of the data set.
        image_size: Height and width in pixels; null takes the model's.
        augmentation: A registered augmentation of the training images, which are held in memory
            then; or timm, which decodes each image when it is drawn and transforms it as timm does.
        augmentation_options: Options of the augmentation; for timm those of its create_loader,
            e.g. auto_augment, scale, hflip, color_jitter, re_prob.
        background: Colour behind transparent pixels: a name such as white or black, "#rrggbb", or
            [red, green, blue]; auto is that of the model's checkpoint, or white.
        unreadable: What happens to an image that cannot be read, raise or skip; those that are
            skipped are counted.
        verify: Look for damaged files before training: at both ends of each, without decoding it.
            Only for augmentation timm, since otherwise all images are decoded first.
        val_fraction: Part of the training images of each class that is held out for validation
            where the data set has no split for it, in (0, 1).
    """

    name: str = "glyph_lt"
    root: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    augmentation: str = "none"
    augmentation_options: dict[str, Any] = field(default_factory=dict)
    background: str | list[int] = "auto"
    unreadable: Literal["raise", "skip"] = "raise"
    verify: bool = True
    val_fraction: float = 0.2

    @property
    def title(self) -> str:
        """What to call the data: the repo of the Hub, the folder of somebody's own, or the name."""
        if self.name == "hub" and self.options.get("repo"):
            return str(self.options["repo"])
        own = self.root is not None and self.name in ("folder", "list", "hub")
        return Path(self.root or "").resolve().name if own else self.name

    def __post_init__(self) -> None:
        check_number("data.val_fraction", self.val_fraction, "(0, 1)")
        if self.background != "auto":
            check_background(self.background)
        if self.image_size is not None:
            check_integer("data.image_size", self.image_size, minimum=1)


@dataclass(frozen=True)
class ModelRecipe:
    """Which network.

    Args:
        name: Any timm architecture, or an lt_* one; a tag chooses a configuration. local-dir:FOLDER
            is the model of a finished run.
        pretrained: Start from that configuration's published weights, or from those of the run.
        checkpoint: File with weights for this architecture, as some training left it, such as
            timm's train.py: .safetensors, or a pickle, of which nothing but tensors is read. Its
            classifier is taken if it is one for as many classes. Pooling, image size, normalisation
            and crop are those of the file, where it has its training's arguments.
        checkpoint_key: Key or prefix of the weights in that file, e.g. teacher, where it has
            several networks.
        class_order: How classes are numbered in weights without class names, timm (folders 1, 2,
            10) or sorted (1, 10, 2), as torchvision; null finds it out on training images where the
            two differ.
        fresh_classifier: Draw the classifier anew, from the seed, and start from the pretrained
            backbone alone.
        trained: Modules that the representation stage trains beside the classifier, e.g.
            [layer4.2], or [last_block], which is found on any architecture; [] is the classifier
            alone. The others are frozen. null trains all.
        bn: What the frozen modules do, frozen (evaluation mode, batch norm keeps its statistics) or
            shift (training mode, they move).
        options: Further arguments of timm.create_model, e.g. global_pool; and mean, std,
            interpolation, crop_pct and crop_mode of its images. They come before those of the
            checkpoint. A head= that the run in FOLDER has not fitted is put on its classifier anew.
    """

    name: str = "lt_test_resnet"
    pretrained: bool = False
    checkpoint: str | None = None
    checkpoint_key: str | None = None
    class_order: ClassOrder | None = None
    fresh_classifier: bool = False
    trained: list[str] | None = None
    bn: Literal["frozen", "shift"] = "frozen"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.fresh_classifier and not (self.pretrained or self.checkpoint):
            raise UsageError(
                "model.fresh_classifier has no effect without model.pretrained: leave it out"
            )
        if self.checkpoint_key and not self.checkpoint:
            raise UsageError("model.checkpoint_key has no effect without model.checkpoint")
        if self.pretrained and self.checkpoint:
            raise UsageError(
                "model.checkpoint has all weights, and model.pretrained no effect: leave it out"
            )


@dataclass(frozen=True)
class SamplerRecipe:
    """How often each class is drawn in the representation stage.

    Args:
        name: A registered sampler.
        options: Options of the sampler.
    """

    name: str = "instance_balanced"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LossRecipe:
    """What the representation stage minimises.

    Args:
        name: A registered loss.
        options: Options of the loss.
    """

    name: str = "cross_entropy"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimizerRecipe:
    """How the representation stage updates weights.

    Args:
        name: An optimiser of timm; sgd is with Nesterov momentum there.
        lr: Peak learning rate, > 0.
        weight_decay: On all weights but biases and norms, >= 0.
        momentum: In [0, 1).
        options: Further arguments of timm.optim.create_optimizer_v2.
    """

    name: str = "sgd"
    lr: float = 0.1
    weight_decay: float = 5e-4
    momentum: float = 0.9
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of ``timm.optim.create_optimizer_v2``."""
        named = {"lr": self.lr, "weight_decay": self.weight_decay, "momentum": self.momentum}
        return {"opt": self.name, **named, **self.options}


@dataclass(frozen=True)
class SchedulerRecipe:
    """How the learning rate changes, update by update.

    Args:
        name: A scheduler of timm; plateau follows the accuracy on validation.
        warmup_epochs: Epochs of linear warm-up, counted within the epochs.
        options: Further arguments of timm.scheduler.create_scheduler_v2.
    """

    name: str = "cosine"
    warmup_epochs: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of ``timm.scheduler.create_scheduler_v2``."""
        return {"sched": self.name, "warmup_epochs": self.warmup_epochs, **self.options}

    def __post_init__(self) -> None:
        check_integer("scheduler.warmup_epochs", self.warmup_epochs, minimum=0)


@dataclass(frozen=True)
class MixupRecipe:
    """How images are mixed with each other; without an alpha they are not.

    Args:
        mixup_alpha: Of the Beta distribution of mixup, >= 0.
        cutmix_alpha: Of the Beta distribution of cutmix, >= 0.
        remix_kappa: From how many times the images on, >= 1, a mixed image is of the rarer class
            alone, if the frequent one has a part below remix_tau in it; 3 in the paper. null is
            mixup and cutmix as they are.
        remix_tau: In [0, 1]; null is 0.5.
        off_epoch: Epochs after which images are no longer mixed; null is never.
        options: Further arguments of timm.data.Mixup, e.g. prob, switch_prob, mode.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    remix_kappa: float | None = None
    remix_tau: float | None = None
    off_epoch: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.off_epoch is not None:
            check_integer("mixup.off_epoch", self.off_epoch, minimum=1)

    def mixes(self) -> bool:
        """Returns whether images are mixed at all."""
        return bool(self.mixup_alpha or self.cutmix_alpha or self.options.get("cutmix_minmax"))

    def arguments(self) -> dict[str, Any]:
        """Returns the argument ``mixup`` of ``timm_lt.training.train_representation``."""
        alphas = {"mixup_alpha": self.mixup_alpha, "cutmix_alpha": self.cutmix_alpha}
        remix = {"remix_kappa": self.remix_kappa, "remix_tau": self.remix_tau}
        return alphas | remix | self.options


@dataclass(frozen=True)
class EmaRecipe:
    """Whether the weights that go on are a moving average.

    Args:
        decay: In [0, 1), e.g. 0.9998; null is no average.
        options: Further arguments of timm.utils.ModelEmaV3, e.g. use_warmup.
    """

    decay: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of ``timm.utils.ModelEmaV3``."""
        return ({} if self.decay is None else {"decay": self.decay}) | self.options


@dataclass(frozen=True)
class FeaturesRecipe:
    """How the features of all images are taken for the classifier stage.

    Args:
        views: Augmented views of each training image; null is the image as it is.
        dtype: How features are kept; float16 and bfloat16 take half the room.
        compute_dtype: What the backbone computes in; bfloat16 is fast where it is native.
        cache_dir: Folder for files of features, which later runs with the same backbone and images
            read; null keeps features in memory.
    """

    views: int | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if self.views is not None:
            check_integer("features.views", self.views, minimum=1)

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of ``timm_lt.extract_features``."""
        dtypes = {"dtype": self.dtype, "compute_dtype": self.compute_dtype}
        return {"cache_dir": self.cache_dir, **dtypes}


@dataclass(frozen=True)
class Recipe:
    """A complete experiment.

    Args:
        data: Which images.
        model: Which network.
        sampler: How often each class is drawn.
        loss: What is minimised.
        optimizer: How weights are updated.
        scheduler: How the learning rate changes.
        mixup: How images are mixed.
        ema: Whether weights are averaged.
        epochs: Epochs of the representation stage, >= 0. 0 trains nothing but heads: those of a
            model with weights, whose joint classifier is fitted first if it is not for these
            classes.
        batch_size: Images per update, over all processes, >= 1.
        accumulation_steps: Parts in which a process takes its share of the batch, >= 1.
        clip_grad: Threshold of the gradient, > 0; null does not clip.
        clip_mode: Of the norm of all gradients, of each value, or agc, relative to the weights.
        max_norm: Largest length of a class's weights in the joint classifier, > 0; null does not
            limit it.
        validate_every: Epochs from one validation to the next, >= 1.
        keep: Whose weights go on, of the best epoch on validation (overall accuracy) or the last.
        features: How features are taken for the heads.
        heads: Heads to fit, each with its options; timm-lt list names them. The option stage says
            on what, features or images; the latter trains crt and lws as their paper does. A head
            under a name of its own has the option kind, e.g. {crt_smote: {kind: crt, smote: 100}}.
            One called auto is the best of the others on validation.
        objective: What the heads' options, and auto, are chosen by on validation: all (accuracy),
            class_mean, few_shot, harmonic_mean of the shot groups, or worst_class; null is all, or
            class_mean where validation is as long-tailed as train, from which it was held out.
        protocol: standard selects on validation, and reads the test split once, at the end. paper
            has the test split for validation and holds nothing out; it is only there for data where
            a paper selected so, to compare with it, and whatever is written says so.
        shot_rule: fb counts > 100 as many-shot and < 20 as few-shot; oltr takes >= and <=.
        mixed_precision: auto takes bf16 where the processor computes it natively.
        seed: Seed of everything random, from 0 to 2^63 - 1.
    """

    data: DataRecipe = field(default_factory=DataRecipe)
    model: ModelRecipe = field(default_factory=ModelRecipe)
    sampler: SamplerRecipe = field(default_factory=SamplerRecipe)
    loss: LossRecipe = field(default_factory=LossRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    scheduler: SchedulerRecipe = field(default_factory=SchedulerRecipe)
    mixup: MixupRecipe = field(default_factory=MixupRecipe)
    ema: EmaRecipe = field(default_factory=EmaRecipe)
    epochs: int = 30
    batch_size: int = 128
    accumulation_steps: int = 1
    clip_grad: float | None = None
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    max_norm: float | None = None
    validate_every: int = 1
    keep: Literal["best", "last"] = "best"
    features: FeaturesRecipe = field(default_factory=FeaturesRecipe)
    heads: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {name: {} for name in DEFAULT_HEADS}
    )
    # Not a Literal: the parser's message for one or null is a riddle.
    objective: str | None = None
    protocol: Literal["standard", "paper"] = "standard"
    shot_rule: Literal["fb", "oltr"] = "fb"
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("epochs", self.epochs, minimum=0)
        if self.epochs == 0 and not (self.model.pretrained or self.model.checkpoint):
            raise UsageError(
                "epochs 0 trains no backbone: it needs model.pretrained, or a model.checkpoint"
            )
        check_integer("batch_size", self.batch_size, minimum=1)
        check_integer("accumulation_steps", self.accumulation_steps, minimum=1)
        check_integer("validate_every", self.validate_every, minimum=1)
        if self.objective is not None:
            check_choice("objective", self.objective, OBJECTIVES)
        check_integer("seed", self.seed, minimum=0, maximum=2**63 - 1)

    def to_yaml(self) -> str:
        """Returns the recipe as YAML that reads back to the same recipe."""
        return yaml_text(dataclasses.asdict(self))


@dataclass(frozen=True)
class RunOptions:
    """How to run, as opposed to what.

    Attributes:
        output: Folder of the run; None means ``output/<recipe name>``.
        resume: Go on with the run in that folder, or start it if there is none.
        overwrite: Delete the run in that folder first.
        threads: Threads per process on a CPU; None is this process's share of the cores.
        workers: Processes that decode images, for each that trains; None is its share of the cores.
        compile: Compile the model with torch.compile.
        tracker: ``"none"``, or a tracker that accelerate knows and that is installed.
        quiet: Print the final table only.
        verbose: Say each step, and where in the code an error arose.
        json: Print ``metrics.json`` instead of the table.
        push_to_hub: Repo of the Hub to push the finished run to, namespace/name.
        private: A new repo is private.
        license: Licence of the weights for the model card, such as apache-2.0.
    """

    output: str | None = None
    resume: bool = False
    overwrite: bool = False
    threads: int | None = None
    workers: int | None = None
    compile: bool = False
    tracker: str = "none"
    quiet: bool = False
    verbose: bool = False
    json: bool = False
    push_to_hub: str | None = None
    private: bool = False
    license: str | None = None
