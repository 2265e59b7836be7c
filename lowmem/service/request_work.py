"""Counts the work that a request asks for, before the engine sees it, and refuses what exceeds a limit.

The functions are pure: a parsed JSON body and the plan's limits go in, `Work` or `Refusal` comes out. Names
and meanings of fields are those of vLLM 0.32.0 (entrypoints/openai, sampling_params.py).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from lowmem.schema import AdmissionLimits
from lowmem.service.grammar_work import grammar_work
from lowmem.service.refusal import Refusal, over

TEXT_BYTES_PER_TOKEN = 4
"""Bytes that an estimate takes for one token of a text. It weighs requests against one another."""

_INT32 = 2**31 - 1

_INT64 = 2**63 - 1

_COUNTS = (
    "n", "best_of", "max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens", "top_k",
    "truncate_prompt_tokens", "logprobs", "top_logprobs", "prompt_logprobs", "stream_interval",
    "thinking_token_budget", "routed_experts_prompt_start",
)  # fmt: skip
"""Fields whose integers reach 32-bit arrays of the engine."""

_EXTENSIONS = (
    "vllm_xargs", "kv_transfer_params", "ec_transfer_params", "mm_processor_kwargs", "media_io_kwargs",
    "prompt_embeds",
)  # fmt: skip
"""Fields of extensions that no deployment of this project has. The engine answers some of them with 500."""

_URL_FIELDS = frozenset({"url", "image_url", "audio_url", "video_url", "file_url"})

_PROMPTS = ("prompt", "messages", "input", "tokens")
"""Fields that hold prompts. All other text of a body counts as a part of one more prompt."""

_STRUCTURED = frozenset({"tools", "response_format", "structured_outputs"})
"""Fields that `grammar_work` counts."""


@dataclass(frozen=True)
class Work:
    """Work that one admitted request asks for."""

    tokens: int  # estimate: its prompts and the longest answers that it may get
    prompt: int  # those of its prompts
    sequences: int  # places that it takes in the engine
    grammar: int  # items of its grammars; 0: unconstrained


def parse_body(body: bytes) -> dict[str, Any]:
    """Parse a request's body. Raises Refusal if it is no JSON object or holds a false number."""
    try:
        value = json.loads(body, parse_constant=_no_constant)
    except RecursionError:
        raise Refusal("the body is nested too deeply; flatten it") from None
    except ValueError as error:  # also integers of thousands of digits and text that is not UTF-8
        raise Refusal(f"the body is not JSON ({str(error).splitlines()[0][:80]}); correct it") from None
    if not isinstance(value, dict):
        raise Refusal(f"the body is a JSON {type(value).__name__} and not an object; correct it")
    return value


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def work_of(body: dict[str, Any], limits: AdmissionLimits) -> Work:
    """Count the work of a request. Raises Refusal, which names field, value and limit."""
    _check_values(body, limits)
    for name in _EXTENSIONS:
        if body.get(name) not in (None, {}, [], ""):
            raise Refusal(f"{name} is not served here: this server has no such extension; leave it out", name)
    _check_lists(body, limits)
    _check_media(body, limits)
    answers = max(1, _count(body, "n") or 1, _count(body, "best_of") or 1)
    prompts = _prompts(body, limits)
    sequences = len(prompts) * answers
    if sequences > limits.sequences:
        name, value = ("n", answers) if answers > len(prompts) else ("prompt", len(prompts))
        asked = f"{len(prompts)} prompts x {answers} answers" if len(prompts) > 1 < answers else value
        raise over(name, asked, limits.sequences, "sequences that one request may ask for")
    answer = _answer_tokens(body, limits)
    tokens = sum(prompts) + sequences * answer
    if tokens > limits.request_tokens:
        raise over(
            "max_tokens",
            f"{answer} for each of {sequences} sequences ({tokens} tokens with the prompts)",
            limits.request_tokens,
            "tokens that one request may ask for",
        )
    _check_logprobs(body, limits, sum(prompts), sequences * answer)
    return Work(tokens, sum(prompts), sequences, grammar_work(body, limits))


def _count(body: dict[str, Any], name: str) -> int | None:
    """Return a field's whole number as the engine reads it, or None if it is none, which the engine refuses.

    The engine's parser takes 4, 4.0, true and "4" alike.
    """
    value = body.get(name)
    try:
        number = float(value) if isinstance(value, str) else value
        whole = int(number) if isinstance(number, int | float) else None
    except ValueError:
        return None
    except OverflowError:
        raise over(name, "infinity", _INT32, "greatest whole number of this field") from None
    if whole is not None and abs(whole) > _INT32:
        raise _outside(name, whole, -_INT32, _INT32)
    return whole


