"""What a run shows: the table of heads, the plots and the model card."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from timm_lt.files import write_atomic
from timm_lt.fitting import AccuracyCurve
from timm_lt.longtail import ShotRule, shot_groups, shot_rule_texts
from timm_lt.metrics import ShotReport

GROUPS = ("many_shot", "medium_shot", "few_shot")
CARD_TEMPLATE = Path(__file__).with_name("model_card.md")


def percent(fraction: float | None) -> str:
    """Returns a fraction as percent with one decimal; None, for no such class, as a dash.

    >>> percent(0.5), percent(None)
    ('50.0', '-')
    """
    return "-" if fraction is None else f"{100 * fraction:.1f}"


def describe_selection(selection: Mapping[str, Any]) -> str:
    """Returns what was chosen on validation for a head.

    >>> describe_selection({"tau": 0.8125, "objective": "all", "split": "val"})
    'tau 0.812'
    """
    if not selection:
        return ""
    name, value = next(iter(selection.items()))
    return f"{name} {value:.3g}"


def shot_table(
    reports: Mapping[str, ShotReport],
    class_counts: Tensor,
    *,
    seconds: Mapping[str, float],
    selections: Mapping[str, Mapping[str, Any]],
    title: str,
) -> Table:
    """Builds the table of heads by shot group, in percent.

    Args:
        reports: Test figures by head.
        class_counts: Training images per class, (C,).
        seconds: Time that each head took, if known.
        selections: How each head's options were chosen.
        title: Line above the table.
    """
    rule = next(iter(reports.values())).rule
    table = Table(
        title=title,
        caption=_shot_legend(class_counts, rule),
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 0, 0, 1),
    )
    balanced = all(abs(r.all - r.class_mean) < 1e-9 for r in reports.values())
    names = ["many", "medium", "few", "all", *([] if balanced else ["class mean"]), "ECE"]
    table.add_column("head", no_wrap=True)
    for name in names:
        style = "bold" if name == "all" else ""
        table.add_column(name, justify="right", style=style, no_wrap=True)
    table.add_column("seconds", justify="right")
    table.add_column("selected")
    for name, report in reports.items():
        values = [getattr(report, group) for group in GROUPS] + [report.all]
        values += [] if balanced else [report.class_mean]
        values += [report.ece]
        table.add_row(
            name,
            *map(percent, values),
            f"{seconds[name]:.1f}" if name in seconds else "-",
            describe_selection(selections.get(name, {})),
        )
    return table


def _shot_legend(class_counts: Tensor, rule: ShotRule) -> str:
    groups, texts = shot_groups(class_counts, rule), shot_rule_texts(rule)
    sizes = [f"{int(groups[name].sum())}" for name in GROUPS]
    sizes[0] += " classes"
    parts = [
        f"{name.removesuffix('_shot')} {texts[name]} ({size})"
        for name, size in zip(GROUPS, sizes, strict=True)
    ]
    return f"shots: {', '.join(parts)}"


def save_plots(
    folder: Path,
    reports: Mapping[str, ShotReport],
    class_counts: Tensor,
    curves: Mapping[str, tuple[AccuracyCurve, float]],
) -> list[Path]:
    """Draws accuracy by class frequency, and accuracy against tau, as PNG.

    Args:
        folder: Where to write; made if missing.
        reports: Test figures by head.
        class_counts: Training images per class, (C,).
        curves: Validation accuracy against tau with the head's tau, by head; may be empty.

    Returns:
        The files.
    """
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    _draw_frequency(figure, reports, class_counts)
    paths = [folder / "accuracy_by_frequency.png"]
    figure.savefig(paths[0], dpi=120)
    if curves:
        figure = Figure(figsize=(7.5, 3.2), layout="constrained")
        _draw_curves(figure, curves)
        paths.append(folder / "accuracy_by_tau.png")
        figure.savefig(paths[1], dpi=120)
    return paths


def _draw_frequency(
    figure: Any,  # noqa: ANN401
    reports: Mapping[str, ShotReport],
    class_counts: Tensor,
) -> None:
    axes = figure.subplots()
    order = torch.argsort(class_counts, descending=True, stable=True)
    width = max(len(order) // 20, 1)
    for name, report in reports.items():
        accuracy = report.per_class[order]
        # A running mean over neighbouring classes: single classes are too noisy to read.
        windows = accuracy.unfold(0, width, 1).nanmean(1)
        places = torch.arange(len(windows)) + (width - 1) / 2 + 1
        axes.plot(places, 100 * windows, label=name, linewidth=2.2 if name == "linear" else 1.4)
    axes.set_xlabel("classes, from the most to the least frequent")
    smoothing = f"\n(mean of {width} neighbours)" if width > 1 else ""
    axes.set_ylabel(f"test accuracy, %{smoothing}")
    axes.set_ylim(0, 100)
    axes.set_xlim(0.5, len(order) + 0.5)
    counts = axes.twinx()
    places = torch.arange(len(order)) + 1
    counts.fill_between(places, class_counts[order], step="mid", alpha=0.12, color="black")
    counts.set_yscale("log")
    counts.set_ylabel("training images (grey)")
    # Outside, where it hides no curve.
    figure.legend(
        *axes.get_legend_handles_labels(), fontsize="small", loc="outside upper center", ncols=7
    )
    axes.set_zorder(counts.get_zorder() + 1)
    axes.patch.set_visible(False)


def _draw_curves(figure: Any, curves: Mapping[str, tuple[AccuracyCurve, float]]) -> None:  # noqa: ANN401
    panels = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for axes, (name, (curve, tau)) in zip(panels, curves.items(), strict=True):
        edges, accuracy = curve.steps()
        right = max(2.0, 1.5 * tau)
        # The accuracy after the last step holds from there on.
        shown = edges < right
        edges = torch.cat([edges[shown], torch.tensor([right])])
        accuracy = torch.cat([accuracy[shown], accuracy[shown][-1:]])
        axes.step(edges, 100 * accuracy, where="post")
        axes.axvline(tau, linestyle="--", color="black", linewidth=1)
        axes.set_title(f"{name}, tau {tau:.2f} (dashed)", fontsize="medium")
        axes.set_xlim(0, right)
        axes.set_xlabel("tau")
    panels[0].set_ylabel("validation accuracy, %")


def write_model_card(
    path: Path,
    *,
    name: str,
    architecture: str,
    data: str,
    reports: Mapping[str, ShotReport],
    class_counts: Tensor,
    selections: Mapping[str, Mapping[str, Any]],
    recipe: str,
    seed: int,
    plots: Sequence[Path] = (),
) -> None:
    """Writes the ``README.md`` of a checkpoint folder.

    Args:
        path: The file.
        name: Name of the run.
        architecture: Plain timm architecture.
        data: Name of the data set.
        reports: Test figures by head.
        class_counts: Training images per class, (C,).
        selections: How each head's options were chosen.
        recipe: The resolved recipe, YAML.
        seed: The run's seed.
        plots: Plots in a folder beside the file.
    """
    rule = next(iter(reports.values())).rule
    template = Template(CARD_TEMPLATE.read_text(encoding="utf-8"))
    text = template.substitute(
        name=name,
        architecture=architecture,
        data=data,
        num_classes=len(class_counts),
        num_images=f"{int(class_counts.sum()):,}",
        largest=int(class_counts.max()),
        smallest=int(class_counts.min()),
        imbalance_factor=f"{float(class_counts.max() / class_counts.min()):g}",
        table=_markdown_table(reports, class_counts, rule, selections),
        example_head=next((head for head in reports if head != "linear"), "linear"),
        plots="\n".join(f"![{plot.stem}](plots/{plot.name})" for plot in plots),
        recipe=recipe.strip(),
        seed=seed,
    )
    write_atomic(path, text)


def _markdown_table(
    reports: Mapping[str, ShotReport],
    class_counts: Tensor,
    rule: ShotRule,
    selections: Mapping[str, Mapping[str, Any]],
) -> str:
    groups, texts = shot_groups(class_counts, rule), shot_rule_texts(rule)
    heads = [
        f"{name.removesuffix('_shot')} ({texts[name]}, {int(groups[name].sum())} classes)"
        for name in GROUPS
    ]
    rows = [["head", *heads, "all", "macro F1", "ECE", "selected"]]
    rows.append(["---", *["---:"] * 6, "---"])
    for name, report in reports.items():
        values = [getattr(report, group) for group in GROUPS]
        values += [report.all, report.macro_f1, report.ece]
        selected = describe_selection(selections.get(name, {}))
        rows.append([f"`{name}`", *map(percent, values), selected])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
