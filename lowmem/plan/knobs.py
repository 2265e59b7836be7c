"""Checks start parameters: which exist in which vLLM version, their types and their limits."""

from __future__ import annotations

import contextlib
import math
import re
import shlex
from collections.abc import Mapping

from lowmem.data import load_yaml
from lowmem.errors import BadInput
from lowmem.inputs import options
from lowmem.schema import Scalar
from lowmem.units import parse_bytes

OLDEST = (0, 17, 0)


def version(text: str) -> tuple[int, int, int]:
    """Parse a version such as `0.32.0`.

    Raises BadInput for anything else, and for versions before the V1 engine's offload options.
    """
    match = re.fullmatch(r"(\d+)\.(\d+)(?:\.(\d+))?(?:[.+-].*)?", text)
    if not match:
        raise BadInput(f"vllm_version {text!r} is not a version; write it like 0.32.0")
    numbers = (int(match[1]), int(match[2]), int(match[3] or 0))
    if numbers < OLDEST:
        raise BadInput(
            f"vllm_version {text} is older than 0.17.0, the first this planner knows; use 0.17.0 or later"
        )
    return numbers


def parse_assignments(assignments: list[str] | tuple[str, ...], option: str = "--set") -> dict[str, Scalar]:
    """Parse `knob=value` strings; values stay text until `checked`.

    Raises BadInput for a missing `=` or a repeated knob.
    """
    values: dict[str, Scalar] = {}
    for text in assignments:
        name, sign, value = text.partition("=")
        head, dot, rest = name.strip().lstrip("-").partition(".")
        name = head.replace("-", "_") + dot + rest  # the fields of a JSON option keep their dashes
        if not sign or not name:
            raise BadInput(
                f"{option} {text!r} is not of the form knob=value, e.g."
                f" {'max_num_seqs=8' if option == '--set' else 'NCCL_DEBUG=WARN'}"
            )
        if name in values:
            raise BadInput(f"{option} {name} is given twice ({values[name]!r} and {value!r}); give it once")
        values[name] = value.strip()
    return values


def checked(name: str, value: options.Given) -> Scalar:
    """Convert one knob's value to its type and check its limits.

    A knob is any option of `vllm serve`; `knobs.yml` has limits for those that the plan reads. Raises
    BadInput, which names knob, value, limit and what to do.
    """
    options.refuse(name)
    spec = load_yaml("knobs.yml").get(name)
    if spec is None or isinstance(value, dict | list) or str(value).startswith("["):
        return options.checked(name, value)
    option = options.options().get(name)
    if option and option.type.startswith("size") and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = options.readable_int(value)
    if spec.get("auto") and str(value) in ("auto", *spec.get("auto_is", ())):
        return "auto"
    kind = spec["type"]
    try:
        result = _typed(kind, value)
    except (ValueError, OverflowError, TypeError):
        expected = {
            "int": "a whole number",
            "float": "a number",
            "bool": "true or false",
            "bytes": "a size such as 2GiB or 2147483648",
            "list": "words with closed quotes",
        }.get(kind, "text")
        raise BadInput(f"{name}={value!r} is not {expected}; correct it") from None
    if isinstance(result, int | float) and not isinstance(result, bool):
        low, high = spec.get("min"), spec.get("max")
        if not math.isfinite(result) or (
            low is not None and (result < low or (spec.get("exclusive_min") and result == low))
        ):
            raise BadInput(
                f"{name}={value} is below its least value"
                f" {'(more than) ' if spec.get('exclusive_min') else ''}{low}; raise it"
            )
        if high is not None and result > high:
            raise BadInput(
                f"{name}={value} is above its greatest value {high}; {spec.get('why_max', 'lower it')}"
            )
    if "only" in spec and result != spec["only"]:
        raise BadInput(f"{name}={value} is refused: {spec['why']}")
    if "choices" in spec and result not in spec["choices"]:
        raise BadInput(f"{name}={value!r} is not one of {', '.join(spec['choices'])}")
    return result


def checked_all(values: Mapping[str, options.Given]) -> dict[str, Scalar]:
    """Check each knob; a dotted name (`compilation_config.mode`) is a field of its knob."""
    return {name: checked(name, value) for name, value in options.folded(values).items()}


def _typed(kind: str, value: Scalar) -> Scalar:
    if kind == "bool":
        return options.readable_bool(value)
    if kind == "int":
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise ValueError(value)
        return int(value)
    if kind == "float":
        if isinstance(value, bool):
            raise ValueError(value)
        return float(value)
    if kind == "bytes":
        return parse_bytes(value) if not str(value).lstrip().startswith("-") else int(value)
    if isinstance(value, bool):
        raise ValueError(value)
    if kind == "list":
        return shlex.join(shlex.split(str(value).replace(",", " ")))
    return str(value)


def version_tuple(text: str) -> tuple[int, int, int]:
    """Parse a version of the tables, such as `0.18.0`."""
    parts = [int(x) for x in text.split(".")]
    return parts[0], parts[1] if len(parts) > 1 else 0, parts[2] if len(parts) > 2 else 0


def flag_of(name: str) -> str:
    """Return a knob's command line flag."""
    return "--" + name.replace("_", "-")


def tokens_of(name: str, value: Scalar) -> list[str]:
    """Return the words by which `vllm serve` gets a knob: its flag and its values.

    None of them means that the engine does what the knob asks for without being told.
    """
    spec = load_yaml("knobs.yml").get(name)
    if spec is None:
        return options.tokens(name, value)
    if spec["type"] == "bool":
        if value:
            return [flag_of(name)]
        return ["--no-" + name.replace("_", "-")] if spec.get("negation") else []
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    words = shlex.split(str(value)) if spec["type"] == "list" else [str(value)]
    return [flag_of(name), *words]
