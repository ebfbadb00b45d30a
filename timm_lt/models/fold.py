"""Folded models to ship: plain timm checkpoints, ONNX files and programs of ``torch.export``.

Each file is read back and compared with the model. ``timm_lt.fold_head`` folds in memory.
"""

import copy
import importlib.util
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from timm_lt.checkpoint import CONFIG, WEIGHTS
from timm_lt.checkpoint.save import config_text, plain_copy
from timm_lt.heads import Head, get_heads
from timm_lt.models.create import input_size
from timm_lt.utils.checks import UsageError
from timm_lt.utils.files import write_atomic

ONNX = "model.onnx"
PROGRAM = "model.pt2"
FOLDED_ENTRIES = {CONFIG, WEIGHTS, ONNX, PROGRAM}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
IMAGES = 4
# Largest difference of logits due to rounding, divided by the largest logit.
TOLERANCE = 1e-3
# The batch size of an exported model is free.
ANY_NUMBER = ({0: torch.export.Dim("batch")},)


@dataclass(frozen=True)
class FoldReport:
    """Comparison of the written model with the model that it was made from, on random images.

    Attributes:
        exact: Whether the head is linear, so that logits are the same; otherwise only the
            predictions are.
        difference: Largest difference of the reloaded model's logits, divided by the largest logit.
        others: The same for each of the other files, by the name of its runtime.
    """

    exact: bool
    difference: float
    others: dict[str, float]


def write_folded(
    folder: str | Path,
    model: nn.Module,
    *,
    onnx: bool = False,
    program: bool = False,
    label_names: list[str] | None = None,
) -> FoldReport:
    """Writes a model with its heads folded, loads it with plain timm, and compares the logits.

    Args:
        folder: Folder for ``config.json``, ``model.safetensors`` and optionally ``model.onnx`` and
            ``model.pt2``, which take any number of images.
        model: The model with a head; it is not changed.
        onnx: Write the ONNX file too; needs the packages of ``timm_lt[onnx]``.
        program: Write the program of ``torch.export`` too: ``torch.export.load(path).module()``
            runs it without timm.
        label_names: Class names in label order, (C,).

    Raises:
        UsageError: If the head is not fitted or cannot be folded, packages for ONNX are missing,
            the model cannot be exported, or the written files do not compute the same.
    """
    folder = Path(folder)
    missing = [name for name in ONNX_PACKAGES if onnx and importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"an ONNX file needs {', '.join(missing)}: pip install 'timm_lt[onnx]'")
    images = torch.randn(IMAGES, *input_size(model), generator=torch.Generator().manual_seed(0))
    heads = [head for head in get_heads(model).values() if isinstance(head, Head)]
    features = [torch.linspace(-1, 2, head.in_features)[None].to(head.weight) for head in heads]
    exact = all(torch.equal(h.transform(f), f) for h, f in zip(heads, features, strict=True))
    shipped, original = plain_copy(model), copy.deepcopy(model).cpu().float().eval()
    plain = copy.deepcopy(shipped).float().eval()
    with torch.inference_mode():
        wanted, folded = original(images), plain(images)
    _compare(f"the folded {type(model).__name__}", folded, wanted, exact=exact)
    for path, head in get_heads(model).items():
        if head.bias is None and shipped.get_submodule(path).bias is not None:
            raise UsageError(
                f"the folded head needs a bias, but the classifier {path!r} of timm's "
                f"{type(model).__name__} has none, so timm could not load it"
            )
    state = {key: value.contiguous() for key, value in shipped.state_dict().items()}
    write_atomic(folder / WEIGHTS, safetensors.torch.save(state))
    write_atomic(folder / CONFIG, config_text(shipped, label_names))
    difference, others = _compare_file(folder, images, folded), {}
    wanted_files = {"onnxruntime": ONNX} if onnx else {}
    for runtime, file in (wanted_files | ({"torch.export": PROGRAM} if program else {})).items():
        _export(plain, images, folder / file)
        others[runtime] = _compare_file(folder / file, images, folded)
    return FoldReport(exact, difference, others)


def _compare(what: str, found: Tensor, wanted: Tensor, *, exact: bool = True) -> float:
    """Returns the largest difference divided by the largest logit, which must be tiny.

    With ``exact=False`` the predictions must be the same, up to ties.
    """
    scale = wanted.abs().max().clamp_min(1e-12)
    difference = float((found - wanted).abs().max() / scale)
    best, other = wanted.argmax(1, keepdim=True), found.argmax(1, keepdim=True)
    gap = float((wanted.gather(1, best) - wanted.gather(1, other)).max() / scale)
    error, noun = (difference, "logits") if exact else (gap, "predictions")
    if not error <= TOLERANCE:
        raise UsageError(
            f"{what} gives other {noun} than the model with the head, by {error:.1e} of the "
            "largest logit"
        )
    return difference


def _compare_file(path: Path, images: Tensor, wanted: Tensor) -> float:
    """Loads a written model and compares it for several images and for one."""
    try:
        with torch.inference_mode():
            run = _load(path)
            several, one = run(images), run(images[:1])
    except Exception as error:
        raise UsageError(f"{path} was written but cannot be run: {_reason(error)}") from error
    _compare(f"{path} for one image", one, wanted[:1])
    return _compare(str(path), several, wanted)


def _load(path: Path) -> Callable[[Tensor], Tensor]:
    """Loads an ONNX file, a program, or the folder of a timm checkpoint."""
    if path.name == ONNX:
        import onnxruntime  # type: ignore[import-untyped]

        session = onnxruntime.InferenceSession(path)
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    if path.name == PROGRAM:
        return torch.export.load(path).module()
    model: nn.Module = timm.create_model(f"local-dir:{path}", pretrained=True)
    return model.eval()


def _export(model: nn.Module, images: Tensor, path: Path) -> None:
    """Writes an ONNX file or a program, without torch's notes about its exporter."""
    options: dict[str, Any] = {"dynamo": True, "verbose": False, "dynamic_shapes": ANY_NUMBER}
    options |= {"input_names": ["images"], "output_names": ["logits"]}
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if path.name == PROGRAM:
                exported = torch.export.export(model, (images,), dynamic_shapes=ANY_NUMBER)
                torch.export.save(exported, path)
            else:
                torch.onnx.export(model, (images,), path, **options)
    except Exception as error:
        if isinstance(error, OSError):  # A full disk, say.
            raise
        fault = f"torch cannot export {type(model).__name__} to {path.name}"
        raise UsageError(f"{fault}: {_reason(error)}") from error
    finally:
        logger.setLevel(level)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