def _outside(name: str, value: int | float, least: int, most: int) -> Refusal:
    if value > most:
        return over(name, value, most, "greatest number of this field")
    shown = "a number of many digits" if isinstance(value, int) and value < -(10**40) else f"{value}"
    return Refusal(
        f"{name[:80]}={shown}, less than the limit of {least} (least number of this field); raise it",
        name[:80],
        code="limit_exceeded",
    )


def _nodes(value: Any) -> Iterator[tuple[str, Any, int]]:
    """Walk a JSON value without recursion: the key that each value stands under, the value, its level."""
    stack: list[tuple[str, Any, int]] = [("", value, 0)]
    while stack:
        key, node, level = stack.pop()
        yield key, node, level
        if isinstance(node, dict):
            stack.extend((name, child, level + 1) for name, child in node.items())
        elif isinstance(node, list):
            stack.extend((key, child, level + 1) for child in node)


def _check_values(body: dict[str, Any], limits: AdmissionLimits) -> None:
    objects = 0
    for values, (key, node, level) in enumerate(_nodes(body)):
        if values > limits.json_values:
            raise over("the body", f"{values} values", limits.json_values, "values of a body")
        if _unpaired(key) or (isinstance(node, str) and _unpaired(node)):
            raise Refusal(
                f"{key.encode('ascii', 'replace').decode()[:80]} has half of a surrogate pair, which is no"
                " character; correct it"
            )
        if key == "arguments" and isinstance(node, str) and _levels(node) > limits.json_depth:
            raise over(key, f"{_levels(node)} levels", limits.json_depth, "levels of a call's arguments")
        objects += isinstance(node, dict)
        if objects > limits.json_objects:
            raise over("the body", f"{objects} objects", limits.json_objects, "objects of a body")
        if level > limits.json_depth:
            raise over("the body", f"{level} levels", limits.json_depth, "levels of a body")
        if isinstance(node, int) and not -_INT64 - 1 <= node <= _INT64:
            raise _outside(key, node, -_INT64 - 1, _INT64)
        if isinstance(node, float) and not math.isfinite(node):
            raise Refusal(f"{key} is not a finite number; correct it", key)
    for name in _COUNTS:
        _count(body, name)
    penalty = body.get("length_penalty")
    if isinstance(penalty, int | float) and abs(penalty) > _LENGTH_PENALTY:
        raise _outside("length_penalty", penalty, -_LENGTH_PENALTY, _LENGTH_PENALTY)


_LENGTH_PENALTY = 10
"""Greatest exponent of a length in a beam's score, which the engine computes after the whole answer."""


def _levels(text: str) -> int:
    """Return the levels of a JSON text's lists and objects, an upper bound: brackets in texts count too."""
    level = deepest = 0
    for found in _BRACKET.finditer(text):
        level = level + 1 if found[0] in "[{" else max(0, level - 1)
        deepest = max(deepest, level)
    return deepest


_BRACKET = re.compile(r"[][{}]")


def _unpaired(text: str) -> bool:
    """Tell whether a text cannot be written as UTF-8. The engine answers it with 500."""
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _check_lists(body: dict[str, Any], limits: AdmissionLimits) -> None:
    stop = body.get("stop_sequences" if "stop_sequences" in body else "stop")
    bounded = {
        "stop": (stop, limits.stop_strings, "stop strings"),
        "bad_words": (body.get("bad_words"), limits.bad_words, "words"),
        "stop_token_ids": (body.get("stop_token_ids"), limits.token_ids, "token ids"),
        "allowed_token_ids": (body.get("allowed_token_ids"), limits.token_ids, "token ids"),
        "logprob_token_ids": (body.get("logprob_token_ids"), limits.logprobs, "token ids"),
        "logit_bias": (body.get("logit_bias"), limits.logit_bias, "tokens"),
    }
    for name, (value, limit, what) in bounded.items():
        if isinstance(value, list | dict) and len(value) > limit:
            raise over(name, len(value), limit, f"{what} that one request may give")
    for name, value in (("stop", stop), ("bad_words", body.get("bad_words"))):
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and len(text) > _STOP_CHARACTERS:
                raise over(name, f"{len(text)} characters long", _STOP_CHARACTERS, "characters of one")
    for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
        ids = body.get(name)
        for one in ids if isinstance(ids, list) else []:
            if isinstance(one, int) and not 0 <= one <= _INT32:
                raise _outside(name, one, 0, _INT32)
    bias = body.get("logit_bias")
    for one in bias if isinstance(bias, dict) else {}:
        if not (one.isascii() and one.isdecimal() and int(one[:20]) <= _INT32):
            raise Refusal(f"logit_bias names {one[:20]!r}, which is no token id; correct it", "logit_bias")


