"""Files: atomic writes, strict JSON and YAML, and content hashes."""

import hashlib
import json
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

import yaml

from timm_lt.utils.checks import UsageError, user_errors

# Errors of PyYAML for text that is not YAML, and for values that are not of their type.
YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)


def read_text(path: Path) -> str | None:
    """Reads a file in UTF-8; None if it does not exist, UsageError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not valid UTF-8") from error


def write_atomic(path: Path, content: bytes | str) -> None:
    """Writes a file; after a crash it has either the old content or the new one, never a part."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not mkstemp, which makes private files: a new file has the usual mode, an old one keeps its.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.is_file():
            shutil.copymode(path, temporary)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def flush_folder(folder: Path) -> None:
    """Flushes the names of the files in a folder to disk, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, content: object) -> None:
    """Writes JSON atomically; ValueError for NaN and infinity, which JSON cannot represent."""
    write_atomic(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, *, limit: int | None = None) -> dict[str, Any]:
    """Reads a JSON object of at most ``limit`` bytes, without duplicate keys and NaN."""
    try:
        if limit is not None and (size := path.stat().st_size) > limit:
            raise ValueError(f"it has {size:,} bytes, more than {limit:,}")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_without_duplicates)
        # NaN, and numbers that a float cannot represent.
        json.dumps(content, allow_nan=False)
        if not isinstance(content, dict):
            raise TypeError(f"it must be a JSON object, not a {type(content).__name__}")
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist") from error
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise UsageError(f"{path} is not a readable JSON file: {error}") from error
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"key {key[:80]!r} is given twice")
        content[key] = value
    return content


def read_yaml(path: Path, noun: str = "") -> dict[str, Any]:
    """Reads a YAML mapping; ``noun`` is the file in messages, e.g. ``"recipe"``."""
    name = f"{noun} {path}".strip()
    with (
        user_errors(f"{name} is not valid YAML", *YAML_ERRORS),
        user_errors(f"{name} cannot be read"),
    ):
        values = parse_yaml(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise UsageError(f"{name} must be a mapping of keys to values")
    return values


def parse_yaml(text: str) -> Any:  # noqa: ANN401
    """Parses YAML without duplicate keys; raises one of :data:`YAML_ERRORS`."""
    return yaml.load(text, Loader=_StrictLoader)  # noqa: S506


class _StrictLoader(yaml.SafeLoader):
    """Refuses duplicate keys, and reads 5e-4 as a number as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ValueError(f"the key in line {line} must be a word, not a list or mapping")
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ValueError(f"key {key!r} is given twice, the second time in line {line}")
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that :class:`_StrictLoader` would read as a number."""


for _kind in (_StrictLoader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )


def yaml_text(values: dict[str, Any]) -> str:
    """Returns a mapping as YAML that :func:`read_yaml` reads back to the same mapping."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def sha256(data: bytes) -> str:
    """Returns the SHA-256 digest as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 digest of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
