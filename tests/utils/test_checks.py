import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pytest

from timm_lt.utils.checks import (
    Problems,
    Registry,
    UsageError,
    check_background,
    check_fields,
    check_integer,
    check_number,
    unknown_name,
)


@pytest.fixture
def registry():
    parts = Registry("part")

    @parts.register("plain")
    class Plain:
        def __init__(self, size):
            self.size = size

    @parts.register("fancy")
    class Fancy:
        def __init__(self, size, *, tau=1.0, beta):
            self.size, self.tau, self.beta = size, tau, beta

    @parts.register("open")
    def open_(size, **options):
        return size, options

    return parts


def test_a_registry_creates_its_parts_in_the_order_of_registration(registry):
    assert list(registry) == ["plain", "fancy", "open"]
    assert ("fancy" in registry, "none" in registry) == (True, False)
    part = object()
    assert registry.register("seven")(part) is part is registry["seven"]
    fancy = registry.create("fancy", 3, beta=0.5)
    assert (fancy.size, fancy.tau, fancy.beta) == (3, 1.0, 0.5)
    assert registry.create("open", 3, anything=1) == (3, {"anything": 1})


@pytest.mark.parametrize("name", ["Plain", "two words", "1st", "", "a-b", "plain"])
def test_invalid_and_taken_names_are_refused(registry, name):
    message = "part 'plain' is registered already" if name == "plain" else "lower-case identifier"
    with pytest.raises(UsageError, match=message):
        registry.register(name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fancy", {"beta": 1, "tua": 2}, r"'fancy' has no option 'tua' \(did you mean 'tau'\?\); "),
        ("fancy", {"tau": 2}, "part 'fancy' needs the option 'beta'; valid options: tau, beta"),
        ("plain", {"tau": 2}, "part 'plain' has no option 'tau'; valid options: none"),
        # An argument of all parts is not an option: it cannot be given twice.
        ("fancy", {"beta": 1, "size": 4}, "has no option 'size'"),
        ("plian", {}, r"unknown part 'plian' \(did you mean 'plain'\?\); .*: plain, fancy, open"),
    ],
)
def test_create_checks_names(registry, name, options, message):
    with pytest.raises(UsageError, match=message):
        registry.create(name, 3, **options)
    assert "did you mean" not in str(unknown_name("part", "xyz", ["plain"]))


@pytest.mark.parametrize(
    ("value", "interval"),
    [(0, "[0, 1]"), (1.0, "[0, 1]"), (np.float64(0.5), "(0, 1)"), (1e300, "[0, inf)")],
)
def test_numbers_in_an_interval(value, interval):
    assert check_number("q", value, interval) == value


@pytest.mark.parametrize(
    ("value", "interval"),
    [(1, "[0, 1)"), (0, "(0, 1)"), (-1e-9, "[0, inf)"), (10**400, "[0, inf)")]
    + [(value, "[0, inf]") for value in (math.inf, math.nan, True, "0.5", None)],
)
def test_numbers_outside_an_interval(value, interval):
    with pytest.raises(UsageError) as e:
        check_number("q", value, interval)
    assert str(e.value) == f"q must be a number in {interval}, got {value!r}"


@dataclass(frozen=True)
class Part:
    a: Literal["x"] = "x"
    b: Literal["x", "y"] | None = None
    c: int | Literal["x"] = 3
    d: Annotated[float, "(0, 1)"] = 0.5


def test_check_fields():
    check_fields(Part(c=0))
    for options in ({"a": "y"}, {"a": None}, {"b": 1}):
        with pytest.raises(UsageError, match=r"unknown . of part .*; choose one of: x"):
            check_fields(Part(**options), "part")
    with pytest.raises(UsageError, match=r"d must be a number in \(0, 1\), got 1"):
        check_fields(Part(d=1))


@pytest.mark.parametrize("value", [0, 11, 1.0, True, "3", None, math.nan])
def test_check_integer(value):
    with pytest.raises(UsageError, match="k must be an integer from 1 to 10, got"):
        check_integer("k", value, minimum=1, maximum=10)
    assert type(check_integer("k", np.int64(3), minimum=1)) is int


@pytest.mark.parametrize(
    "value", ["nonsense", "#00000000", [0, 1], [0, 0, 256], [0.5] * 3, 3, None]
)
def test_invalid_backgrounds_are_refused(value):
    with pytest.raises(UsageError, match="is not a valid colour"):
        check_background(value)


def test_problems_are_raised_together_and_merge():
    inner, outer = Problems(), Problems("all of it")
    inner.check()
    inner.add("one")
    with pytest.raises(UsageError, match=r"^one$"):
        inner.check()
    inner.add("two")
    with outer.collected("inside, "):
        inner.check()
    with outer.collected():
        raise UsageError("three")
    with pytest.raises(UsageError) as caught:
        outer.check()
    assert caught.value.problems == ["inside, one", "inside, two", "three"]
    assert str(caught.value) == "all of it: 3 problems\n- inside, one\n- inside, two\n- three"
