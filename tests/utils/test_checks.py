import math

import numpy as np
import pytest

from timm_lt.utils.checks import (
    Problems,
    UsageError,
    check_choice,
    check_integer,
    check_number,
    unknown_name,
)
from timm_lt.utils.registry import Registry


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


def test_names_come_in_order_of_registration(registry):
    assert list(registry) == ["plain", "fancy", "open"]
    assert len(registry) == 3
    assert "fancy" in registry
    assert "none" not in registry


def test_register_returns_the_part_itself():
    parts = Registry("part")

    def part():
        return 7

    assert parts.register("seven")(part) is part
    assert parts["seven"] is part


@pytest.mark.parametrize("name", ["Plain", "two words", "1st", "", "a-b"])
def test_bad_names_are_refused(registry, name):
    with pytest.raises(UsageError, match="lower-case identifier"):
        registry.register(name)


def test_taken_name_is_refused_and_kept(registry):
    before = registry["plain"]
    with pytest.raises(UsageError, match="part 'plain' is registered already"):
        registry.register("plain")
    assert registry["plain"] is before


def test_unknown_name_lists_the_choices(registry):
    with pytest.raises(UsageError, match=r"unknown part 'plian' \(did you mean 'plain'\?\)") as e:
        registry["plian"]
    assert "plain, fancy, open" in str(e.value)
    assert "did you mean" not in str(unknown_name("part", "xyz", ["plain"]))


def test_create_passes_arguments_and_options(registry):
    fancy = registry.create("fancy", 3, beta=0.5)
    assert (fancy.size, fancy.tau, fancy.beta) == (3, 1.0, 0.5)
    assert registry.create("open", 3, anything=1) == (3, {"anything": 1})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fancy", {"beta": 1, "tua": 2}, r"part 'fancy' has no option 'tua' \(did you mean 'tau'"),
        ("fancy", {"beta": 1, "tua": 2}, "valid options: tau, beta"),
        ("fancy", {"tau": 2}, "part 'fancy' needs the option 'beta'; valid options: tau, beta"),
        ("plain", {"tau": 2}, "part 'plain' has no option 'tau'; valid options: none"),
        # What every part is given is no option: it cannot be given twice.
        ("fancy", {"beta": 1, "size": 4}, "has no option 'size'"),
        ("fnacy", {}, "unknown part 'fnacy'"),
    ],
)
def test_create_checks_names(registry, name, options, message):
    with pytest.raises(UsageError, match=message):
        registry.create(name, 3, **options)


def test_an_error_inside_a_part_is_not_disguised():
    parts = Registry("part")

    @parts.register("broken")
    def broken():
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        parts.create("broken")


@pytest.mark.parametrize(
    ("value", "interval", "valid"),
    [
        (0, "[0, 1]", True),
        (1.0, "[0, 1]", True),
        (1, "[0, 1)", False),
        (0, "(0, 1)", False),
        (np.float64(0.5), "(0, 1)", True),
        (-1e-9, "[0, inf)", False),
        (1e300, "[0, inf)", True),
        (math.inf, "[0, inf)", False),
        (math.nan, "[0, inf)", False),
        (True, "[0, 1]", False),
        ("0.5", "[0, 1]", False),
        (None, "[0, 1]", False),
    ],
)
def test_check_number(value, interval, valid):
    if valid:
        assert check_number("q", value, interval) == value
    else:
        with pytest.raises(UsageError) as e:
            check_number("q", value, interval)
        assert str(e.value) == f"q must be a number in {interval}, got {value!r}"


@pytest.mark.parametrize("value", [0, 11, 1.0, True, "3", None, math.nan])
def test_check_integer_refuses(value):
    with pytest.raises(UsageError, match="k must be an integer from 1 to 10, got"):
        check_integer("k", value, minimum=1, maximum=10)


def test_check_integer_returns_a_plain_int():
    assert type(check_integer("k", np.int64(3), minimum=1)) is int


def test_check_choice():
    check_choice("rule", "fb", ("fb", "oltr"))
    with pytest.raises(UsageError, match=r"unknown rule 'ofb'.*choose one of: fb, oltr"):
        check_choice("rule", "ofb", ("fb", "oltr"))


def test_problems_are_raised_together_and_merge():
    inner = Problems()
    inner.add("one")
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


def test_one_problem_is_a_sentence_and_none_is_no_error():
    problems = Problems("it")
    problems.check()
    problems.add("is wrong")
    with pytest.raises(UsageError, match=r"^it: is wrong$"):
        problems.check()
    with pytest.raises(ZeroDivisionError), problems.collected():
        1 / 0  # noqa: B018
