"""Running the runs of a comparison: some side by side, each a process of its own."""

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import torch

import timm_lt
from timm_lt.checkpoint import METRICS, RECIPE
from timm_lt.run.comparison.plan import Run
from timm_lt.run.folder import OCCUPIED, is_running, recipe_differences
from timm_lt.utils.accelerator import available_cores
from timm_lt.utils.checks import UsageError
from timm_lt.utils.console import log, one_line
from timm_lt.utils.files import write_atomic

# Seconds between two looks at the processes.
PERIOD = 0.1
# Seconds that a process is given to end after it was told to.
PATIENCE = 20
# Environment variable by which a process sees some of the GPUs.
VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
# Environment variables by which libraries take their number of threads when they are loaded.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: ``"finished"``; ``"kept"``, if it was finished before; ``"failed"``; or
            ``"left out"``, if the run from which it goes on failed.
        seconds: Wall time of the process.
        message: What went wrong.
    """

    status: Literal["finished", "kept", "failed", "left out"]
    seconds: float = 0.0
    message: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether the run has figures."""
        return self.status in ("finished", "kept")


def check_runs(runs: Sequence[Run]) -> None:
    """Checks that what is in the folders of runs are runs of the same recipes.

    Raises:
        UsageError: If one is not; says what differs.
    """
    for run in runs:
        if not (run.folder / RECIPE).is_file():
            continue
        if run.after is not None and not (run.after.folder / METRICS).is_file():
            raise UsageError(
                f"{run.folder} goes on from {run.after.folder}, which is not finished and may "
                "become another: delete the former, too, or choose another --output"
            )
        differences = recipe_differences(run.folder, run.recipe.to_yaml())
        if differences:
            raise UsageError(
                f"{run.folder} holds a run of another recipe ({'; '.join(differences)}); take that "
                "grid and those options, delete the folder, or choose another --output"
            )


def run_all(runs: Sequence[Run], logs: Path, *, jobs: int, threads: int) -> dict[Run, Outcome]:
    """Runs what is not finished yet, and says on the log how it goes.

    A run that fails is reported and the others go on, but for those that go on from it. Ctrl-C and
    SIGTERM end the processes, which leave what can be resumed.

    Args:
        runs: Each behind the one from which it goes on.
        logs: Folder for what each process prints.
        jobs: Processes side by side, >= 1.
        threads: CPU threads of each, >= 1.

    Returns:
        How each run ended.
    """
    outcomes = {run: Outcome("kept") for run in runs if (run.folder / METRICS).is_file()}
    if outcomes:
        log.info("%d of %d runs are finished already", len(outcomes), len(runs))
    waiting = [run for run in runs if run not in outcomes]
    crew = _Crew(logs, threads, len(runs))
    try:
        while waiting or crew.jobs:
            outcomes |= crew.collect(len(outcomes))
            waiting += crew.take_turned_away()
            _leave_out(waiting, outcomes)
            ready = [run for run in waiting if run.after is None or run.after in outcomes]
            for run in ready[: jobs - len(crew.jobs)]:
                if crew.start(run):
                    waiting.remove(run)
            time.sleep(PERIOD)
    finally:
        crew.end()
    return outcomes


def _leave_out(waiting: list[Run], outcomes: dict[Run, Outcome]) -> None:
    """Takes out the runs that would go on from one that has no model."""
    for run in list(waiting):
        source = outcomes.get(run.after) if run.after is not None else None
        if source is not None and not source.is_whole:
            assert run.after is not None
            outcomes[run] = Outcome("left out", message=f"{run.after.name} {source.status}")
            log.warning("%s is left out, since %s", run.name, outcomes[run].message)
            waiting.remove(run)


@dataclass(frozen=True)
class _Job:
    """A process that runs."""

    process: subprocess.Popen[bytes]
    output: Path
    file: IO[bytes]
    started: float
    device: str | None


