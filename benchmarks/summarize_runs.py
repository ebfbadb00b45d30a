"""Mean over seeds of several runs of one recipe, as a Markdown table.

``python benchmarks/summarize_runs.py RUN_FOLDER [RUN_FOLDER ...]``
"""

import json
import statistics
import sys
from pathlib import Path

GROUPS = ("many_shot", "medium_shot", "few_shot", "all")


def main(folders: list[str]) -> None:
    """Prints one row per head: the groups, the standard deviation of "all", the gain over joint."""
    runs = [json.loads((Path(folder) / "metrics.json").read_text()) for folder in folders]
    print(f"seeds {', '.join(str(run['seed']) for run in runs)}")
    print("| head | many | medium | few | all | sd of all | gain over joint, by seed |")
    print("|---|---:|---:|---:|---:|---:|---|")
    for head in runs[0]["heads"]:
        figures = [[100 * run["heads"][head][group] for run in runs] for group in GROUPS]
        means = [f"{statistics.mean(values):.1f}" for values in figures]
        deviation = statistics.stdev(figures[-1]) if len(runs) > 1 else float("nan")
        joint = [100 * run["heads"]["linear"]["all"] for run in runs]
        gains = [f"{a - b:+.1f}" for a, b in zip(figures[-1], joint, strict=True)]
        shown = "" if head == "linear" else " ".join(gains)
        print(f"| `{head}` | {' | '.join(means)} | {deviation:.1f} | {shown} |")


if __name__ == "__main__":
    main(sys.argv[1:])
