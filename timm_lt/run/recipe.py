"""The recipe: dataclasses with the meaning, the type and the default of every key."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from timm_lt.fitting import AUTO, DEFAULT_HEADS
from timm_lt.metrics import OBJECTIVES
from timm_lt.utils.checks import UsageError, check_choice, check_integer, check_number
from timm_lt.utils.files import yaml_text

# The order of class directories in timm's ReaderImageFolder, and in torchvision's ImageFolder.
ClassOrder = Literal["timm", "sorted"]
# Features are extracted once; on images, a head is trained through the frozen backbone.
Stage = Literal["features", "images"]


@contextmanager
def prefixed(name: str) -> Iterator[None]:
    """Puts a key of the recipe before the messages of what is created from its values."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from error
    except TypeError as error:
        # Python's own, for a wrong argument: without the name of the function.
        raise UsageError(f"{name}: {str(error).rpartition('() ')[2]}") from error


class _Part:
    """A part of the recipe: keys of its own, and more options of what it creates."""

    options: dict[str, Any]

    def arguments(self, name: str = "name") -> dict[str, Any]:
        """Returns the arguments of what is created; ``name`` is the one for the key "name"."""
        own = {name if key == "name" else key: value for key, value in vars(self).items()}
        options = own.pop("options")
        with prefixed(f"{type(self).__name__.removesuffix('Recipe').lower()}.options"):
            return dict(**{key: v for key, v in own.items() if v is not None}, **options)


# The strings below the fields are the help texts of the command line.


@dataclass(frozen=True)
class DataRecipe:
    """Images."""

    name: str = "glyph_lt"
    """A registered data set; `timm-lt list` names them."""
    root: str | None = None
    """Folder with the files, for data sets that read files."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the data set."""
    image_size: int | None = None
    """Height and width in pixels; null takes the model's."""
    augmentation: str = "none"
    """A registered augmentation of the training images, which are then kept in memory; or timm,
    which decodes each image when it is drawn and transforms it as timm does."""
    augmentation_options: dict[str, Any] = field(default_factory=dict)
    """Options of the augmentation; for timm those of its create_loader, e.g. auto_augment, scale,
    hflip, color_jitter, re_prob."""
    background: str | list[int] = "auto"
    """Colour behind transparent pixels: a name such as white, "#rrggbb", or [red, green, blue];
    auto takes the one of the model's checkpoint, or white."""
    unreadable: Literal["raise", "skip"] = "raise"
    """Raise an error for an image that cannot be read, or skip and count it."""
    verify: bool = True
    """Look for damaged files before training, by header and end, without decoding them; only for
    augmentation timm, since otherwise all images are decoded first."""
    val_fraction: float = 0.2
    """Fraction of each class's training images, in (0, 1), that is held out for validation if the
    data set has no validation split."""

    @property
    def title(self) -> str:
        """Title of the data: the Hub's repo id, the user's own folder, or the name."""
        if self.name == "hub" and self.options.get("repo"):
            return str(self.options["repo"])
        own = self.root is not None and self.name in ("folder", "list", "hub")
        return Path(self.root or "").resolve().name if own else self.name


@dataclass(frozen=True)
class ModelRecipe:
    """Network."""

    name: str = "lt_test_resnet"
    """Any timm architecture, or an lt_* one; a tag chooses a configuration. local-dir:FOLDER is the
    model of a finished run."""
    pretrained: bool = False
    """Start from that configuration's published weights, or from those of the run."""
    checkpoint: str | None = None
    """File with weights for this architecture from any training, such as timm's train.py:
    .safetensors, or a pickle, from which only tensors are read. Its classifier is used if it has as
    many classes; the arguments of its training set pooling, image size, normalisation and crop."""
    checkpoint_key: str | None = None
    """Key or prefix of the weights in a file with several networks, e.g. teacher."""
    class_order: ClassOrder | None = None
    """Order of the classes in weights without class names, timm (folders 1, 2, 10) or sorted (1,
    10, 2), as in torchvision; null determines it on training images if the two differ."""
    fresh_classifier: bool = False
    """Draw a new classifier from the seed, on the pretrained backbone."""
    trained: list[str] | None = None
    """Modules to train in the representation stage besides the classifier, e.g. [layer4.2], or
    [last_block] of any architecture; [] trains the classifier alone, null everything."""
    bn: Literal["frozen", "shift"] = "frozen"
    """Mode of the frozen modules, frozen (evaluation mode, batch norm keeps its statistics) or
    shift (training mode, the statistics move)."""
    options: dict[str, Any] = field(default_factory=dict)
    """More arguments of timm.create_model, e.g. global_pool; and mean, std, interpolation, crop_pct
    and crop_mode of its images. They take precedence over the checkpoint's. A head= that the run in
    FOLDER has not fitted replaces its classifier."""


