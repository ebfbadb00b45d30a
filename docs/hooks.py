"""Hooks of mkdocs for this site.

Some pages lie where GitHub shows them, outside of ``docs/``; links between all pages are those of
the repository, and are turned into those of the site. The command line reference is made of the
parsers' own help.
"""

import contextlib
import io
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
# Their paths in the site.
OUTSIDE = {
    "hub_configs/README.md": "catalogue.md",
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
COMMANDS = "<!-- commands -->"
WIDTH = "88"
# A line of the list of commands in the help of timm-lt.
COMMAND = re.compile(r"^ {4}([a-z]+)\b", re.MULTILINE)
FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")

log = get_plugin_logger("links")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages from outside of ``docs/``."""
    for path, uri in OUTSIDE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Inserts the help of the commands and translates links of the repository."""
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, "\n".join(command_sections()))
    if page.file.src_uri in OUTSIDE.values():
        # Rank pages of the documentation first in searches.
        page.meta["search"] = {"boost": 0.3}
    source = Path(str(page.file.abs_src_path)).relative_to(ROOT).as_posix()
    parts = FENCE.split(markdown)
    # Odd parts are code blocks.
    parts[::2] = [
        LINK.sub(lambda found: site_link(found, source, page.file.src_uri), part)
        for part in parts[::2]
    ]
    return "".join(parts)


def site_link(found: re.Match[str], source: str, uri: str) -> str:
    """Translates a link to a file of the repository to its page on the site."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[1]))
    place = OUTSIDE.get(target, target.removeprefix("docs/"))
    if place == target:
        log.warning("%s links to %s, which is no page of the site", source, target)
    relative = posixpath.relpath(place, posixpath.dirname(uri) or ".")
    return f"]({relative}{found[2] or ''})"


def command_sections() -> Iterator[str]:
    """Yields the help of ``timm-lt`` and of each of its commands, as Markdown."""
    whole = command_help()
    for arguments in ([], *([name] for name in COMMAND.findall(whole))):
        yield f"## {' '.join(['timm-lt', *arguments])}\n\n```text\n{command_help(*arguments)}```\n"


def command_help(*arguments: str) -> str:
    """Returns the ``--help`` text of a command."""
    from timm_lt.cli import main

    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, COLUMNS=WIDTH, NO_COLOR="1"),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        main([*arguments, "--help"])
    return printed.getvalue()
