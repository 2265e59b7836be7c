"""Checks start parameters: which exist in which vLLM version, their types and their limits."""

from __future__ import annotations

import math
import re

from lowmem.data import load_yaml
from lowmem.errors import BadInput
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


def _capability(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major or 0), int(minor or 0)


def parse_assignments(assignments: list[str] | tuple[str, ...], option: str = "--set") -> dict[str, Scalar]:
    """Parse `knob=value` strings; values stay text until `checked`.

    Raises BadInput for a missing `=` or a repeated knob.
    """
    values: dict[str, Scalar] = {}
    for text in assignments:
        name, sign, value = text.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if not sign or not name:
            raise BadInput(
                f"{option} {text!r} is not of the form knob=value, e.g."
                f" {'max_num_seqs=8' if option == '--set' else 'NCCL_DEBUG=WARN'}"
            )
        if name in values:
            raise BadInput(f"{option} {name} is given twice ({values[name]!r} and {value!r}); give it once")
        values[name] = value.strip()
    return values


def checked(name: str, value: Scalar) -> Scalar:
    """Convert one knob's value to its type and check its limits.

    Raises BadInput, which names knob, value, limit and what to do.
    """
    spec = load_yaml("knobs.yml").get(name)
    if spec is None:
        close = [k for k in load_yaml("knobs.yml") if k.startswith(name[:6])]
        raise BadInput(
            f"knob {name!r} is unknown; knobs are vLLM's flags in"
            f" snake_case{', did you mean ' + ' or '.join(close) if close else ''}"
        )
    if spec.get("auto") and str(value) in ("auto", *spec.get("auto_is", ())):
        return "auto"
    kind = spec["type"]
    try:
        result = _typed(kind, value)
    except (ValueError, OverflowError):
        expected = {
            "int": "a whole number",
            "float": "a number",
            "bool": "true or false",
            "bytes": "a size such as 2GiB or 2147483648",
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


def _typed(kind: str, value: Scalar) -> Scalar:
    if kind == "bool":
        text = str(value).lower()
        if text in ("true", "1", "yes", "on", ""):
            return True
        if text in ("false", "0", "no", "off"):
            return False
        raise ValueError(text)
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
        return " ".join(str(value).replace(",", " ").split())
    return str(value)


def version_tuple(text: str) -> tuple[int, int, int]:
    """Parse a version of the tables, such as `0.18.0`."""
    parts = [int(x) for x in text.split(".")]
    return parts[0], parts[1] if len(parts) > 1 else 0, parts[2] if len(parts) > 2 else 0


def flag_of(name: str) -> str:
    """Return a knob's command line flag."""
    return "--" + name.replace("_", "-")


def tokens_of(name: str, value: Scalar) -> tuple[str, str | None] | None:
    """Return flag and value as `vllm serve` gets them.

    None means that the engine does what the knob asks for without being told.
    """
    spec = load_yaml("knobs.yml")[name]
    if spec["type"] == "bool":
        if value:
            return flag_of(name), None
        return ("--no-" + name.replace("_", "-"), None) if spec.get("negation") else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return flag_of(name), str(value)
