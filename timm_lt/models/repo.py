"""Sources of a model: an architecture, a checkpoint folder, or a model repo of the Hub.

A repo is untrusted. Its config is read and checked first; then exactly the files that are needed
are downloaded, all of one commit, into the cache that every Hub library shares.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import constants, hf_hub_download
from timm.models import parse_model_name

from timm_lt.checkpoint import CheckpointInfo, HeadEntry, find_entry, read_checkpoint
from timm_lt.checkpoint.format import CONFIG, TEXT_LIMIT, WEIGHTS, find_info
from timm_lt.utils.checks import UsageError, user_errors
from timm_lt.utils.files import file_sha256
from timm_lt.utils.hub import HF_HUB, hub_errors, split_revision

LOCAL_DIR = "local-dir:"
REPO = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class Repo:
    """A model repo of the Hub, and the options for reading it.

    The defaults are the main branch, the cache of the Hub's libraries, and the token of the login
    or of ``HF_TOKEN``.
    """

    repo_id: str
    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = None

    @classmethod
    def parse(
        cls, name: str, *, cache_dir: str | Path | None = None, token: str | bool | None = None
    ) -> "Repo":
        """Parses ``namespace/name`` or ``namespace/name@revision``, with or without ``hf-hub:``.

        >>> Repo.parse("hf-hub:me/birds@v1").revision
        'v1'
        """
        return cls(*split_revision(name), cache_dir, token)

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id

    def download(self, *, weights: bool = True, head: str | None = None) -> Path:
        """Downloads the config of a checkpoint, and optionally its weights and one head.

        A file with another digest than the config records is downloaded once more, and removed from
        the cache if that does not help. Returns the folder of the commit that all files are of.
        """
        folder = self.fetch(CONFIG, limit=TEXT_LIMIT).parent
        info = find_info(folder)
        digests = {WEIGHTS: info.weights_sha256 if info else None} if weights else {}
        if info is not None and head is not None:
            entry = find_entry(info, head, str(self))
            digests |= {entry.file: entry.sha256} if entry.file is not None else {}
        # The branch may move on between two files.
        commit = replace(self, revision=folder.name)
        for file, digest in digests.items():
            path = commit.fetch(file)
            if digest is not None and file_sha256(path) != digest:
                commit._fetch_again(file, digest)
        return folder

    def fetch(self, file: str, *, limit: int | None = None, force: bool = False) -> Path:
        """Returns the path of a file in the cache, downloaded if necessary or with ``force``.

        A file of more than ``limit`` bytes is refused before it is downloaded.
        """
        options: dict[str, Any] = {
            "revision": self.revision,
            "cache_dir": self.cache_dir,
            "token": self.token,
            "library_name": "timm_lt",
        }
        with hub_errors(self.repo_id, self.revision, file):
            if limit is not None:
                size = hf_hub_download(self.repo_id, file, dry_run=True, **options).file_size
                if size is not None and size > limit:
                    raise UsageError(f"{file} of {self} has {size:,} bytes, more than {limit:,}")
            return Path(hf_hub_download(self.repo_id, file, force_download=force, **options))

    def _fetch_again(self, file: str, digest: str) -> None:
        """Replaces a file in the cache that is not the one that the config describes."""
        fault = f"{file} of {self.repo_id} is not the one that {CONFIG} describes (SHA-256 differs)"
        if constants.is_offline_mode():
            raise UsageError(f"{fault}; load it once while online")
        with user_errors(f"{fault}; fetching it again", UsageError):
            path = self.fetch(file, force=True)
        if file_sha256(path) == digest:
            return
        blob = path.resolve()
        path.unlink(missing_ok=True)
        # A blob named by its own digest is intact, and may belong to another commit.
        if blob.is_file() and file_sha256(blob) != blob.name:
            blob.unlink()
        raise UsageError(f"{fault}; it was not kept in the cache")


@dataclass(frozen=True)
class ModelSource:
    """Source of a model: its name for timm, and the folder or repo of its checkpoint."""

    name: str
    folder: Path | None = None
    repo: Repo | None = None

    @classmethod
    def parse(
        cls,
        given: str | Path,
        *,
        bare_repo: bool = False,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
    ) -> "ModelSource":
        """Parses an architecture, ``local-dir:FOLDER`` or just the folder, or ``hf-hub:REPO``.

        With ``bare_repo``, just the id of a repo is valid, too.

        >>> ModelSource.parse("local-dir:output/birds").folder.name
        'birds'
        """
        name, path = str(given), Path(given).expanduser()
        is_path = isinstance(given, Path) or name.startswith(("./", "../", "/", "~"))
        if is_path or not (":" in name or timm.models.is_model(name.partition(".")[0])):
            if (path / CONFIG).is_file():
                return cls(f"{LOCAL_DIR}{path}", path)
            if path.is_file():
                raise UsageError(
                    f"{given} is a file of weights: name its architecture, and pass the file with "
                    "--checkpoint (in Python checkpoint_path=)"
                )
            if is_path or path.is_dir():
                raise UsageError(f"{given} is not a checkpoint folder: it has no {CONFIG}")
            name = f"{HF_HUB}{name}" if bare_repo and REPO.fullmatch(name) else name
        try:
            scheme, rest = parse_model_name(name)
        except ValueError as error:
            raise UsageError(str(error)) from error
        if scheme == "hf-hub":
            return cls(name, repo=Repo.parse(rest, cache_dir=cache_dir, token=token))
        return cls(name, Path(rest) if scheme == "local-dir" else None)

    @classmethod
    def find(cls, given: str) -> "ModelSource":
        """Finds the folder with the config of a checkpoint; that of a repo is downloaded.

        The result names the commit of a repo. It has no folder for an architecture, or for
        pretrained weights that are not on this disk.
        """
        source = cls.parse(given, bare_repo=True)
        if timm.models.is_model_pretrained(source.name):
            # The packaged checkpoint is a file in timm's configuration.
            config: Any = timm.models.get_pretrained_cfg(source.name)
            return replace(source, folder=Path(config.file).parent if config.file else None)
        if source.repo is None:
            return source
        try:
            folder = source.repo.download(weights=False)
        except UsageError as error:
            if source.name == given:
                raise
            raise UsageError(f"no folder {given}, and as a repo of the Hub: {error}") from error
        # The branch may move on while one head is loaded after the other.
        commit = replace(source.repo, revision=folder.name)
        return cls(f"{HF_HUB}{commit}", folder, commit)

    def read_info(self) -> CheckpointInfo | None:
        """Reads the description of a decoupled checkpoint; returns None if the folder has none."""
        return None if self.folder is None else find_info(self.folder)


def list_repo_heads(
    repo_id: str, *, cache_dir: str | Path | None = None, token: str | bool | None = None
) -> dict[str, HeadEntry]:
    """Lists the heads of a Hub repo by name, with options and metrics; downloads its config only.

    Args:
        repo_id: ``namespace/name`` or ``namespace/name@revision``.
        cache_dir: Folder of downloads; None is the cache of the Hub's libraries.
        token: Token of the Hub; None is that of the login or of ``HF_TOKEN``.

    Raises:
        UsageError: If the repo cannot be read or has no decoupled checkpoint.
    """
    repo = Repo.parse(repo_id, cache_dir=cache_dir, token=token)
    return read_checkpoint(repo.download(weights=False)).heads
