"""Counts what the schemas, grammars, patterns and choices of a request cost the compiler of grammars.

xgrammar (0.2.8) compiles 500 properties in 0.85 s and 1,000 in 3.25 s. So their number bounds the time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from lowmem.schema import AdmissionLimits
from lowmem.service.refusal import Refusal, over

BYTES_PER_ITEM = 64
"""Bytes of a specification that weigh as much as one property."""

PATTERN_BYTES_PER_ITEM = 8
"""The same of a grammar or a pattern, where a few characters are a state of the automaton."""

ITEMS_PER_REPEAT = 2
"""Properties that compile in the time of one repetition: 200 of them take 1.4 s, or 2.6 s in a loop."""

LENGTH_STATES = 200
"""Repetitions from which on a longer minLength or maxLength takes xgrammar no longer."""

PAIRS_PER_ITEM = 8
"""Pairs of a property and a number of properties that weigh as much as one property. xgrammar counts the
properties of an object with minProperties or maxProperties: 100 of which 50 are needed take 1.4 s and 19 MiB.
"""

_INT32 = 2**31 - 1

_JSON_TEXTS = ("structured_outputs.json", "structured_outputs.structural_tag")
"""Specifications that may be JSON in a text of their own."""

_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")

_LISTED = ("enum", "anyOf", "oneOf", "allOf", "prefixItems", "items", "tags", "structures", "triggers")

_COUNTED = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")

_DOCUMENTS = ("schema", "parameters", "input_schema", "json")

_IN_PLACE = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else")
"""Keywords whose schema applies to the same value, as that of a $ref does."""

_REPEAT = re.compile(r"\{\s*(\d*)\s*(?:,\s*(\d*)\s*)?\}")

_PART = re.compile(_REPEAT.pattern + r"|\\.|\[(?:\\.|[^\]\\])*\]|.", re.DOTALL)
"""A repetition, what is escaped, a class of characters, or one character of a pattern."""

_ALTERNATIVE = re.compile(r"::=|[|\n]")


def grammar_work(body: dict[str, Any], limits: AdmissionLimits) -> int:
    """Return the grammar items of a request; 0 if nothing constrains its answer.

    Raises Refusal, which names field, value and limit.
    """
    items = size = repeats = 0
    found = False
    for name, spec in _specifications(body):
        found = True
        size += len((spec if isinstance(spec, str) else json.dumps(spec)).encode("utf-8", "surrogatepass"))
        if size > limits.grammar_bytes:
            raise over(
                name, f"{size} bytes", limits.grammar_bytes, "bytes of one request's schemas and grammars"
            )
        if name in _JSON_TEXTS and isinstance(spec, str):
            spec = _parsed(spec)
        if isinstance(spec, str):
            items += len(_ALTERNATIVE.findall(spec)) + len(spec) // PATTERN_BYTES_PER_ITEM
            items += _optional_items(spec)
            repeats += _unrolled(spec)
        else:
            counted, unrolled = _schema_work(name, spec, limits)
            items += counted
            repeats += unrolled
        if items > limits.grammar_items:
            raise over(
                name, f"{items} items", limits.grammar_items, "properties, values and rules of one request"
            )
        if repeats > limits.grammar_repeats:
            raise over(
                name,
                f"{repeats} repetitions",
                limits.grammar_repeats,
                "repetitions of one request's patterns",
            )
    return max(1, items + size // BYTES_PER_ITEM + ITEMS_PER_REPEAT * repeats) if found else 0


def _specifications(body: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield each specification with its field's name: a JSON value, or the text of a grammar or a pattern."""
    asked = body.get("structured_outputs")
    if not isinstance(asked, dict | None):
        raise Refusal("structured_outputs is no object; correct it", "structured_outputs")
    for name, value in asked.items() if isinstance(asked, dict) else ():
        if name == "choice":
            yield "structured_outputs.choice", {"enum": value}
        elif value not in (None, False):
            yield f"structured_outputs.{name}", value
    if isinstance(body.get("response_format"), dict) and body["response_format"].get("type") != "text":
        yield "response_format", body["response_format"]
    text = body.get("text")
    if (
        isinstance(text, dict)
        and isinstance(text.get("format"), dict)
        and text["format"].get("type") != "text"
    ):
        yield "text.format", text["format"]
    if body.get("tools"):
        yield "tools", {"tags": body["tools"]}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=str)  # NaN is a text: it has no value to compare
    except (ValueError, RecursionError):
        return text  # the engine says what is wrong with it


