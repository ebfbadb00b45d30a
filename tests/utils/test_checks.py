import math
from typing import Literal

import numpy as np
import pytest

from timm_lt.utils.checks import (
    Problems,
    Registry,
    UsageError,
    check_background,
    check_integer,
    check_literals,
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


def test_parts_are_in_the_order_of_registration_and_take_options(registry):
    assert list(registry) == ["plain", "fancy", "open"]
    part = object()
    assert registry.register("seven")(part) is part is registry["seven"]
    fancy = registry.create("fancy", 3, beta=0.5)
    assert (fancy.size, fancy.tau, fancy.beta) == (3, 1.0, 0.5)
    assert registry.create("open", 3, anything=1) == (3, {"anything": 1})


@pytest.mark.parametrize("name", ["Plain", "two words", "1st", "", "a-b"])
def test_invalid_and_taken_names_are_refused(registry, name):
    with pytest.raises(UsageError, match="lower-case identifier"):
        registry.register(name)
    before = registry["plain"]
    with pytest.raises(UsageError, match="part 'plain' is registered already"):
        registry.register("plain")
    assert registry["plain"] is before


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


def test_an_error_inside_a_part_is_not_disguised():
    def broken():
        raise TypeError("mine")

    parts = Registry("part")
    parts.register("broken")(broken)
    with pytest.raises(TypeError, match="mine"):
        parts.create("broken")


def test_check_number():
    for value, interval in (
        (0, "[0, 1]"),
        (1.0, "[0, 1]"),
        (np.float64(0.5), "(0, 1)"),
        (1e300, "[0, inf)"),
    ):
        assert check_number("q", value, interval) == value
    for value, interval in (
        (1, "[0, 1)"),
        (0, "(0, 1)"),
        (-1e-9, "[0, inf)"),
        (10**400, "[0, inf)"),
        (math.inf, "[0, inf]"),
        (math.nan, "[0, inf)"),
        (True, "[0, 1]"),
        ("0.5", "[0, 1]"),
        (None, "[0, 1]"),
    ):
        with pytest.raises(UsageError) as e:
            check_number("q", value, interval)
        assert str(e.value) == f"q must be a number in {interval}, got {value!r}"


def test_check_literals():
    def part(a: Literal["x"], b: Literal["x", "y"] | None, c: int | Literal["x"]):
        pass

    check_literals("part", part, {"a": "x", "b": None, "c": 3, "d": 0})
    for options in ({"a": "y"}, {"a": None}, {"b": 1}):
        with pytest.raises(UsageError, match=r"unknown . of part: .*; choose one of: x"):
            check_literals("part", part, options)


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
    inner = Problems()
    inner.check()
    inner.add("one")
    with pytest.raises(UsageError, match=r"^one$"):
        inner.check()
    inner.add("two")
    outer = Problems("all of it")
    with outer.collected("inside, "):
        inner.check()
    with outer.collected():
        raise UsageError("three")
    with pytest.raises(UsageError) as caught:
        outer.check()
    assert caught.value.problems == ["inside, one", "inside, two", "three"]
    assert str(caught.value) == "all of it: 3 problems\n- inside, one\n- inside, two\n- three"
    with pytest.raises(ZeroDivisionError), outer.collected():
        1 / 0  # noqa: B018
