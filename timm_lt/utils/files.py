"""Files that are either whole or not there: atomic writes and content hashes."""

import hashlib
import json
import math
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

import yaml

from timm_lt.utils.checks import UsageError

# What PyYAML raises for text that is no YAML, and for values that are none of their type.
YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)


def read_text(path: Path) -> str | None:
    """Reads a file in UTF-8; None if there is none.

    Raises:
        UsageError: If it is no text in UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no text in UTF-8") from error


def write_atomic(path: Path, content: bytes | str) -> None:
    """Writes a file so that a crash leaves either the old content or the new one, never a part.

    A new file gets the permissions that the process's umask allows; an old one keeps its own.
    """
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not of mkstemp, which makes private files: its mode is that of any new file.
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
    """Makes the names of files in a folder last through a crash; Windows has no call for it."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, content: object) -> None:
    """Writes JSON atomically; NaN and infinity are refused, since JSON has no word for them."""
    write_atomic(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, *, limit: int | None = None) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: The file.
        limit: Most bytes that it may have; None is no limit.

    Raises:
        UsageError: If the file is missing, too large, no JSON, not an object, or has a key twice.
    """
    try:
        if limit is not None and path.stat().st_size > limit:
            raise UsageError(f"{path} has {path.stat().st_size:,} bytes, more than {limit:,}")
        content = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=_refuse_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist") from error
    except UsageError:
        raise
    except (ValueError, OSError, RecursionError) as error:
        raise UsageError(f"{path} is not a readable JSON file: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is beyond all numbers")
    return number


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"key {key[:80]!r} is given twice")
        content[key] = value
    return content


def read_yaml(path: Path, noun: str = "") -> dict[str, Any]:
    """Reads a YAML mapping.

    Args:
        path: The file.
        noun: What the file is called in messages, e.g. ``"recipe"``.

    Raises:
        UsageError: If the file is missing, no YAML, no mapping, or has a key twice.
    """
    name = f"{noun} {path}".strip()
    try:
        text = path.read_text(encoding="utf-8")
        values = parse_yaml(text)
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror}") from error
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from error
    except YAML_ERRORS as error:
        raise UsageError(f"{name} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{name} must be a mapping of keys to values")
    return values


def parse_yaml(text: str) -> Any:  # noqa: ANN401
    """Parses YAML, in which no key may be given twice; raises one of :data:`YAML_ERRORS`."""
    return yaml.load(text, Loader=_StrictLoader)  # noqa: S506


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, and reads 5e-4 as a number as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                line = key_node.start_mark.line + 1
                raise UsageError(f"the key in line {line} must be a word, not a list or mapping")
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise UsageError(f"key {key!r} is given twice, the second time in line {line}")
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
