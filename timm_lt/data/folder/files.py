"""The image files below a directory, listed without opening one."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

# By what files that Pillow decodes are called. Of formats that share a suffix with others (.ps,
# .pdf, .h5, .mpg), or that are made by one program only, none is taken for an image.
IMAGE_SUFFIXES = frozenset(
    (
        *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "gif", "webp", "avif", "bmp", "dib"),
        *("tif", "tiff", "ppm", "pgm", "pbm", "pnm", "jp2", "j2k", "j2c", "jpc", "jpf", "jpx"),
        *("tga", "qoi", "pcx"),
    )
)
# Images of telephones that Pillow does not decode.
HEIC_SUFFIXES = frozenset(("heic", "heif"))
# Directories and files of systems, network storages and cameras beside the user's own, in lower
# case: thumbnails, recycle bins, settings. All others begin with a dot.
SYSTEM_NAMES = frozenset(
    (
        *("thumbs.db", "thumbs.db:encryptable", "ehthumbs.db", "ehthumbs_vista.db"),
        *("desktop.ini", "picasa.ini", "icon\r"),
        *("$recycle.bin", "recycler", "system volume information", "lost+found", "__macosx"),
        *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp", "@sharebin"),
        *("network trash folder", "temporary items"),
    )
)
# Files that cameras and editors put beside an image or a video: previews and settings; and
# a.jpg:Zone.Identifier, where Windows notes that a file was downloaded.
SIDECAR_SUFFIXES = frozenset(
    ("thm", "lrv", "lrf", "aae", "xmp", "ctg", "pp3", "dop", "nksc", "identifier")
)


@dataclass
class Found:
    """What there is below a directory, hidden files left out.

    Attributes:
        images: Files that are called as images are, in the order of torchvision's ``ImageFolder``.
        others: Files that are not.
        broken: What is neither a file nor a directory, such as a link to nothing, and directories
            that cannot be listed or contain themselves, each with the reason.
        unnamed: What has a name that is not in UTF-8.
        directories: That directory and those below it, each with what it is whatever its name.
    """

    images: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    unnamed: list[str] = field(default_factory=list)
    directories: dict[str, tuple[int, int]] = field(default_factory=dict)


def find_images(directory: str) -> Found:
    """Lists the image files in a directory and in those below it; links are followed."""
    found = Found()
    parts: list[tuple[str, list[str]]] = []
    _walk(directory, found, parts, within=frozenset())
    for part, names in sorted(parts):
        found.images += [f"{part}/{name}" for name in sorted(names)]
    return found


def _walk(
    directory: str,
    found: Found,
    parts: list[tuple[str, list[str]]],
    within: frozenset[tuple[int, int]],
) -> None:
    names: list[str] = []
    below: list[str] = []
    for entry in entries_of(directory, found):
        path = f"{directory}/{entry.name}"
        try:
            if entry.is_dir():
                below.append(path)
            elif not entry.is_file():
                found.broken[path] = "neither a file nor a directory"
            elif suffix(entry.name) in IMAGE_SUFFIXES:
                names.append(entry.name)
            else:
                found.others.append(path)
        except OSError as error:
            # Such as links that lead to each other.
            found.broken[path] = error.strerror or str(error)
    parts.append((directory, names))
    found.directories[directory] = _identity(directory)
    within |= {found.directories[directory]}
    for path in sorted(below):
        if _identity(path) in within:
            found.broken[path] = "a link to a directory that it is in"
        else:
            _walk(path, found, parts, within)


def _identity(directory: str) -> tuple[int, int]:
    status = Path(directory).stat()
    return status.st_dev, status.st_ino


def entries_of(directory: str, found: Found) -> Iterator["os.DirEntry[str]"]:
    """Yields what is in a directory and not hidden, in no order; notes what has no right name."""
    try:
        with os.scandir(directory) as entries:
            visible = [entry for entry in entries if not is_hidden(entry.name)]
    except OSError as error:
        found.broken[directory] = error.strerror or str(error)
        return
    # All names are checked at once.
    if _is_utf8("".join(entry.name for entry in visible)):
        yield from visible
        return
    for entry in visible:
        if _is_utf8(entry.name):
            yield entry
        else:
            found.unnamed.append(f"{directory}/{entry.name}")


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_hidden(name: str) -> bool:
    """Returns whether a file or directory belongs to a system, a storage or a camera.

    >>> is_hidden("@eaDir"), is_hidden("._1.jpg"), is_hidden("IMG_1.XMP"), is_hidden("1.jpg")
    (True, True, True, False)
    """
    is_system = name.startswith(".") or name.lower() in SYSTEM_NAMES
    return is_system or suffix(name) in SIDECAR_SUFFIXES


def visible_files(root: Path, pattern: str) -> list[Path]:
    """Returns the files below a directory whose names match, sorted, without hidden ones."""
    return [
        path
        for path in sorted(root.rglob(pattern))
        if not any(map(is_hidden, path.relative_to(root).parts))
    ]


def suffix(path: str) -> str:
    """Returns the suffix of a file name in lower case without its dot.

    >>> suffix("a/b.JPG"), suffix("a.b/c")
    ('jpg', '')
    """
    name = path.rpartition("/")[2]
    _, dot, end = name.rpartition(".")
    return end.lower() if dot else ""


def counted_suffixes(paths: Iterable[str]) -> str:
    """Returns how many files there are of each suffix, the most frequent first.

    >>> counted_suffixes(["a.txt", "b.csv", "c.txt", "d"])
    '2 .txt, 1 .csv, 1 without suffix'
    """
    counts: dict[str, int] = {}
    for path in paths:
        counts[suffix(path)] = counts.get(suffix(path), 0) + 1
    words = sorted(counts.items(), key=lambda item: (-item[1], item[0] == "", item[0]))
    return ", ".join(f"{n} .{end}" if end else f"{n} without suffix" for end, n in words)
