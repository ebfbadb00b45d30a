"""The main job: train a backbone on long-tailed data, fit every head on it, and compare them.

Run it with ``accelerate launch train_lt.py [RECIPE] [--option value ...]``, or with plain
``python``; ``--help`` explains every option.
"""

import sys

import timm_lt.run as lt


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0, 2 for a mistake, 130 after Ctrl-C."""
    return lt.run_to_exit(lambda: run_job(sys.argv[1:] if argv is None else argv))


def run_job(argv: list[str]) -> None:
    """Runs the recipe that the arguments name, or resumes it."""
    name, recipe, options = lt.parse_command_line("train_lt.py", argv)
    # Everything that the recipe names is created, and so checked, before anything is trained.
    with lt.open_run(name, recipe, options) as run:
        if run is not None:  # None: finished before, and only to be shown
            lt.train(run)  # the backbone with its joint classifier, epoch by epoch
            lt.extract(run)  # the features of all images, once
            lt.fit(run)  # every head on these features, its options chosen on validation
            lt.evaluate(run)  # every head on the test images
            lt.save(run)  # checkpoint, metrics, plots, model card and report
    lt.show(name, options)
    lt.push(name, options)


if __name__ == "__main__":
    sys.exit(main())