def _schema_work(name: str, root: Any, limits: AdmissionLimits) -> tuple[int, int]:
    """Return items and unrolled repetitions of a JSON value that holds schemas."""
    items = repeats = 0
    lengths: set[int] = set()  # equal ones share their states
    in_place: dict[int, list[dict[str, Any]]] = {}
    stack = [(root, 0, root)]
    while stack:
        node, level, document = stack.pop()
        if level > limits.grammar_depth:
            raise over(name, f"{level} levels", limits.grammar_depth, "levels of one schema")
        if isinstance(node, list):
            stack.extend((child, level + 1, document) for child in node)
        if not isinstance(node, dict):
            continue
        in_place[id(node)] = _in_place(name, node, document)
        items += _counted_properties(node) // PAIRS_PER_ITEM
        for key, child in node.items():
            if (key in _NAMED and isinstance(child, dict)) or (key in _LISTED and isinstance(child, list)):
                items += len(child)
            if key in _COUNTED and isinstance(child, int | float):
                if child > _INT32:
                    raise over(f"{name}: {key}", child, _INT32, "greatest number of this keyword")
                lengths.add(int(max(0, min(LENGTH_STATES, child))))
            if key == "patternProperties" and isinstance(child, dict):
                repeats += sum(map(_unrolled, child))
                items += sum(map(_optional_items, child))
            if key == "pattern" and isinstance(child, str):
                items += len(child) // PATTERN_BYTES_PER_ITEM + _optional_items(child)
                repeats += _unrolled(child)
            # a reference counts from the schema that holds it
            inner = child if key in _DOCUMENTS and isinstance(child, dict) else document
            stack.append((child, level + 1, inner))
    if _has_cycle(in_place):
        raise Refusal(f"{name} has a $ref that leads to itself; give the schema that it means", name)
    return items, repeats + sum(lengths)


def _counted_properties(schema: dict[str, Any]) -> int:
    """Return the pairs of a property and a number of properties that an object's schema tells apart."""
    properties = schema.get("properties")
    known = len(properties) if isinstance(properties, dict) else 0
    counts = [schema.get("minProperties"), schema.get("maxProperties")]
    return known * max((min(known, max(0, int(n))) for n in counts if isinstance(n, int)), default=0)


def _unrolled(pattern: str) -> int:
    """Return how many copies a pattern's counted repetitions make; inside a repeated group they multiply."""
    groups, last, at = [0], 0, 0
    while at < len(pattern):
        repeat = _REPEAT.match(pattern, at)
        if repeat:
            copies = max(int(bound[:9] or 0) for bound in repeat.groups("0")) * max(1, last)
            groups[-1] += copies - last
            last, at = copies, repeat.end()
            continue
        character = pattern[at]
        last = 0
        if character == "(":
            groups.append(0)
        elif character == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
        at += 2 if character == "\\" else 1
    return sum(groups)


def _optional_items(pattern: str) -> int:
    """Return the items of a pattern's optional parts: each is compiled with all that may follow it.

    xgrammar takes 0.6 s for 16 times `.?`, 3.3 s for 32 and 19 s for 64.
    """
    groups, last, before = [0], 0, "("  # optional parts of each open group, and of the group that just ended
    for found in _PART.finditer(pattern):
        part = found[0]
        if found[1] is not None:  # a repetition
            groups[-1] += last * (max(int(bound[:9] or 0) for bound in found.groups("0")) - 1)
            part, last = "}", 0
        elif part == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
        elif part == "?" and before not in ("(", "*", "+", "?", "}"):  # else it changes the one before
            groups[-1] += 1
        else:
            last = 0
            groups += [0] if part == "(" else []
        before = part
    return int(sum(groups) ** 2)


def _in_place(name: str, schema: dict[str, Any], document: Any) -> list[dict[str, Any]]:
    """Return the schemas that apply to the same value as this one."""
    found: list[Any] = []
    for key in _IN_PLACE:
        child = schema.get(key)
        found += child if isinstance(child, list) else [child]
    reference = schema.get("$ref")
    if isinstance(reference, str):
        found.append(_resolved(name, reference, document))
    return [one for one in found if isinstance(one, dict)]


def _resolved(name: str, reference: str, document: Any) -> Any:
    """Return the schema that a reference names; None if there is none, which the engine refuses."""
    if not reference.startswith("#"):
        raise Refusal(
            f"{name} has a $ref to {reference[:80]!r}, outside of its schema; write it in $defs", name
        )
    node = document
    for part in reference[1:].split("/")[1:]:
        node = node.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(node, dict) else None
    return node


def _has_cycle(edges: dict[int, list[dict[str, Any]]]) -> bool:
    """Tell whether schemas that apply to one value lead back to themselves: then no value ever ends them."""
    waits = dict.fromkeys(edges, 0)
    for targets in edges.values():
        for target in targets:
            waits[id(target)] = waits.get(id(target), 0) + 1
    free = [one for one, count in waits.items() if not count]
    left = len(waits)
    while free:
        left -= 1
        for target in edges.get(free.pop(), []):
            waits[id(target)] -= 1
            if not waits[id(target)]:
                free.append(id(target))
    return left > 0