_STOP_CHARACTERS = 1024


def _check_media(body: dict[str, Any], limits: AdmissionLimits) -> None:
    for name in ("messages", "input", "prompt"):
        for key, node, _ in _nodes(body.get(name)):
            if key in _URL_FIELDS and isinstance(node, str) and not node.startswith("data:"):
                _check_url(node, limits)


def _check_url(url: str, limits: AdmissionLimits) -> None:
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        parts, host = None, ""
    if parts is None or parts.scheme not in ("http", "https") or host not in limits.media_domains:
        named = ", ".join(limits.media_domains) or "none"
        raise Refusal(
            f"the media URL of host {host[:80]!r} is not fetched: lowmem_media_domains names {named};"
            " send the media as a data: URL",
            "messages",
        )


def _prompts(body: dict[str, Any], limits: AdmissionLimits) -> list[int]:
    """Estimate the tokens of each prompt. Raises Refusal for one that cannot fit the model."""
    sizes: list[int] = []
    for name in _PROMPTS:
        value = body.get(name)
        if not value:
            continue
        several = isinstance(value, list) and _is_batch(name, value)
        for one in value if several else [value]:
            sizes.append(_prompt_tokens(name, one, limits))
    rest = {k: v for k, v in body.items() if k not in _PROMPTS and k not in _STRUCTURED}
    beside = _prompt_tokens("the body", rest, limits)
    return [size + beside for size in sizes] or [beside]


def _is_batch(name: str, value: list[Any]) -> bool:
    """Tell whether a list holds several prompts: texts or lists of token ids, and lists of chat messages."""
    if name in ("messages", "tokens"):
        return isinstance(value[0], list)
    if name == "input" and all(isinstance(one, dict) for one in value):
        return False  # messages of the Responses API
    return not all(isinstance(one, int) for one in value)


def _prompt_tokens(name: str, prompt: Any, limits: AdmissionLimits) -> int:
    text = ids = 0
    for _, node, _ in _nodes(prompt):
        if isinstance(node, str):
            text += len(node.encode("utf-8", "surrogatepass"))
        elif isinstance(node, int):
            ids += 1
            if abs(node) > _INT32 and name != "the body":
                raise _outside(name, node, 0, _INT32)
    if text > limits.prompt_bytes:
        raise over(name, f"{text} bytes of text", limits.prompt_bytes, "bytes of one prompt")
    if name != "the body" and ids > limits.max_model_len:
        raise over(name, f"{ids} tokens", limits.max_model_len, "tokens of the longest sequence")
    return min(
        limits.max_model_len, math.ceil(text / TEXT_BYTES_PER_TOKEN) + (ids if name != "the body" else 0)
    )


def _answer_tokens(body: dict[str, Any], limits: AdmissionLimits) -> int:
    """Return the longest answer that the engine may give to one sequence, in tokens."""
    asked = [_count(body, name) for name in ("max_completion_tokens", "max_tokens", "max_output_tokens")]
    given = next((number for number in asked if number is not None), None)
    if given is None:  # the engine's defaults
        given = 16 if "prompt" in body else limits.max_model_len
    return min(max(given, 0), limits.max_model_len)


def _check_logprobs(body: dict[str, Any], limits: AdmissionLimits, prompt: int, answer: int) -> None:
    values = 0
    for name, tokens in (("logprobs", answer), ("top_logprobs", answer), ("prompt_logprobs", prompt)):
        asked = _count(body, name)
        if asked is None:
            continue
        if asked < 0 or asked > limits.logprobs:
            raise over(name, asked, limits.logprobs, "log probabilities at one token")
        echoed = prompt if name == "logprobs" and body.get("echo") else 0
        values += (asked + (asked > 0)) * (tokens + echoed)
    if values > limits.logprob_values:
        raise over("logprobs", f"{values} values", limits.logprob_values, "values of one whole answer")
