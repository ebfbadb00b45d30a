"""Repos in memory: files, commits, branches, and what the Hub thinks of a file."""

import hashlib
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import cached_property

import yaml

ATTRIBUTES = ".gitattributes"
LFS_LINE = "{} filter=lfs diff=lfs merge=lfs -text\n"
LFS_PATTERNS = (
    "*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack "
    "*.npy *.npz *.onnx *.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors "
    "saved_model/**/* *.tar.* *.tar *.tflite *.tgz *.wasm *.xz *.zip *.zst *tfevents*"
)
LFS_SIZE = 10 << 20
FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)


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
    description: str
    user: str
    changed: list
    blobs: dict = field(repr=False)
    parent: "Commit | None" = field(repr=False)
    date: str = field(default_factory=lambda: f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.000Z}")

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

    def add(self, revision, commit):
        self.branches[revision] = self.all_commits[commit.id] = commit
        self.objects |= {blob.sha256: blob.content for blob in commit.blobs.values() if blob.lfs}
        return commit


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


def is_lfs(attributes, path, sample, size):
    """Whether the Hub stores a file as LFS: by pattern, or for its size, or as it is binary."""
    patterns = [
        line.split()[0] for line in attributes.decode().splitlines() if "filter=lfs" in line
    ]
    by_name = any(fnmatch(path, p) or fnmatch(path.split("/")[-1], p) for p in patterns)
    return size > 0 and (by_name or size > LFS_SIZE or b"\0" in sample)


def read_card(text):
    """The front matter of a README.md, with the errors and warnings that the Hub has for it."""
    found = FRONT_MATTER.match(text)
    try:
        data = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError as error:
        return {}, [f"Invalid YAML in README.md: {error}"], []
    if data is None:
        return {}, [], ["empty or missing yaml metadata in repo card"]
    return (data, [], []) if isinstance(data, dict) else ({}, ["metadata must be an object"], [])
