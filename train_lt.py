"""The main job: train a backbone on long-tailed data, fit every head on it, and compare them.

Run it with ``accelerate launch train_lt.py [RECIPE] [--option value ...]``, or with plain
``python``; ``--help`` explains every option.
"""

import sys

from timm_lt.run import (
    evaluate,
    extract,
    fit,
    open_run,
    parse_command_line,
    push,
    run_to_exit,
    save,
    show,
    train,
)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0, 2 for a mistake, 130 after Ctrl-C."""
    return run_to_exit(lambda: run_job(sys.argv[1:] if argv is None else argv))


def run_job(argv: list[str]) -> None:
    """Runs the recipe that the arguments name, or resumes it."""
    parsed = parse_command_line("train_lt.py", argv)
    if parsed is None:  # after --print_config
        return
    name, recipe, options = parsed
    # Everything that the recipe names is created, and so checked, before anything is trained.
    with open_run(name, recipe, options) as run:
        if run is not None:  # None: finished before, and only to be shown
            train(run)  # the backbone with its joint classifier, epoch by epoch
            extract(run)  # the features of all images, once
            fit(run)  # every head on these features, its options chosen on validation
            evaluate(run)  # every head on the test images
            save(run)  # checkpoint, metrics, plots, model card and report
    show(name, options)
    push(name, options)


if __name__ == "__main__":
    sys.exit(main())
