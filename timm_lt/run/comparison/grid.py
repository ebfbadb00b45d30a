"""What a grid says: representations, heads, and the rows and columns of its table."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from timm_lt.models.published import hub_configs
from timm_lt.report.tables import GROUPS
from timm_lt.utils.checks import UsageError, check_choice, check_number, unknown_name
from timm_lt.utils.files import read_yaml

# In a representation, beside keys of the recipe: which other it goes on from, and the factor of the
# recipe's learning rate.
AFTER, LR_FACTOR = "after", "lr_factor"
FIGURES = (*GROUPS, "all")
Metric = Literal["accuracy", "error"]


@dataclass(frozen=True)
class Line:
    """A row or a column of the table.

    Attributes:
        label: What it is called.
        representation: Which one its cells have; None leaves it to the other direction.
        head: Which head, likewise.
        quoted: The paper's own accuracies by shot group and "all", fractions; those that are known.
    """

    label: str
    representation: str | None = None
    head: str | None = None
    quoted: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """A place of the table; without columns, a row is one.

    Attributes:
        row: Label of its row.
        column: Label of its column, None without columns.
        representation: What is trained.
        head: Name of the head whose figures it has.
        quoted: As of its row.
    """

    row: str
    column: str | None
    representation: str
    head: str
    quoted: Mapping[str, float]


@dataclass(frozen=True)
class Grid:
    """A grid, as its file states it; every name in it that can be checked without a recipe is.

    Attributes:
        name: The file's, without ``.yaml``.
        title: Line above the table.
        source: The paper's table or figure.
        recipe: File or name of the recipe that all runs share.
        representations: By name, what each changes in the recipe; and ``after``, the one whose
            model it starts from, and ``lr_factor``, by which the recipe's rate is multiplied.
        rows: The rows, from above.
        columns: The columns, from the left; without any, columns are shot groups.
        heads: Heads under names of their own, as in a recipe.
        metric: What a table with columns shows, accuracy or error over the test images.
        plot: Draw the figures by shot group; needs columns.
        rows_title: What rows are, where there are columns.
        columns_title: What columns are.
        quoted_from: Where the quoted figures are from, and of which data and network.
    """

    name: str
    title: str
    source: str
    recipe: str
    representations: Mapping[str, Mapping[str, Any]]
    rows: tuple[Line, ...]
    columns: tuple[Line, ...] = ()
    heads: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    metric: Metric = "accuracy"
    plot: bool = False
    rows_title: str = "method"
    columns_title: str = ""
    quoted_from: str | None = None

    def cells(self, only: list[str] | None = None) -> list[Cell]:
        """Returns the cells, row by row.

        Args:
            only: Labels of rows; None are all.

        Raises:
            UsageError: If there is no such row, or a cell has no representation or no head, or two.
        """
        labels = [row.label for row in self.rows]
        for label in only or []:
            if label not in labels:
                raise unknown_name(f"row of {self.name}:", label, labels)
        rows = [row for row in self.rows if only is None or row.label in only]
        columns = self.columns or (None,)
        return [_cell(row, column) for row in rows for column in columns]

    def ancestors(self, representation: str) -> list[str]:
        """Returns the representations from which one goes on, the nearest first.

        Raises:
            UsageError: If they go round in a circle.
        """
        found: list[str] = []
        after = self.representations[representation].get(AFTER)
        while after is not None:
            if after in {*found, representation}:
                raise UsageError(f"representation {representation!r} comes after itself")
            found.append(after)
            after = self.representations[after].get(AFTER)
        return found


def shipped_grids() -> dict[str, Path]:
    """Returns the files of the shipped grids by name."""
    return {path.stem: path for path in hub_configs("tables")}


def find_grid(name: str) -> Path:
    """Returns the file of a grid: a path, or the name of a shipped one with or without ``.yaml``.

    Raises:
        UsageError: If there is none; lists the shipped ones.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_grids()
    if name.removesuffix(".yaml") in shipped:
        return shipped[name.removesuffix(".yaml")]
    raise unknown_name("grid (and no such file):", name, list(shipped))


def load_grid(path: Path) -> Grid:
    """Reads a grid and checks it, as far as that goes without its recipe.

    Raises:
        UsageError: If the file is no YAML mapping, a key is unknown, missing or of the wrong type,
            or a row names what is not there; the message names the file.
    """
    values = read_yaml(path, "grid")
    try:
        grid = _parse(path.stem, values)
        _check_names(grid)
    except UsageError as error:
        raise UsageError(f"grid {path}: {error}") from error
    return grid


