"""Patterns from files: the same answers as Python's own, in bounded time."""

from __future__ import annotations

import contextlib
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.errors import BadInput
from lowmem.text import matches

PATTERNS = st.recursive(
    st.sampled_from([*"ab.", r"\d", r"\w", "[ab]", "[^a]", "[a-c0-9]", "^", "$", r"\b", r"\."]),
    lambda inner: (
        st.tuples(inner, inner).map("".join)
        | st.tuples(inner, inner).map("|".join)
        | st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}", "{,2}"])).map(
            lambda two: f"(?:{two[0]}){two[1]}"
        )
        | inner.map(lambda one: f"({one})")
        | inner.map(lambda one: f"(?={one})")
        | inner.map(lambda one: f"(?!{one})")
    ),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@given(PATTERNS, st.text("ab.1c\n", max_size=8))
def test_it_answers_as_python_does(pattern: str, text: str) -> None:
    assert matches(pattern, text) == bool(re.match(pattern, text))
    assert matches(pattern, text, anywhere=True) == bool(re.search(pattern, text))


@pytest.mark.parametrize(
    ("pattern", "name", "found"),
    [
        (r".*lm_head", "lm_head", True),
        (r".*\.gate$", "model.layers.0.mlp.gate", True),
        (r".*\.gate$", "model.layers.0.mlp.gate_proj", False),
        (r"^(?!.*experts).*", "model.layers.0.mlp.experts.3.up_proj", False),
        (r"model\.layers\.(0|1[0-9])\..*", "model.layers.12.self_attn.q_proj", True),
        (r"layers", "model.layers.0", False),
    ],
)
def test_names_of_modules(pattern: str, name: str, found: bool) -> None:
    assert matches(pattern, name) is found


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$", "(a|a)*b", "(a|aa)+$", "((a*)*)*b", "(.*)*x", "(.*a){20}b", "(a?){50}a{50}b",
        "(?:){4000000000}b",
        "(?=(a+)+$)b", "((((a*)*)*)*)*b", "a{1,400}a{1,400}b", "((a{1,99}){1,99}){1,99}b",
    ],
)  # fmt: skip
def test_a_catastrophic_pattern_ends(pattern: str) -> None:
    began = time.process_time()
    with contextlib.suppress(BadInput):
        assert matches(pattern, "a" * 300 + "!", anywhere=True) is False
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("(", "is no regular expression: missing ), unterminated subpattern"),
        ("a{99999999999}", "is no regular expression: the repetition number is too large"),
        ("(" * 240 + ")" * 240, ""),
        (r"(a)\1", "holds groupref, which is not supported"),
        ("(?<=a)b", "holds assert, which is not supported"),
        ("(?i)a", "sets flags"),
        ("a" * 501, "is longer than 500 characters"),
        ("[\x1b", "pattern '[\\\\\\\\x1b'"),
    ],
)
def test_what_is_refused_is_one_line(pattern: str, says: str) -> None:
    if not says:
        assert matches(pattern, "ab") is True
        return
    with pytest.raises(BadInput, match=re.escape(says) if "x1b" not in says else "x1b") as refused:
        matches(pattern, "ab")
    assert len(str(refused.value).splitlines()) == 1
