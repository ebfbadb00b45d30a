"""The server: its repos, its log, and the faults that a test asks for."""

import hashlib
import itertools
import re
import sys
import threading
from dataclasses import dataclass, field
from functools import partial
from http.server import ThreadingHTTPServer

from hub_server.api import Handler
from hub_server.repos import ATTRIBUTES, LFS_LINE, LFS_PATTERNS, Blob, Commit, Repo, is_lfs


@dataclass
class Request:
    """A request that arrived; ``sent`` counts the body's bytes in its answer."""

    method: str
    path: str
    status: int | None = None
    sent: int = 0


@dataclass
class Fault:
    """What goes wrong, for the requests and the number of times that `LoopbackHub.fault` says."""

    method: str = ""
    path: str = ""
    status: int | None = None
    headers: dict = field(default_factory=dict)
    error_code: str | None = None
    cut: int | None = None
    corrupt: bool = False
    drop: str | None = None
    times: int | None = None

    def matches(self, request):
        of_method = re.fullmatch(self.method, request.method)
        return self.times != 0 and of_method and re.search(self.path, request.path)

    def alter(self, body):
        if self.corrupt and body:
            middle = len(body) // 2
            return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        return body


class LoopbackHub:
    """The Hub in memory. It binds its port at once, and listens from `start` to `close`.

    Attributes:
        endpoint: Its URL.
        tokens: token -> (user name, whether it may write).
        requests: All that arrived since the last `forget`, as `Request`.
        errors: Exceptions of the server itself.
    """

    WRITER, READER, STRANGER = "hf_writer", "hf_reader", "hf_stranger"

    def __init__(self):
        self.lock = threading.RLock()
        self.count = itertools.count(1)
        self.errors = []
        self._server = _Server(("127.0.0.1", 0), partial(Handler, self), bind_and_activate=False)
        self._server.hub = self
        self._server.server_bind()
        self._thread = None
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.reset()

    def start(self):
        self._server.server_activate()
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.01,), daemon=True
        )
        self._thread.start()

    def close(self):
        if self._thread:
            self._server.shutdown()
            self._thread.join()
            self._thread = None
        self._server.server_close()

    def reset(self):
        """Forgets all repos, tokens, faults and requests."""
        with self.lock:
            self.repos, self.faults = {}, []
            self.tokens = {
                self.WRITER: ("me", True),
                self.READER: ("me", False),
                self.STRANGER: ("you", True),
            }
            self.errors.clear()
            self.forget()

    def forget(self):
        """Starts the log anew."""
        self.requests, self.fetched, self.inline, self.put, self.lfs_paths = [], [], [], [], {}

    def fault(self, method, path_regex, **what):
        """Answers matching requests, the first ``times`` of them (None: all), with a fault.

        The expressions match the whole method and any part of the path, which is unquoted and has
        no query. ``status`` answers an error instead of doing anything, with ``error_code`` as
        X-Error-Code; ``headers`` are set on any answer, None removes one. A body is closed after
        ``cut`` bytes, or has one bit flipped (``corrupt``); HEAD stays true. ``drop`` closes the
        connection: "request" while half of the request's body is read, "answer" when the work is
        done but nobody is told.
        """
        self.faults.append(Fault(method, path_regex, **what))

    def clear_faults(self):
        self.faults.clear()

    def create(self, repo_id, files=None, *, private=False, gated=False):
        """Makes a repo with the Hub's first commit, and a second one if there are files."""
        with self.lock:
            repo = self.repos[repo_id] = Repo(repo_id, private, gated)
            lines = "".join(map(LFS_LINE.format, LFS_PATTERNS.split()))
            blobs = {ATTRIBUTES: Blob(lines.encode(), lfs=False)}
            self.record(repo, "main", blobs, message="initial commit", user="system")
            if files:
                self.commit(repo_id, files)
            return repo

    def commit(self, repo_id, files, revision="main", *, message="Commit"):
        """Commits files, path -> bytes or None to delete, and returns the commit's id."""
        with self.lock:
            repo = self.repos[repo_id]
            blobs = dict(repo.branches[revision].blobs)
            attributes = blobs[ATTRIBUTES].content
            for path, content in files.items():
                blobs.pop(path, None)
                if content is not None:
                    lfs = is_lfs(attributes, path, content[:512], len(content))
                    blobs[path] = Blob(content, lfs)
            return self.record(repo, revision, blobs, message=message).id

    def record(self, repo, revision, blobs, *, message, description="", user="me"):
        """Adds a commit to a branch; LFS files without a pattern get a line in .gitattributes."""
        attributes = blobs[ATTRIBUTES].content
        for path, blob in blobs.items():
            if blob.lfs and not is_lfs(attributes, path, b"", 1):
                attributes += LFS_LINE.format(path).encode()
        blobs = blobs | {ATTRIBUTES: Blob(attributes, lfs=False)}
        parent = repo.branches.get(revision)
        before = parent.blobs if parent else {}
        changed = sorted(p for p in before | blobs if before.get(p) != blobs.get(p))
        name = hashlib.sha1(f"{repo.id} {next(self.count)}".encode()).hexdigest()
        return repo.add(revision, Commit(name, message, description, user, changed, blobs, parent))

    def commits(self, repo_id, revision="main"):
        """The commits, newest first: ``id``, ``message``, ``changed`` (paths), ``blobs``."""
        return list(self.repos[repo_id].find(revision).history())

    def files(self, repo_id, revision="main"):
        """The files, path -> bytes."""
        blobs = self.repos[repo_id].find(revision).blobs
        return {path: blob.content for path, blob in sorted(blobs.items())}

    def downloads(self):
        """Sorted repo paths whose content, or the start of it, went out since `forget`."""
        return sorted(set(self.fetched))

    def uploads(self):
        """Sorted repo paths whose content came in since `forget`; "lfs:..." if in no commit."""
        return sorted({*self.inline, *(self.lfs_paths.get(oid, f"lfs:{oid}") for oid in self.put)})

    def arrived(self, method, path):
        """Logs a request and returns it with its fault."""
        request = Request(method, path)
        with self.lock:
            self.requests.append(request)
            fault = next((fault for fault in self.faults if fault.matches(request)), Fault())
            if fault.times:
                fault.times -= 1
            return request, fault


class _Server(ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, *_):
        error = sys.exception()
        if not isinstance(error, ConnectionError):
            self.hub.errors.append(error)
