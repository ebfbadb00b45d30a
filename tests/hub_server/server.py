"""The server: its repos in memory, its log, and the faults that a test asks for."""

import hashlib
import itertools
import re
import sys
import threading
from dataclasses import dataclass, field
from functools import cached_property, partial
from http.server import ThreadingHTTPServer

LFS_SUFFIXES = (".arrow", ".bin", ".parquet", ".safetensors")


def is_lfs(path, content):
    """Whether the Hub stores a file as LFS: by its name, or because it is binary."""
    return len(content) > 0 and (path.endswith(LFS_SUFFIXES) or b"\0" in content)


@dataclass(frozen=True)
class Blob:
    """One version of a file; ``lfs`` says how the repo stores it."""

    content: bytes
    lfs: bool

    @cached_property
    def sha256(self):
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self):
        lines = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
        return lines.format(self.sha256, len(self.content)).encode()

    @cached_property
    def git_oid(self):
        stored = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self):
        return self.sha256 if self.lfs else self.git_oid

    def lfs_info(self, key):
        if not self.lfs:
            return {}
        info = {key: self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return {"lfs": info}


@dataclass(frozen=True)
class Commit:
    id: str
    message: str
    blobs: dict = field(repr=False)
    parent: "Commit | None" = field(repr=False)

    def history(self):
        commit = self
        while commit:
            yield commit
            commit = commit.parent


@dataclass
class Repo:
    """A repo; ``objects`` are the LFS files that were uploaded, by SHA-256."""

    id: str
    private: bool
    gated: bool
    branches: dict = field(default_factory=dict)
    tags: dict = field(default_factory=dict)
    objects: dict = field(default_factory=dict)
    all_commits: dict = field(default_factory=dict)

    def find(self, revision):
        for known in (self.branches, self.tags, self.all_commits):
            if revision in known:
                return known[revision]
        raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


@dataclass
class Reply:
    """An answer; ``path`` is the repo's file that it has the content of."""

    body: object = field(default_factory=dict)
    status: int = 200
    headers: dict = field(default_factory=dict)
    path: str | None = None


class RefusedError(Exception):
    """An error answer, as the Hub gives it: a status, a message and an X-Error-Code."""

    def __init__(self, status, message, code=None, *, headers=None, **details):
        super().__init__(message)
        headers = {"X-Error-Code": code, "X-Error-Message": message} | (headers or {})
        self.reply = Reply({"error": message} | details, status, headers)


@dataclass
class Fault:
    """What goes wrong, for which requests and how many times; see `LoopbackHub.fault`."""

    method: str = ""
    path: str = ""
    status: int | None = None
    headers: dict = field(default_factory=dict)
    cut: int | None = None
    corrupt: bool = False
    drop: str | None = None
    times: int | None = None

    def matches(self, method, path):
        return self.times != 0 and re.fullmatch(self.method, method) and re.search(self.path, path)

    def alter(self, body):
        middle = len(body) // 2
        if self.corrupt and body:
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        return body


class LoopbackHub:
    """The Hub in memory. It binds its port at once, and listens from `start` to `close`.

    Attributes:
        endpoint: Its URL.
        tokens: token -> (user name, whether it may write).
        requests: Method and path of all requests since the last `forget`.
        errors: Exceptions of the server itself.
    """

    WRITER, READER, STRANGER = "hf_writer", "hf_reader", "hf_stranger"

    def __init__(self):
        # The handler's module needs the classes of this one.
        from hub_server.api import Handler

        self.lock = threading.RLock()
        self.count = itertools.count(1)
        self.errors = []
        self.tokens = {
            self.WRITER: ("me", True),
            self.READER: ("me", False),
            self.STRANGER: ("you", True),
        }
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
        """Forgets all repos, faults and requests."""
        with self.lock:
            self.repos, self.faults = {}, []
            self.errors.clear()
            self.forget()

    def forget(self):
        """Starts the log anew."""
        self.requests, self.fetched, self.inline, self.put, self.lfs_paths = [], [], [], [], {}

    def fault(self, method, path_regex, **what):
        """Answers matching requests, the first ``times`` of them (None: all), with a fault.

        The expressions match the whole method and any part of the path, which is unquoted and has
        no query. ``status`` answers an error instead of doing anything; ``headers`` are set on any
        answer. A body is closed after ``cut`` bytes, or has one bit flipped (``corrupt``); HEAD
        stays true. ``drop`` closes the connection: "request" while half of the request's body is
        read, "answer" when the work is done but nobody is told.
        """
        self.faults.append(Fault(method, path_regex, **what))

    def clear_faults(self):
        self.faults.clear()

    def create(self, repo_id, files=None, *, private=False, gated=False):
        """Makes a repo with the Hub's first commit, and a second one if there are files."""
        with self.lock:
            repo = self.repos[repo_id] = Repo(repo_id, private, gated)
            blobs = {".gitattributes": Blob(b"", lfs=False)}
            self.record(repo, "main", blobs, "initial commit")
            if files:
                self.commit(repo_id, files)

    def commit(self, repo_id, files):
        """Commits files, path -> bytes, to the main branch."""
        with self.lock:
            repo = self.repos[repo_id]
            new = {path: Blob(content, is_lfs(path, content)) for path, content in files.items()}
            self.record(repo, "main", repo.branches["main"].blobs | new, "Commit")

    def record(self, repo, revision, blobs, message):
        """Adds a commit to a branch."""
        name = hashlib.sha1(f"{repo.id} {next(self.count)}".encode()).hexdigest()
        commit = Commit(name, message, blobs, repo.branches.get(revision))
        repo.branches[revision] = repo.all_commits[name] = commit
        repo.objects |= {blob.sha256: blob.content for blob in blobs.values() if blob.lfs}
        return commit

    def commits(self, repo_id):
        """The commits of the main branch, newest first."""
        return list(self.repos[repo_id].find("main").history())

    def files(self, repo_id):
        """The files of the main branch, path -> bytes."""
        blobs = self.repos[repo_id].find("main").blobs
        return {path: blob.content for path, blob in sorted(blobs.items())}

    def downloads(self):
        """Sorted repo paths whose content, or the start of it, went out since `forget`."""
        return sorted(set(self.fetched))

    def uploads(self):
        """Sorted repo paths whose content came in since `forget`; "lfs:..." if in no commit."""
        return sorted({*self.inline, *(self.lfs_paths.get(oid, f"lfs:{oid}") for oid in self.put)})

    def arrived(self, method, path):
        """Logs a request and returns its fault."""
        with self.lock:
            self.requests.append((method, path))
            fault = next((fault for fault in self.faults if fault.matches(method, path)), Fault())
            if fault.times:
                fault.times -= 1
            return fault


class _Server(ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, *_):
        error = sys.exception()
        if not isinstance(error, ConnectionError):
            self.hub.errors.append(error)
