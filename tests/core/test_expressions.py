"""Regular expressions that no text can blow up: the same answers as `re`."""

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from reparam.core.expressions import Expression

ATOMS = (
    *("a", "b", ".", "\\.", "\\w", "[ab]", "[^a]", "\\d", "(a|b)", "(a|ab)", "(?:ab)", "^", "$", "\\b", "(?=a)"),
    *("(?!b)", "(?<=a)", "(?<!ab)", "(a*)*", "(?i:A)", "[a-c\\d]"),
)
QUANTIFIERS = ("", "", "*", "+", "?", "{2}", "{1,3}", "*?", "+?")
parts = st.builds(lambda atom, times: atom + times, st.sampled_from(ATOMS), st.sampled_from(QUANTIFIERS))
groups = st.builds(
    lambda inner, times, other: f"({''.join(inner)}){times}{other}",
    st.lists(parts, min_size=1, max_size=4),
    st.sampled_from(QUANTIFIERS),
    st.sampled_from(("", "|a", "|b+", "$")),
)


@given(pattern=groups, text=st.text("ab.1A", max_size=7))
def test_equals_re(pattern: str, text: str) -> None:
    try:
        re.compile(pattern)
        found = Expression(pattern)
    except (re.error, ValueError) as error:
        assume("repeat" not in str(error))  # nothing or possessive to repeat
        raise
    assert found.fullmatch(text) == bool(re.fullmatch(pattern, text))
    assert found.match(text) == bool(re.match(pattern, text))


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"(\w+\.?)+!", "model.layers.0.self_attn.q_proj" * 10),
        (r"((a|a)*)*b", "a" * 300),
        (r"(a|aa)+$b", "a" * 300),
        (r"((((a*)*)*)*b){1,4000000000}", "a" * 300),
        (r"(.*)" * 12 + "x", "a" * 300),
        (r"(a|a)" * 40 + "b", "a" * 40),
    ],
)
def test_expressions_that_never_end_in_re(pattern: str, text: str) -> None:
    assert not Expression(pattern).fullmatch(text)
    assert Expression(f"{pattern}|.*").fullmatch(text)


def test_literals() -> None:
    assert Expression(re.escape("a.b-c")).literal == "a.b-c"
    assert Expression("a.b").literal is None
    assert Expression("(?i)ab").literal is None
    assert Expression("(?i)ab").fullmatch("AB")


@pytest.mark.parametrize("pattern", ["(", "*", "[a", "(a)\\1", "(?>a)", "a++", "(" * 20_000, "a" * (2 << 20), "a{2,1}"])
def test_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"regular expression|not supported|longer"):
        Expression(pattern)
