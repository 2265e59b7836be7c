"""Reads the settings of speculative decoding, and says what acceptance they need.

A step verifies `drafts` draft tokens a request beside its next token, and gives the request as many tokens as
the model accepts. Source: vLLM 0.32.0, config/speculative.py and config/vllm.py (uniform_decode_query_len).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowmem.data import load_yaml
from lowmem.errors import BadInput
from lowmem.files import parse_json
from lowmem.schema import Load, Scalar

KNOB = "speculative_config"
MOST_DRAFTS = 64
_WHOLE = {"num_speculative_tokens": MOST_DRAFTS, "prompt_lookup_min": 64, "prompt_lookup_max": 64}
# for benchmarks: acceptance is set and not earned, and the text is noise
_SYNTHETIC = ("rejection_sample_method", "synthetic_acceptance_length")


@dataclass(frozen=True)
class Speculation:
    """Settings of speculative decoding: the kind of drafts, and how many a step verifies for each request."""

    method: str
    drafts: int

    @property
    def rows(self) -> int:
        """Count the tokens of one request in a decode step."""
        return 1 + self.drafts


def speculation_of(knobs: Mapping[str, Any]) -> Speculation | None:
    """Read the `speculative_config` knob; None if there is none.

    Raises BadInput for a key or a kind of drafts that this planner does not count.
    """
    if KNOB not in knobs:
        return None
    given = _object(knobs[KNOB])
    if unknown := sorted(given.keys() - {"method", *_WHOLE, *_SYNTHETIC}):
        raise BadInput(f"{KNOB} has {unknown[0]!r}, which is not counted; use method, {', '.join(_WHOLE)}")
    method = given.get("method", "nothing")
    if method != "ngram":
        raise BadInput(
            f"{KNOB} names method {method!r:.60}; the plan counts ngram, which needs no weights: use it, or"
            " leave the knob out"
        )
    for name in given.keys() & _WHOLE.keys():
        value, largest = given[name], _WHOLE[name]
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
            raise BadInput(
                f"{KNOB}: {name}={value!r:.60} is not a whole number from 1 to {largest}; correct it"
            )
    if "num_speculative_tokens" not in given:
        raise BadInput(f"{KNOB} has no num_speculative_tokens; give the draft tokens of a step, such as 7")
    least, most = given.get("prompt_lookup_min"), given.get("prompt_lookup_max")
    if least and most and least > most:
        raise BadInput(f"{KNOB}: prompt_lookup_min={least} is more than prompt_lookup_max={most}; lower it")
    return Speculation(method, given["num_speculative_tokens"])


def _object(value: Scalar) -> dict[str, Any]:
    try:
        found = parse_json(str(value), KNOB)
    except BadInput:
        found = None
    if not isinstance(found, dict):
        raise BadInput(
            f'{KNOB}={str(value)[:60]!r} is not a JSON object; write it like {{"method": "ngram",'
            ' "num_speculative_tokens": 7, "prompt_lookup_min": 2, "prompt_lookup_max": 4}'
        )
    return found


def acceptance_of(load: Load, speculation: Speculation | None) -> tuple[float, str]:
    """Return the mean tokens that a step gives a request, and where the figure comes from.

    A load that names none gets the lowest figure published for the kind. Raises BadInput for more tokens than
    a step can give.
    """
    if speculation is None:
        return 1.0, ""
    if load.accepted_tokens is None:
        published = load_yaml("acceptance.yml")[speculation.method]
        return min(float(published["tokens"]), float(speculation.rows)), str(published["source"])
    if load.accepted_tokens > speculation.rows:
        raise BadInput(
            f"accepted_tokens={load.accepted_tokens:g} is more than the {speculation.rows} tokens that a step"
            f" with {speculation.drafts} drafts can give; lower it or raise num_speculative_tokens"
        )
    return load.accepted_tokens, load.accepted_source or "given by the operator"