@dataclass(frozen=True)
class SamplerRecipe(_Part):
    """Sampler of the representation stage."""

    name: str = "instance_balanced"
    """A registered sampler."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the sampler."""


@dataclass(frozen=True)
class LossRecipe(_Part):
    """Loss of the representation stage."""

    name: str = "cross_entropy"
    """A registered loss."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the loss."""


@dataclass(frozen=True)
class OptimizerRecipe(_Part):
    """Optimiser of the representation stage."""

    name: str = "sgd"
    """An optimiser of timm, whose sgd has Nesterov momentum."""
    lr: float = 0.1
    """Peak learning rate, > 0."""
    weight_decay: float = 5e-4
    """Weight decay of all weights but biases and norms, >= 0."""
    momentum: float = 0.9
    """Momentum in [0, 1)."""
    options: dict[str, Any] = field(default_factory=dict)
    """More arguments of timm.optim.create_optimizer_v2."""


@dataclass(frozen=True)
class SchedulerRecipe(_Part):
    """Learning rate schedule, which advances at every update."""

    name: str = "cosine"
    """A scheduler of timm; plateau follows the accuracy on validation."""
    warmup_epochs: int = 1
    """Epochs of linear warm-up, included in epochs."""
    options: dict[str, Any] = field(default_factory=dict)
    """More arguments of timm.scheduler.create_scheduler_v2."""


@dataclass(frozen=True)
class MixupRecipe(_Part):
    """Mixup, cutmix and remix; off unless an alpha is above 0."""

    mixup_alpha: float = 0.0
    """Parameter of mixup's Beta distribution, >= 0."""
    cutmix_alpha: float = 0.0
    """Parameter of cutmix's Beta distribution, >= 0."""
    remix_kappa: float | None = None
    """Imbalance, >= 1, from which a mixed image gets the label of the rarer class alone if the
    frequent class has a share below remix_tau; 3 in the paper. null is plain mixup and cutmix."""
    remix_tau: float | None = None
    """Share in [0, 1]; null is 0.5."""
    off_epoch: int | None = None
    """Epochs after which images are no longer mixed; null is never."""
    options: dict[str, Any] = field(default_factory=dict)
    """More arguments of timm.data.Mixup, e.g. prob, switch_prob, mode."""


@dataclass(frozen=True)
class EmaRecipe(_Part):
    """Moving average of the weights."""

    decay: float | None = None
    """Decay in [0, 1), e.g. 0.9998; null is no average."""
    options: dict[str, Any] = field(default_factory=dict)
    """More arguments of timm.utils.ModelEmaV3, e.g. use_warmup."""


@dataclass(frozen=True)
class FeaturesRecipe:
    """Features of all images, for the classifier stage."""

    views: int | None = None
    """Augmented views of each training image; null is the image without augmentation."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type in which features are stored; float16 and bfloat16 halve the memory."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which the backbone computes; bfloat16 is fast where it is native."""
    cache_dir: str | None = None
    """Folder for files of features, which later runs with the same backbone and images read; null
    keeps features in memory."""