def _parse(name: str, values: dict[str, Any]) -> Grid:
    known = [f.name for f in fields(Grid) if f.name != "name"]
    for key in values:
        if key not in known:
            raise unknown_name("key", key, known)
    for key in ("title", "source", "recipe", "representations", "rows"):
        if not values.get(key):
            raise UsageError(f"{key} is missing")
    for key in ("title", "source", "recipe", "rows_title", "columns_title", "quoted_from"):
        if not isinstance(values.get(key, ""), str):
            raise UsageError(f"{key} must be a text, got {values[key]!r}")
    check_choice("metric", values.get("metric", "accuracy"), get_args(Metric))
    if not isinstance(values.get("plot", False), bool):
        raise UsageError(f"plot must be true or false, got {values['plot']!r}")
    lines = {key: _lines(key, values.get(key, [])) for key in ("rows", "columns")}
    parts = {key: _mappings(key, values.get(key, {})) for key in ("representations", "heads")}
    return Grid(name=name, **values | lines | parts)


def _mappings(key: str, value: object) -> dict[str, dict[str, Any]]:
    """Checks a mapping of names to mappings; nothing behind a name is an empty one."""
    if not isinstance(value, dict) or not all(isinstance(v, dict | None) for v in value.values()):
        raise UsageError(f"{key} must map names to mappings, got {value!r}")
    for name in value:
        # They are names of folders.
        if not isinstance(name, str) or not name.isidentifier():
            raise UsageError(f"{key}: {name!r} must be letters, digits and underscores")
    return {name: inner or {} for name, inner in value.items()}


def _lines(key: str, value: object) -> tuple[Line, ...]:
    """Checks the rows or columns."""
    if not isinstance(value, list) or not all(isinstance(line, dict) for line in value):
        raise UsageError(f"{key} must be a list of mappings, got {value!r}")
    known = [f.name for f in fields(Line)]
    lines: list[Line] = []
    for number, given in enumerate(value, 1):
        for name in given:
            if name not in known:
                raise unknown_name(f"key of {key} {number}:", name, known)
        texts = {name: given[name] for name in ("label", "representation", "head") if name in given}
        if "label" not in given or not all(isinstance(text, str) for text in texts.values()):
            raise UsageError(f"{key} {number} needs a label, and texts: got {given!r}")
        if given["label"] in [line.label for line in lines]:
            raise UsageError(f"{key} has the label {given['label']!r} twice")
        lines.append(Line(**texts, quoted=_quoted(given["label"], given.get("quoted", {}))))
    return tuple(lines)


def _quoted(label: str, value: object) -> dict[str, float]:
    if not isinstance(value, dict):
        raise UsageError(f"quoted of {label!r} must map shot groups to fractions, got {value!r}")
    for key in value:
        check_choice(f"figure quoted of {label!r}:", key, FIGURES)
    return {key: check_number(f"{key} of {label!r}", v, "[0, 1]") for key, v in value.items()}


def _cell(row: Line, column: Line | None) -> Cell:
    both = (row,) if column is None else (row, column)
    name = " / ".join(repr(line.label) for line in both)
    found: dict[str, str] = {}
    for what in ("representation", "head"):
        given = [getattr(line, what) for line in both if getattr(line, what) is not None]
        if len(given) != 1:
            raise UsageError(f"{name} has {len(given) or 'no'} {what}s: give one")
        found[what] = given[0]
    quoted = row.quoted if column is None else {}
    return Cell(row.label, None if column is None else column.label, quoted=quoted, **found)


def _check_names(grid: Grid) -> None:
    """Checks the names of representations, and that all of them are used."""
    names = list(grid.representations)
    for name, changes in grid.representations.items():
        if changes.get(AFTER) is not None and changes[AFTER] not in names:
            raise unknown_name(f"representation after which {name!r} comes:", changes[AFTER], names)
    used: set[str] = set()
    for cell in grid.cells():
        if cell.representation not in names:
            raise unknown_name(f"representation of {cell.row!r}:", cell.representation, names)
        used |= {cell.representation, *grid.ancestors(cell.representation)}
    unused = [name for name in names if name not in used]
    if unused:
        raise UsageError(f"representation {unused[0]!r} is in no row: leave it out")
    if grid.plot and not grid.columns:
        raise UsageError("plot needs columns")
    if grid.metric == "error" and (grid.plot or not grid.columns):
        raise UsageError("metric error is for a table with columns and without a plot")
    if grid.columns and any(row.quoted for row in grid.rows):
        raise UsageError("quoted figures need a table without columns")
