"""The main job, or a script, many times for one import: each a fork of a process that has all."""

import fnmatch
import json
import os
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent


class Server:
    """The process that forks; a run has its own process group, led by it.

    A ``plain`` one has imported torch and timm, and nothing of timm_lt.
    """

    def __init__(self, *, plain=False):
        paths = [str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")]
        path = os.pathsep.join(filter(None, paths))
        # The number of threads decides the bits of a run.
        fixed = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "plain" if plain else "all"],
            cwd=ROOT,
            env=os.environ | fixed,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, *arguments, **options):
        """Starts a run of the command, or of a ``script``, and returns it.

        ``at`` is a pattern of paths: when one is opened, made or renamed, the run is killed, or may
        write no more than ``limit`` bytes to a file. Without ``at``, the limit is there from the
        start. ``environment`` has variables.
        """
        return Run(self, {"arguments": list(map(str, arguments)), **options})

    def start_ranks(self, number, *arguments, environment=None, **options):
        """Starts a run on several processes, and returns the runs."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | (environment or {})
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]
        return [self.start(*arguments, environment=shared | rank, **options) for rank in ranks]

    def on_ranks(self, number, *arguments, **options):
        """Runs on several processes to their ends, as a launcher does, and returns the runs."""
        return [run.wait() for run in self.start_ranks(number, *arguments, **options)]

    def run(self, *arguments, **options):
        """Runs to the end."""
        return self.start(*arguments, **options).wait()

    def python(self, code, **environment):
        """Runs some lines to the end."""
        with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
            script.write(code)
            script.flush()
            return self.run(script=script.name, environment=environment)

    def ask(self, request):
        print(json.dumps(request, default=str), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def close(self):
        self._process.stdin.close()
        self._process.wait(timeout=10)
        self._process.stdout.close()


class Run:
    """A run: its process id, and when it was waited for, what it left."""

    def __init__(self, server, request):
        self._server, self._folder = server, tempfile.mkdtemp()
        # Pipes, since a full disk limits files; the output fits into one.
        paths = [Path(self._folder, name) for name in ("out", "err")]
        for path in paths:
            os.mkfifo(path)
        self._outputs = [os.open(path, os.O_RDONLY | os.O_NONBLOCK) for path in paths]
        self.pid = server.ask({"outputs": paths, **request})
        self.status = self.out = self.err = None

    def wait(self):
        """Waits for the end; a negative status is that of a signal."""
        self.status = self._server.ask({"wait": self.pid})
        self.out, self.err = map(drain, self._outputs)
        shutil.rmtree(self._folder)
        return self

    def kill(self, number=signal.SIGKILL):
        """Sends a signal to the process that runs the command; it may have ended."""
        os.kill(self.pid, number)


def drain(pipe):
    """Reads what is in a pipe; a data worker that was left behind may still hold the other end."""
    try:
        return os.read(pipe, 1 << 16).decode()
    except BlockingIOError:
        return ""
    finally:
        os.close(pipe)


def serve():
    """Imports what a run would, makes what its first figure would, and forks on request."""
    import timm  # noqa: F401

    if sys.argv[1] == "all":
        import damaged  # noqa: F401
        import sklearn.datasets  # noqa: F401
        import torch

        import train_lt  # noqa: F401
        from timm_lt.report.plots import save_count_plot

        with tempfile.TemporaryDirectory() as scratch:
            save_count_plot(Path(scratch) / "plot.png", torch.tensor([9, 3, 1]))
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        elif (answer := os.fork()) == 0:
            run(**request)
        print(answer, flush=True)  # noqa: T201
    # Taking apart all that was imported takes seconds.
    os._exit(0)


def run(arguments, outputs, script=None, at=None, limit=None, environment=None):
    status = 70
    try:
        os.setpgid(0, 0)
        # Where the tests run in the background, a shell has told all of them to ignore it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, path in enumerate(outputs, start=1):
            os.dup2(os.open(path, os.O_WRONLY), number)
        os.environ.update(environment or {})
        if at is not None:
            watch(at, limit)
        elif limit is not None:
            fill_disk(limit)
        if script is None:
            import train_lt

            status = train_lt.main(arguments)
        else:
            sys.argv = [script, *arguments]
            runpy.run_path(script, run_name="__main__")
            status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:  # noqa: BLE001
        sys.excepthook(*sys.exc_info())
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def watch(pattern, limit):
    """Kills this process, or fills its disk, when a path is touched that fits the pattern."""
    me = os.getpid()

    def hook(event, arguments):
        if event in ("open", "os.mkdir", "os.rename") and os.getpid() == me:
            path = str(arguments[1 if event == "os.rename" else 0])
            if fnmatch.fnmatch(path, pattern):
                os.kill(me, signal.SIGKILL) if limit is None else fill_disk(limit)

    sys.addaudithook(hook)


def fill_disk(limit):
    # Python ignores the signal, so a write fails in the middle of a file.
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))


if __name__ == "__main__":
    serve()