@dataclass(frozen=True)
class Recipe:
    """A complete experiment."""

    data: DataRecipe = field(default_factory=DataRecipe)
    model: ModelRecipe = field(default_factory=ModelRecipe)
    sampler: SamplerRecipe = field(default_factory=SamplerRecipe)
    loss: LossRecipe = field(default_factory=LossRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    scheduler: SchedulerRecipe = field(default_factory=SchedulerRecipe)
    mixup: MixupRecipe = field(default_factory=MixupRecipe)
    ema: EmaRecipe = field(default_factory=EmaRecipe)
    epochs: int = 30
    """Epochs of the representation stage, >= 0. With 0, only heads are fitted, on a model with
    weights; if its joint classifier is not for these classes, one is fitted first."""
    batch_size: int = 128
    """Images per update, over all processes, >= 1."""
    accumulation_steps: int = 1
    """Parts in which a process takes its share of the batch, >= 1."""
    clip_grad: float | None = None
    """Threshold of the gradient, > 0; null does not clip."""
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """Clip the norm of all gradients, each value, or agc, relative to the weights."""
    max_norm: float | None = None
    """Largest norm of a class's weights in the joint classifier, > 0; null is no limit."""
    validate_every: int = 1
    """Epochs from one validation to the next, >= 1."""
    keep: Literal["best", "last"] = "best"
    """Keep the weights of the best epoch on validation (overall accuracy), or of the last."""
    features: FeaturesRecipe = field(default_factory=FeaturesRecipe)
    heads: dict[str, dict[str, Any]] = field(default_factory=lambda: {k: {} for k in DEFAULT_HEADS})
    """Heads to fit, each with its options; timm-lt list names them. The option stage says on what,
    features or images; the latter trains crt and lws as in their paper. A head with a name of its
    own has the option kind, e.g. {crt_smote: {kind: crt, smote: 100}}. One called auto is the best
    of the others on validation."""
    objective: str | None = None
    """Objective on validation that chooses the heads' options, and auto: all (accuracy),
    class_mean, few_shot, harmonic_mean of the shot groups, or worst_class; null is all, or
    class_mean if validation was held out from the long-tailed training images."""
    protocol: Literal["standard", "paper"] = "standard"
    """standard selects on validation, and reads the test split once, at the end. paper uses the
    test split for validation and holds nothing out; it only exists for data where a paper selected
    so, to compare with it, and all results say so."""
    shot_rule: Literal["fb", "oltr"] = "fb"
    """fb counts > 100 as many-shot and < 20 as few-shot; oltr uses >= and <=."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """auto uses bf16 where the processor computes it natively."""
    seed: int = 0
    """Seed of everything random, from 0 to 2^63 - 1."""

    def __post_init__(self) -> None:
        check_integer("epochs", self.epochs, minimum=0)
        check_integer("seed", self.seed, minimum=0, maximum=2**63 - 1)
        check_number("data.val_fraction", self.data.val_fraction, "(0, 1)")
        counts = {"data.image_size": self.data.image_size, "mixup.off_epoch": self.mixup.off_epoch}
        for key, count in {**counts, "features.views": self.features.views}.items():
            if count is not None:
                check_integer(key, count, minimum=1)
        if self.objective is not None:
            check_choice("objective", self.objective, OBJECTIVES)
        model, file, mixup = self.model, self.model.checkpoint, self.mixup
        mixes = mixup.mixup_alpha or mixup.cutmix_alpha or mixup.options.get("cutmix_minmax")
        weights, plain = model.pretrained or file, self.data.augmentation == "none"
        if self.epochs == 0 and not weights:
            raise UsageError("epochs 0 needs the weights of model.pretrained or model.checkpoint")
        for name, is_useless, reason in (
            ("model.fresh_classifier", model.fresh_classifier and not weights, "without weights"),
            ("model.checkpoint_key", model.checkpoint_key and not file, "without a checkpoint"),
            ("model.pretrained", model.pretrained and file, "with model.checkpoint"),
            ("mixup.off_epoch", mixup.off_epoch and not mixes, "without mixup or cutmix"),
            ("features.views", self.features.views and plain, "without augmentation"),
        ):
            if is_useless:
                raise UsageError(f"{name} has no effect {reason}; remove it")

    def to_yaml(self) -> str:
        """Returns the recipe as YAML that reads back to the same recipe."""
        return yaml_text(dataclasses.asdict(self))


def head_kind(recipe: Recipe, name: str) -> str:
    """Returns the registered name of one of a recipe's heads: its option ``kind``, or its name."""
    return str(recipe.heads[name].get("kind", name))


def stage_heads(recipe: Recipe, stage: Stage) -> dict[str, dict[str, Any]]:
    """Returns by name the options of the fits of all heads with a stage."""
    return {
        name: {key: value for key, value in options.items() if key not in ("stage", "kind")}
        for name, options in recipe.heads.items()
        if name != AUTO and options.get("stage", "features") == stage
    }


@dataclass(frozen=True)
class RunOptions:
    """Options of a run that are not part of the experiment."""

    output: str | None = None
    """Folder of the run; null is output/<recipe name>."""
    resume: bool = False
    """Resume the run in that folder from its last complete state, or start it."""
    overwrite: bool = False
    """Delete the run in that folder first."""
    threads: int | None = None
    """CPU threads per process; null is the process's share of the cores."""
    workers: int | None = None
    """Worker processes that decode images, per training process; null is by the cores."""
    compile: bool = False
    """Compile the model with torch.compile."""
    tracker: str = "none"
    """tensorboard, or any other tracker of accelerate that is installed; none is off."""
    quiet: bool = False
    """Print the final table only."""
    verbose: bool = False
    """Log each step, and the traceback of an error."""
    json: bool = False
    """Print metrics.json instead of the table."""
    push_to_hub: str | None = None
    """Repo id on the Hub to push the finished run to, NAMESPACE/NAME."""
    private: bool = False
    """Make a new repo private."""
    license: str | None = None
    """Licence of the weights for the model card, such as apache-2.0."""

    def folder(self, name: str) -> Path:
        """Returns the folder of the run of the recipe of that name."""
        return Path(self.output or Path("output") / name)
