"""The main job, or a script, many times for one import: each a fork of a process that has all."""

import fnmatch
import json
import os
import resource
import runpy
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
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            # Their number decides the bits of a run.
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__, "plain" if plain else "all"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, *arguments, script=None, at=None, limit=None, environment=None):
        """Starts a run of the command, or of a script, and returns it.

        ``at`` is a pattern of paths: when one is opened, made or renamed, the run is killed, or may
        write no more than ``limit`` bytes to a file. Without ``at``, the limit is there from the
        start.
        """
        request = {
            "arguments": list(map(str, arguments)),
            "script": None if script is None else str(script),
            "at": at,
            "limit": limit,
            "environment": environment,
        }
        return Run(self, self._ask(request))

    def on_ranks(self, number, *arguments, **options):
        """Runs on several processes to their ends, as a launcher does, and returns the runs."""
        return [run.wait() for run in self.start_ranks(number, *arguments, **options)]

    def start_ranks(self, number, *arguments, environment=None, **options):
        """Starts a run on several processes, and returns the runs."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {**(environment or {}), "WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return [
            self.start(
                *arguments,
                environment=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                **options,
            )
            for rank in range(number)
        ]

    def run(self, *arguments, **options):
        """Runs to the end."""
        return self.start(*arguments, **options).wait()

    def python(self, code, **environment):
        """Runs some lines to the end."""
        with tempfile.TemporaryDirectory() as scratch:
            script = Path(scratch) / "script.py"
            script.write_text(code)
            return self.run(script=script, environment=environment)

    def close(self):
        self._process.stdin.close()
        self._process.wait(timeout=10)
        self._process.stdout.close()

    def _ask(self, request):
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


class Run:
    """A run: its process id, and when it was waited for, what it left."""

    def __init__(self, server, pid):
        self._server, self.pid = server, pid
        self.status = self.out = self.err = None

    def wait(self):
        """Waits for the end; a negative status is that of a signal."""
        answer = self._server._ask({"wait": self.pid})
        self.status, self.out, self.err = answer["status"], answer["out"], answer["err"]
        return self

    def kill(self, number=signal.SIGKILL):
        """Sends a signal to the process that runs the command; it may have ended."""
        os.kill(self.pid, number)


def import_all():
    """Imports what a run would, and makes what its first figure would."""
    import damaged  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch

    import train_lt  # noqa: F401
    from timm_lt.report.plots import save_count_plot

    with tempfile.TemporaryDirectory() as scratch:
        save_count_plot(Path(scratch) / "plot.png", torch.tensor([9, 3, 1]))


def serve():
    if sys.argv[1] == "plain":
        import timm  # noqa: F401
    else:
        import_all()
    pipes = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            pid = request["wait"]
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            out, err = map(drain, pipes.pop(pid))
            answer = {"status": status, "out": out, "err": err}
        else:
            answer = fork(request, pipes)
        print(json.dumps(answer), flush=True)  # noqa: T201
    # Taking apart all that was imported takes seconds.
    os._exit(0)


def fork(request, pipes):
    """Starts a run; its output fits into a pipe."""
    pairs = [os.pipe(), os.pipe()]
    pid = os.fork()
    if pid == 0:
        run(request, [write for _, write in pairs])
    for _, write in pairs:
        os.close(write)
    pipes[pid] = [read for read, _ in pairs]
    return pid


def run(request, outputs):
    status = 70
    try:
        os.setpgid(0, 0)
        # Where the tests run in the background, a shell has told all of them to ignore it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, output in enumerate(outputs, start=1):
            os.dup2(output, number)
        os.environ.update(request["environment"] or {})
        if request["at"] is not None:
            watch(request["at"], request["limit"])
        elif request["limit"] is not None:
            fill_disk(request["limit"])
        if request["script"] is None:
            import train_lt

            status = train_lt.main(request["arguments"])
        else:
            sys.argv = [request["script"], *request["arguments"]]
            runpy.run_path(request["script"], run_name="__main__")
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
            if not fnmatch.fnmatch(path, pattern):
                return
            if limit is None:
                os.kill(me, signal.SIGKILL)
            else:
                fill_disk(limit)

    sys.addaudithook(hook)


def fill_disk(limit):
    # Python ignores the signal, so a write fails in the middle of a file.
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))


def drain(descriptor):
    """Reads what is in a pipe; a data worker that was left behind may still hold the other end."""
    os.set_blocking(descriptor, False)
    content = b""
    try:
        while part := os.read(descriptor, 1 << 16):
            content += part
    except BlockingIOError:
        pass
    os.close(descriptor)
    return content.decode()


if __name__ == "__main__":
    serve()
