"""Model repos of the Hugging Face Hub: what is read from them, and what went wrong.

A repo is untrusted. The config is read first and checked as a whole; then exactly the files that
are wanted are downloaded, all of one commit, into the cache that every Hub library shares.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download

from timm_lt.checkpoint import (
    BLOCK,
    CONFIG,
    TEXT_LIMIT,
    WEIGHTS,
    CheckpointInfo,
    HeadEntry,
    find_entry,
    read_checkpoint,
    read_config,
)
from timm_lt.utils.checks import UsageError
from timm_lt.utils.files import file_sha256
from timm_lt.utils.hub import hub_errors, split_revision


@dataclass(frozen=True)
class Repo:
    """A model repo, and how it is read.

    Attributes:
        repo_id: ``namespace/name``.
        revision: Branch, tag or commit; None is the main branch.
        cache_dir: Where downloads are kept; None is the cache of the Hub's libraries.
        token: As everywhere on the Hub: None takes the one that is logged in or set.
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

        Raises:
            UsageError: If it is neither.
        """
        return cls(*split_revision(name), cache_dir, token)

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id

    def read_info(self) -> CheckpointInfo:
        """Downloads the config of a decoupled checkpoint and returns what it says.

        Raises:
            UsageError: If it cannot be had, or is no decoupled checkpoint's.
        """
        return read_checkpoint(self._download_config())

    def download(self, *, weights: bool = True, head: str | None = None) -> Path:
        """Downloads a checkpoint: the config, and what is asked for beside it.

        What is in the cache is not downloaded again. A file that is not the one that the config
        describes is downloaded once more, and leaves the cache if that does not help.

        Args:
            weights: Download the backbone with the joint classifier.
            head: A head whose file is downloaded, if it has one. Of a plain timm repo it has none.

        Returns:
            The folder of the commit in the cache; all files are of that commit.

        Raises:
            UsageError: If there is no such head, or a file cannot be had or is not the one that the
                config describes.
        """
        folder = self._download_config()
        info = read_checkpoint(folder) if BLOCK in read_config(folder) else None
        # The branch may move on between two files.
        commit = Repo(self.repo_id, folder.name, self.cache_dir, self.token)
        entry = find_entry(info, head, str(self)) if info and head is not None else None
        if weights:
            commit._download_checked(WEIGHTS, info.weights_sha256 if info else None)
        if entry is not None and entry.file is not None:
            commit._download_checked(entry.file, entry.sha256)
        return folder

    def fetch(self, file: str, *, limit: int | None = None, force: bool = False) -> Path:
        """Downloads a file into the cache, or finds it there.

        Args:
            file: Path in the repo.
            limit: Most bytes that it may have; checked before it is downloaded.
            force: Download it although it is in the cache.

        Raises:
            UsageError: If it cannot be had.
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

    def _download_config(self) -> Path:
        return self.fetch(CONFIG, limit=TEXT_LIMIT).parent

    def _download_checked(self, file: str, digest: str | None) -> None:
        path = self.fetch(file)
        if digest is None or file_sha256(path) == digest:
            return
        damaged = f"{file} of {self.repo_id} is not the one that {CONFIG} describes"
        if constants.is_offline_mode():
            raise UsageError(f"{damaged} (SHA-256 differs); load it once while online")
        try:
            path = self.fetch(file, force=True)
        except UsageError as error:
            raise UsageError(f"{damaged} (SHA-256 differs); fetching it again: {error}") from error
        if file_sha256(path) != digest:
            blob = path.resolve()
            path.unlink(missing_ok=True)
            # What has its own digest as its name is whole, and may be another commit's.
            if blob.is_file() and file_sha256(blob) != blob.name:
                blob.unlink()
            raise UsageError(f"{damaged} (SHA-256 differs); it was not kept in the cache")


def list_repo_heads(
    repo_id: str, *, cache_dir: str | Path | None = None, token: str | bool | None = None
) -> dict[str, HeadEntry]:
    """Lists the heads of a Hub repo with options and metrics; downloads its config only.

    Args:
        repo_id: ``namespace/name`` or ``namespace/name@revision``.
        cache_dir: Where downloads are kept; None is the cache of the Hub's libraries.
        token: As everywhere on the Hub: None takes the one that is logged in or set.

    Returns:
        The heads by name.

    Raises:
        UsageError: If the repo cannot be read or holds no decoupled checkpoint.
    """
    return Repo.parse(repo_id, cache_dir=cache_dir, token=token).read_info().heads
