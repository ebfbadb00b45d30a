"""A hub on 127.0.0.1: the Hugging Face Hub's HTTP API in memory, with a log and with faults.

It is used unless HF_TOKEN is set and pytest gets ``-m hub``: then the tests use the real Hub.
"""

import argparse
import atexit
import os
import re
import secrets
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from hub_server.server import LoopbackHub as LoopbackHub


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
    """A repo id to use and an empty cache, on the loopback hub or (no ``server``) the real one."""

    def __init__(self, namespace, cache, server=None):
        self.repo_id = f"{namespace}/timm-lt-test-{secrets.token_hex(4)}"
        self.cache = Path(cache)
        self.server = server
        self._known = {}

    def downloaded(self):
        """Sorted repo paths of all files in the snapshots of the cache."""
        folder = self.cache / f"models--{self.repo_id.replace('/', '--')}" / "snapshots"
        files = [path.relative_to(folder) for path in folder.glob("*/**/*") if path.is_file()]
        return sorted({"/".join(path.parts[1:]) for path in files})

    def on_the_wire(self):
        """Same, checked against the server's log; for a cache that was empty at `forget`."""
        paths = self.downloaded()
        if self.server:
            assert self.server.downloads() == paths
        return paths

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

    def commits(self):
        """The titles of the commits, newest first."""
        return [commit.title for commit in self._api().list_repo_commits(self.repo_id)]

    @staticmethod
    def _api():
        from huggingface_hub import HfApi

        return HfApi()
