"""A hub on 127.0.0.1: the Hugging Face Hub's HTTP API in memory, with a log and with faults.

It is used unless HF_TOKEN is set and pytest gets ``-m hub``: then the tests use the real Hub. It
has the endpoints that huggingface_hub asks for models and data sets. A data set is a repo of the id
``datasets/NAMESPACE/NAME``; it has a model's endpoints, elsewhere.
"""

import argparse
import atexit
import base64
import hashlib
import itertools
import json
import os
import re
import secrets
import shlex
import shutil
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from functools import cached_property, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

LFS_SUFFIXES = (".arrow", ".bin", ".parquet", ".safetensors")
DATASETS = "datasets/"
DATE = "2026-01-01T00:00:00.000Z"
ROUTES = []


def real_hub():
    """Whether this run is for the real Hub."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-m", default="")
    arguments = shlex.split(os.environ.get("PYTEST_ADDOPTS", "")) + sys.argv[1:]
    marks = parser.parse_known_args(arguments)[0].m
    return bool(os.environ.get("HF_TOKEN")) and bool(re.search(r"(?<!not )\bhub\b", marks))


def set_environment():
    """Sets what huggingface_hub reads when it is imported, and returns the hub that it will ask.

    The hub is not started: until then a connection is refused at once. It is None for a run on the
    real Hub, which keeps the endpoint and the token.
    """
    if "huggingface_hub" in sys.modules:
        raise RuntimeError("huggingface_hub was imported before tests/conftest.py could set it up.")
    home = tempfile.mkdtemp(prefix="hf_home_")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    hub = None
    if not real_hub():
        hub = LoopbackHub()
        atexit.register(hub.close)
        for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
            del os.environ[name]
        os.environ["HF_ENDPOINT"] = hub.endpoint
        for name in ("no_proxy", "NO_PROXY"):
            hosts = os.environ.get(name, "")
            os.environ[name] = hosts if hosts == "*" else f"{hosts},127.0.0.1".lstrip(",")
    for name in ("XET", "TELEMETRY", "PROGRESS_BARS", "UPDATE_CHECK"):
        os.environ[f"HF_HUB_DISABLE_{name}"] = "1"
    os.environ["HF_HOME"] = home
    return hub


class Hub:
    """A repo id to use and an empty cache, on the loopback hub or (no ``server``) the real one.

    Only the loopback hub checks uploads, downloads and contents.
    """

    def __init__(self, namespace, cache, server=None):
        self.repo_id = f"{namespace}/timm-lt-test-{secrets.token_hex(4)}"
        self.cache, self.server, self._known = Path(cache), server, {}
        self.forget = server.forget if server else lambda: None

    def check_uploads(self, paths):
        assert not self.server or self.server.uploads() == paths

    def check_downloads(self, paths):
        assert not self.server or self.server.downloads() == paths

    def downloaded(self):
        """Sorted repo paths of all files in the snapshots of the cache."""
        folder = self.cache / f"models--{self.repo_id.replace('/', '--')}" / "snapshots"
        files = [path.relative_to(folder) for path in folder.glob("*/**/*") if path.is_file()]
        return sorted({"/".join(path.parts[1:]) for path in files})

    def on_the_wire(self):
        """Same, checked against the server's log; for a cache that was empty at `forget`."""
        paths = self.downloaded()
        self.check_downloads(paths)
        return paths

    def read(self, path):
        """The content of a file of the main branch."""
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(self.repo_id, path)).read_bytes()

    def files(self):
        """The files in the repo, path -> SHA-256 for LFS files, git's SHA-1 for others."""
        entries = self._api().list_repo_tree(self.repo_id, recursive=True)
        files = [entry for entry in entries if hasattr(entry, "blob_id")]
        self._known = {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}
        return self._known

    def changed(self):
        """Sorted paths that differ since the last call of `files` or of this."""
        before, now = self._known, self.files()
        return sorted(path for path in before | now if before.get(path) != now.get(path))

    def check_commits(self, *titles):
        commits = self.server and self.server.commits(self.repo_id)
        assert not commits or tuple(commit.message for commit in commits) == titles

    @staticmethod
    def _api():
        from huggingface_hub import HfApi

        return HfApi()