class _Crew:
    """The processes that run side by side."""

    def __init__(self, logs: Path, threads: int, total: int) -> None:
        self.logs, self.threads, self.total = logs, threads, total
        self.jobs: dict[Run, _Job] = {}
        self.environment = child_environment(os.environ, threads)
        self.devices = visible_devices(os.environ)
        self._announced: set[Run] = set()
        self._turned_away: list[Run] = []

    def start(self, run: Run) -> bool:
        """Starts a run, unless a process of a comparison that was killed is still at it."""
        if is_running(run.folder):
            self._announce(run)
            return False
        write_atomic(run.file, run.recipe.to_yaml())
        self.logs.mkdir(parents=True, exist_ok=True)
        output = new_log(self.logs, run.name)
        file = output.open("wb")
        device = self._device()
        process = subprocess.Popen(
            run.command(self.threads),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=self.environment
            if device is None
            else self.environment | {VISIBLE_DEVICES: device},
        )
        self.jobs[run] = _Job(process, output, file, time.perf_counter(), device)
        log.info("%s started", run.name)
        return True

    def _device(self) -> str | None:
        """Returns the GPU on which the fewest run, None without any."""
        taken = [job.device for job in self.jobs.values()]
        return min(self.devices, key=taken.count, default=None)

    def collect(self, done: int) -> dict[Run, Outcome]:
        """Returns how the runs ended that have ended since the last look."""
        ended: dict[Run, Outcome] = {}
        for run, job in list(self.jobs.items()):
            status = job.process.poll()
            if status is None:
                continue
            del self.jobs[run]
            job.file.close()
            outcome = _outcome(run, job, status)
            if outcome.message.startswith(OCCUPIED):
                # One of a comparison that was killed, which had not got so far at the start.
                self._announce(run)
                self._turned_away.append(run)
                continue
            ended[run] = outcome
            place = f"[{done + len(ended)}/{self.total}] {run.name}"
            if outcome.is_whole:
                log.info("%s finished in %.0f s", place, outcome.seconds)
            else:
                log.error("%s failed: %s (%s)", place, outcome.message, job.output)
        return ended

    def take_turned_away(self) -> list[Run]:
        """Returns the runs whose folder another process had, since the last call."""
        turned_away, self._turned_away = self._turned_away, []
        return turned_away

    def _announce(self, run: Run) -> None:
        if run not in self._announced:
            log.info("%s: %s %s, waiting for it", run.name, OCCUPIED, run.folder)
        self._announced.add(run)

    def end(self) -> None:
        """Ends the processes that are still there, as Ctrl-C would."""
        for job in self.jobs.values():
            job.process.terminate()
        for job in self.jobs.values():
            try:
                job.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                job.process.kill()
                job.process.wait()
            job.file.close()


def visible_devices(environment: Mapping[str, str]) -> list[str]:
    """Returns the GPUs of CUDA, each as the variable gives it to a process alone."""
    if not torch.cuda.is_available():
        return []
    numbers = [str(number) for number in range(torch.cuda.device_count())]
    given = environment.get(VISIBLE_DEVICES)
    return given.split(",")[: len(numbers)] if given else numbers


def default_jobs(threads: int) -> int:
    """Returns how many runs go side by side: one on each accelerator, else as the cores allow."""
    if torch.accelerator.is_available():
        return max(len(visible_devices(os.environ)), 1)
    return max(available_cores() // threads, 1)


def new_log(folder: Path, name: str) -> Path:
    """Returns the path of a run's log; what is there of earlier tries is numbered, 1 the first."""
    path = folder / f"{name}.log"
    if path.exists():
        number = 1
        while (numbered := folder / f"{name}.{number}.log").exists():
            number += 1
        path.rename(numbered)
    return path


def child_environment(environment: Mapping[str, str], threads: int) -> dict[str, str]:
    """Returns the environment of a run: this very package, and so many threads."""
    root = str(Path(timm_lt.__file__).parent.parent)
    path = [root, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    counts = dict.fromkeys(THREAD_VARIABLES, str(threads))
    return {**environment, **counts, "PYTHONPATH": os.pathsep.join(dict.fromkeys(path))}


def _outcome(run: Run, job: _Job, status: int) -> Outcome:
    seconds = time.perf_counter() - job.started
    if status == 0 and (run.folder / METRICS).is_file():
        return Outcome("finished", seconds)
    if status < 0:
        return Outcome("failed", seconds, f"killed by signal {-status}")
    return Outcome("failed", seconds, last_words(job.output) or f"exit status {status}")


def last_words(path: Path) -> str:
    """Returns what a process said of its end: the line of an error, or its last."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    filled = [line for line in lines if line.strip()]
    for line in reversed(filled):
        if line.startswith("error: "):
            return one_line(line.removeprefix("error: "), 500)
    return one_line(filled[-1], 500) if filled else ""
