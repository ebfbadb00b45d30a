"""The main job many times for one import: each run is a fork of a process that imported all."""

import fnmatch
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent


class Server:
    """The process that forks; a run has its own process group, led by it."""

    def __init__(self):
        paths = [str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            # Their number decides the bits of a run.
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, *arguments, at=None, limit=None, environment=None):
        """Starts a run and returns it.

        ``at`` is a pattern of paths: when one is opened, made or renamed, the run is killed, or may
        write no more than ``limit`` bytes to a file. Without ``at``, the limit is there from the
        start.
        """
        arguments = list(map(str, arguments))
        request = {"arguments": arguments, "at": at, "limit": limit, "environment": environment}
        return Run(self, self._ask(request))

    def run(self, *arguments, **options):
        """Runs to the end."""
        return self.start(*arguments, **options).wait()

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


def serve():
    # All that a run would import.
    import damaged  # noqa: F401
    import sklearn.datasets  # noqa: F401

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
    import train_lt

    status = 70
    try:
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, output in enumerate(outputs, start=1):
            os.dup2(output, number)
        os.environ.update(request["environment"] or {})
        if request["at"] is not None:
            watch(request["at"], request["limit"])
        elif request["limit"] is not None:
            fill_disk(request["limit"])
        status = train_lt.main(request["arguments"])
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