# ---- the repos -----------------------------------------------------------------------------------


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
    def git_oid(self):
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self):
        return self.sha256 if self.lfs else self.git_oid

    def lfs_info(self, key):
        info = {key: self.sha256, "size": len(self.content), "pointerSize": 130}
        return {"lfs": info} if self.lfs else {}


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
    objects: dict = field(default_factory=dict)
    all_commits: dict = field(default_factory=dict)

    def find(self, revision):
        for known in (self.branches, self.all_commits):
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
    """A fault, its requests and how many times it occurs; see `LoopbackHub.fault`."""

    method: str = ""
    path: str = ""
    status: int | None = None
    headers: dict = field(default_factory=dict)
    corrupt: bool = False
    drop: str | None = None
    times: int | None = None

    def matches(self, method, path):
        return self.times != 0 and re.fullmatch(self.method, method) and re.search(self.path, path)


class LoopbackHub:
    """The Hub in memory. It binds its port at once, and listens from `start` to `close`.

    Attributes:
        endpoint: Its URL.
        tokens: token -> (user name, whether it may write).
        errors: Exceptions of the server itself.
    """

    WRITER, READER, STRANGER = "hf_writer", "hf_reader", "hf_stranger"

    def __init__(self):
        self.lock, self.count, self.errors = threading.RLock(), itertools.count(1), []
        self.tokens = {
            self.WRITER: ("me", True),
            self.READER: ("me", False),
            self.STRANGER: ("you", True),
        }
        self._server = _Server(("127.0.0.1", 0), partial(Handler, self), bind_and_activate=False)
        self._server.hub, self._thread = self, None
        self._server.server_bind()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.reset()

    def start(self):
        self._server.server_activate()
        serve = self._server.serve_forever
        self._thread = threading.Thread(target=serve, args=(0.01,), daemon=True)
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
        answer. A body may have one bit flipped (``corrupt``). ``drop`` closes the connection:
        "request" while half of the request's body is read, "answer" when the work is done but
        nobody is told.
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


# ---- the endpoints -------------------------------------------------------------------------------


