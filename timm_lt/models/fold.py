"""Folded models to ship: plain timm checkpoints, ONNX files and exported programs of torch.

What is written is read back and compared.

``timm_lt.fold_head`` folds a head in memory.
"""

import copy
import importlib.util
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from timm_lt.checkpoint import CONFIG, WEIGHTS, save_plain
from timm_lt.heads import Head, fold_head, get_heads
from timm_lt.models.create import input_size
from timm_lt.utils.checks import UsageError

ONNX = "model.onnx"
PROGRAM = "model.pt2"
FOLDED_ENTRIES = {CONFIG, WEIGHTS, ONNX, PROGRAM}
IMAGES = 4
# Largest difference of logits that rounding explains, as a share of the largest logit.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class FoldReport:
    """How the written model compares with the one that it was made from, on random images.

    Attributes:
        exact: The head is linear, so logits are the same; else only the predictions are.
        difference: Largest difference of the reloaded model's logits, as a share of the largest.
        others: The same for each of the other files, by what runs it.
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
    """Writes a model with its heads folded, reads it back with plain timm, and compares.

    Args:
        folder: Where to write ``config.json``, ``model.safetensors`` and, if asked for,
            ``model.onnx`` and ``model.pt2``, which take any number of images.
        model: The model with a head; it stays as it is, but for its evaluation mode.
        onnx: Write the ONNX file too; needs the packages of ``timm_lt[onnx]``.
        program: Write the program of ``torch.export`` too: ``torch.export.load(path).module()``
            runs it without timm.
        label_names: Class names in label order, (C,).

    Raises:
        UsageError: If the head is not fitted or cannot be folded, if packages for ONNX are missing,
            if the model cannot be exported, or if what was written does not compute the same.
    """
    folder = Path(folder)
    if onnx:
        _check_onnx_packages()
    images = torch.randn(IMAGES, *input_size(model), generator=torch.Generator().manual_seed(0))
    heads = [head for head in get_heads(model).values() if isinstance(head, Head)]
    exact = all(_is_linear(head) for head in heads)
    plain = fold_head(copy.deepcopy(model).cpu().float()).eval()
    with torch.inference_mode():
        wanted = copy.deepcopy(model).cpu().float().eval()(images)
        folded = plain(images)
    _compare(f"the folded {type(model).__name__}", folded, wanted, exact=exact)
    save_plain(folder, model, label_names=label_names)
    try:
        reloaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"plain timm cannot load the folded model: {reason}") from error
    with torch.inference_mode():
        found = reloaded(images)
    difference = _compare(f"the model in {folder}, loaded by timm,", found, folded, exact=True)
    others = {}
    if onnx:
        _export_onnx(plain, images, folder / ONNX)
        others["onnxruntime"] = _compare_exported(folder / ONNX, _run_onnx, images, folded)
    if program:
        _export_program(plain, images, folder / PROGRAM)
        others["torch.export"] = _compare_exported(folder / PROGRAM, _run_program, images, folded)
    return FoldReport(exact, difference, others)


def _is_linear(head: Head) -> bool:
    """Returns whether a head hands its input to its weights as it is."""
    features = torch.randn(1, head.in_features, generator=torch.Generator().manual_seed(0))
    features = features.to(head.weight)
    return torch.equal(head.transform(features), features)


def _compare(what: str, found: Tensor, wanted: Tensor, *, exact: bool) -> float:
    """Returns the largest difference as a share of the largest; raises if it is no rounding."""
    scale = wanted.abs().max().clamp_min(1e-12)
    difference = float((found - wanted).abs().max() / scale)
    if not exact:
        # The best class may only be another one where the two are as good as equal.
        best, other = wanted.argmax(1, keepdim=True), found.argmax(1, keepdim=True)
        gap = (wanted.gather(1, best) - wanted.gather(1, other)).max() / scale
        if gap > TOLERANCE:
            raise UsageError(f"{what} predicts other classes than the model with the head")
    elif not difference <= TOLERANCE:
        raise UsageError(
            f"{what} gives other logits than the model with the head: they differ by "
            f"{difference:.1e} of the largest"
        )
    return difference


def _check_onnx_packages() -> None:
    missing = [
        name
        for name in ("onnx", "onnxscript", "onnxruntime")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise UsageError(f"an ONNX file needs {', '.join(missing)}: pip install 'timm_lt[onnx]'")


def _export_onnx(model: nn.Module, images: Tensor, path: Path) -> None:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    try:
        # Its advice is about its own internals.
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (images,),
                dynamo=True,
                verbose=False,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=_any_number(),
            )
        assert program is not None
        program.save(path)
    except OSError:
        # Of the disk.
        raise
    except Exception as error:
        raise _not_exported(model, "ONNX", error) from error
    finally:
        logger.setLevel(level)


def _export_program(model: nn.Module, images: Tensor, path: Path) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, (images,), dynamic_shapes=_any_number())
            torch.export.save(program, path)
    except OSError:
        raise
    except Exception as error:
        raise _not_exported(model, "a program", error) from error


def _any_number() -> tuple[dict[int, Any]]:
    """Says that the first dimension of the images may be of any size."""
    return ({0: torch.export.Dim("batch")},)


def _not_exported(model: nn.Module, what: str, error: Exception) -> UsageError:
    reason = " ".join(str(error).split())[:200]
    return UsageError(
        f"torch cannot export {type(model).__name__} to {what}: {type(error).__name__}: {reason}"
    )


def _run_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime  # type: ignore[import-untyped]

    session = onnxruntime.InferenceSession(path)

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run(None, {"images": images.numpy()})
        return torch.from_numpy(logits)

    return run


def _run_program(path: Path) -> Callable[[Tensor], Tensor]:
    return torch.export.load(path).module()


def _compare_exported(
    path: Path,
    read: Callable[[Path], Callable[[Tensor], Tensor]],
    images: Tensor,
    wanted: Tensor,
) -> float:
    """Compares for some images, and for one: the file must take any number."""
    try:
        with torch.inference_mode():
            run = read(path)
            whole, first = run(images), run(images[:1])
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{path} was written, and cannot be run: {type(error).__name__}: {reason}"
        ) from error
    _compare(f"{path} for one image", first, wanted[:1], exact=True)
    return _compare(f"{path}", whole, wanted, exact=True)