def route(methods, pattern):
    """Registers the method that answers requests for a path."""
    for name, group in (("repo", "[^/]+(?:/[^/]+)?"), ("rev", "[^/]+"), ("path", ".+")):
        pattern = pattern.replace(f"{{{name}}}", f"(?P<{name}>{group})")

    def register(function):
        ROUTES.append((methods.split("|"), re.compile(pattern), function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, hub, *args):
        self.hub = hub
        super().__init__(*args)

    def dispatch(self):
        path, _, query = self.path.partition("?")
        self.query = {name: values[-1] for name, values in parse_qs(query).items()}
        fault = self.hub.arrived(self.command, unquote(path))
        length = int(self.headers["Content-Length"] or 0)
        self.body = self.rfile.read(length // 2 if fault.drop == "request" else length)
        if fault.drop == "request":
            self.close_connection = True
            return
        try:
            if fault.status:
                raise RefusedError(fault.status, f"Fault {fault.status}")
            with self.hub.lock:
                reply = self.routed(path)
        except RefusedError as refused:
            reply = refused.reply
        if fault.drop == "answer":
            self.close_connection = True
            return
        self.send(reply if isinstance(reply, Reply) else Reply(reply), fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = dispatch  # noqa: N815

    def routed(self, path):
        plain = re.sub("^/(api/)?datasets/", lambda m: "/api/models/" if m[1] else "/", path)
        self.prefix = DATASETS if plain != path else ""
        for methods, pattern, function in ROUTES:
            found = pattern.fullmatch(plain)
            if found and self.command in methods:
                groups = {name: unquote(value or "") for name, value in found.groupdict().items()}
                return function(self, **groups)
        raise RefusedError(404, f"Loopback hub: no endpoint for {self.command} {path}")

    def send(self, reply, fault):
        body, status, headers = reply.body, reply.status, dict(reply.headers)
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers["Content-Type"] = "application/json; charset=utf-8"
        if fault.corrupt and body and self.command != "HEAD":
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if asked and reply.path and self.command == "GET":
            start, end = int(asked[1]), min(int(asked[2] or len(body)), len(body) - 1)
            status, headers["Content-Range"] = 206, f"bytes {start}-{end}/{len(body)}"
            body = body[start : end + 1]
        headers |= {"Content-Length": len(body)} | fault.headers
        if reply.path and self.command == "GET":
            self.hub.fetched.append(reply.path)
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass

    def user(self, *, write=False, code=None):
        """The user's name, None without a token."""
        scheme, _, token = (self.headers["Authorization"] or "").partition(" ")
        if scheme and token not in self.hub.tokens:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        name, can_write = self.hub.tokens[token] if scheme else (None, False)
        if write and name is None:
            raise RefusedError(401, "Invalid username or password.", code)
        if write and not can_write:
            raise RefusedError(403, "Forbidden: you must use a write token for this repository.")
        return name

    def repo(self, repo_id, *, write=False):
        """The repo, if the request may read or write it.

        The client takes any 401 from https://HOST/api/models for a missing repo; here, where it
        is http, the code makes it do the same.
        """
        user, repo = self.user(), self.hub.repos.get(self.prefix + repo_id)
        owner = user == repo_id.split("/")[0]
        if repo is None or (repo.private and not owner):
            raise RefusedError(404 if user else 401, "Repository not found", "RepoNotFound")
        if write:
            self.user(write=True, code="RepoNotFound")
        if write and not owner:
            raise RefusedError(403, "Forbidden: pass `create_pr=1` to create a Pull Request")
        return repo

    def json(self):
        return json.loads(self.body)

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        user = self.user()
        if user is None:
            raise RefusedError(401, "Invalid username or password.")
        role = "write" if self.hub.tokens[self.headers["Authorization"].split()[1]][1] else "read"
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        return {"type": "user", "id": user, "name": user, "orgs": [], "auth": access}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self):
        return {"errors": [], "warnings": []}

    @route("POST", "/api/repos/create")
    def create(self):
        user, asked = self.user(write=True), self.json()
        namespace = asked.get("organization") or user
        repo_id = f"{namespace}/{asked['name']}"
        url = f"{self.hub.endpoint}/{repo_id}"
        if namespace != user:
            raise RefusedError(403, "You don't have the rights to create a model")
        if repo_id in self.hub.repos:
            raise RefusedError(409, "You already created this model repo", url=url)
        self.hub.create(repo_id, private=asked.get("visibility") == "private")
        return {"url": url, "name": repo_id, "id": repo_id}

    @route("POST", "/api/models/{repo}/preupload/{rev}")
    def preupload(self, repo, rev):
        commit, files = self.repo(repo, write=True).find(rev), []
        for file in self.json()["files"]:
            path = file["path"]
            mode = "lfs" if is_lfs(path, base64.b64decode(file["sample"])) else "regular"
            oid = {"oid": commit.blobs[path].etag} if path in commit.blobs else {}
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | oid)
        return {"commitOid": commit.id, "files": files}

    @route("POST", r"/{repo}\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo):
        repo, objects = self.repo(repo, write=True), []
        for asked in self.json()["objects"]:
            upload = {"href": f"{self.hub.endpoint}/lfs/{repo.id}/{asked['oid']}"}
            new = {} if asked["oid"] in repo.objects else {"actions": {"upload": upload}}
            objects.append({"oid": asked["oid"], "size": asked["size"]} | new)
        return {"transfer": "basic", "objects": objects}

    @route("PUT", "/lfs/{repo}/(?P<oid>[0-9a-f]{64})")
    def lfs_put(self, repo, oid):
        self.hub.put.append(oid)
        self.hub.repos[repo].objects[oid] = self.body
        return Reply(b"")

    @route("POST", "/api/models/{repo}/commit/{rev}")
    def commit(self, repo, rev):
        repo = self.repo(repo, write=True)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        head, asked = repo.find(rev), header["value"]
        if asked.get("parentCommit", head.id) != head.id:
            raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
        blobs = dict(head.blobs)
        for operation in operations:
            key, value = operation["key"], operation["value"]
            path = value["path"]
            if key == "file":
                self.hub.inline.append(path)
                blobs[path] = Blob(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                self.hub.lfs_paths.setdefault(value["oid"], path)
                blobs[path] = Blob(repo.objects[value["oid"]], lfs=True)
            else:
                assert key == "deletedFile", key
                del blobs[path]
        made = self.hub.record(repo, rev, blobs, asked["summary"])
        url = f"{self.hub.endpoint}/{repo.id}/commit/{made.id}"
        return {"success": True, "commitOid": made.id, "commitUrl": url, "hookOutput": ""}

    @route("POST", "/api/models/{repo}/branch/(?P<name>[^/]+)")
    def branch(self, repo, name):
        repo = self.repo(repo, write=True)
        if name in repo.branches:
            raise RefusedError(409, f"Reference already exists: {name}")
        repo.branches[name] = repo.find(self.json().get("startingPoint", "main"))
        return {}

    @staticmethod
    def entry(path, blob):
        if blob is None:
            oid = hashlib.sha1(path.encode()).hexdigest()
            return {"type": "directory", "path": path, "oid": oid, "size": 0}
        file = {"type": "file", "path": path, "oid": blob.git_oid, "size": len(blob.content)}
        return file | blob.lfs_info("oid")

    @route("GET", "/api/models/{repo}/tree/{rev}(?:/{path})?")
    def tree(self, repo, rev, path):
        folder, found = f"{path}/" if path else "", {}
        for name, blob in sorted(self.repo(repo).find(rev).blobs.items()):
            if name.startswith(folder):
                parts = name.removeprefix(folder).split("/")
                depth = len(parts) if self.query.get("recursive", "").lower() == "true" else 1
                for i in range(1, depth + 1):
                    found[folder + "/".join(parts[:i])] = blob if i == len(parts) else None
        if not found:
            raise RefusedError(404, f"{path} does not exist on {rev}", "EntryNotFound")
        return [self.entry(name, blob) for name, blob in found.items()]

    @route("GET|HEAD", "/{repo}/resolve/{rev}/{path}")
    def resolve(self, repo, rev, path):
        repo = self.repo(repo)
        name = repo.id.removeprefix(DATASETS)
        if repo.gated and self.user() != name.split("/")[0]:
            status = 403 if self.user() else 401
            raise RefusedError(status, f"Access to {name} is restricted", "GatedRepo")
        commit = repo.find(rev)
        headers = {"X-Repo-Commit": commit.id}
        if path not in commit.blobs:
            raise RefusedError(404, "Entry not found", "EntryNotFound", headers=headers)
        blob = commit.blobs[path]
        headers |= {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": len(blob.content)}
        return Reply(blob.content, headers=headers, path=path)

    @route("GET", "/api/models/{repo}(?:/revision/{rev})?")
    def info(self, repo, rev):
        repo = self.repo(repo)
        commit = repo.find(rev or "main")
        siblings = []
        for path, blob in sorted(commit.blobs.items()):
            more = {"size": len(blob.content), "blobId": blob.git_oid} | blob.lfs_info("sha256")
            siblings.append({"rfilename": path} | (more if "blobs" in self.query else {}))
        return {
            "id": repo.id.removeprefix(DATASETS),
            "sha": commit.id,
            "lastModified": DATE,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "disabled": False,
            "tags": [],
            "siblings": siblings,
        }
