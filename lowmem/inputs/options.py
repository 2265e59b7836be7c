"""Knows the options of `vllm serve`: names, types, choices, and what the plan makes of each.

The parser of vLLM 0.32.0 itself wrote their table (scripts/engine_options.py). `data/options.yml` has the
class of each option, the removed options and their replacements.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import lowmem.data
from lowmem.data import load_yaml
from lowmem.errors import BadInput
from lowmem.files import parse_json
from lowmem.schema import VLLM_VERSION, Scalar
from lowmem.units import SUFFIX

MOST_CHARACTERS = 16_384
"""Longest value of an option; an inline chat template is the longest that people write."""

Given = Scalar | list[Any] | dict[str, Any]
"""Value of an option as YAML or JSON may have it."""

_MOST_WHOLE = 10**15


@dataclass(frozen=True)
class Option:
    """Option of `vllm serve`; scripts/engine_options.py explains the fields."""

    name: str
    type: str
    flags: tuple[str, ...]
    off: str = ""
    items: str = "str"
    choices: tuple[str | int, ...] = ()
    keys: tuple[str, ...] = ()
    repeat: bool = False
    default: Any = None
    help: str = ""


@dataclass(frozen=True)
class Standing:
    """Class of an option: `text` is the reason, what it makes wrong, or what to use instead."""

    kind: Literal["modelled", "neutral", "unmodelled", "refused"]
    text: str = ""


@dataclass(frozen=True)
class Removed:
    """Option that an earlier version had. `gone` is the first version known to be without it, or empty."""

    name: str
    use: str
    gone: str = ""
    never: bool = False
    switch: bool = False

    def __str__(self) -> str:
        since = f" since {self.gone} at the latest" if self.gone else ""
        had = "no vLLM version has it" if self.never else f"vLLM {VLLM_VERSION} has it no longer{since}"
        use = f"use {self.use}".replace("use nothing", "leave it out", 1)
        head, dot, fields = self.name.partition(".")
        return f"--{head.replace('_', '-')}{dot}{fields}: {had}; {use}"


@cache
def options() -> Mapping[str, Option]:
    """Return the options of `vllm serve` by their names in snake_case."""
    path = Path(lowmem.data.__file__).parent / f"engine_options_{VLLM_VERSION}.json"
    rows: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["options"]
    return {name: _option(name, row) for name, row in rows.items()}


def _option(name: str, row: dict[str, Any]) -> Option:
    for key in ("flags", "choices", "keys"):
        row[key] = tuple(row.get(key, ()))
    return Option(name=name, **row)


@cache
def flags() -> Mapping[str, tuple[Option, bool]]:
    """Return each flag with its option; False beside the flag that turns the option off."""
    named = {flag: (option, True) for option in options().values() for flag in option.flags}
    return named | {option.off: (option, False) for option in options().values() if option.off}


@cache
def removed() -> Mapping[str, Removed]:
    """Return the options of earlier versions by name."""
    return {name: Removed(name, **row) for name, row in load_yaml("options.yml")["removed"].items()}


def removed_flag(flag: str) -> Removed | None:
    """Return the removed option of a flag, or of its `no` form."""
    name = flag.lstrip("-").replace("-", "_")
    return removed().get(name) or removed().get(name.removeprefix("no_"))


@cache
def removed_fields() -> Mapping[str, str]:
    """Return the fields that a JSON option no longer has, as `option.field`, each with what to use."""
    return {
        f"{option}.{path}": str(use)
        for option, fields in load_yaml("options.yml")["removed_fields"].items()
        for path, use in fields.items()
    }


@cache
def removed_environment() -> Mapping[str, str]:
    """Return the variables of the environment that are no longer read, each with what to use."""
    return {name: str(row["use"]) for name, row in load_yaml("options.yml")["removed_environment"].items()}


@cache
def _standings() -> Mapping[str, Standing]:
    table = load_yaml("options.yml")
    found = {name: Standing("modelled") for name in table["modelled"].split()}
    for group in table["neutral"]:
        found |= {name: Standing("neutral", group["reason"]) for name in group["options"].split()}
    for group in table["unmodelled"]:
        found |= {name: Standing("unmodelled", group["widens"]) for name in group["options"].split()}
    return found | {name: Standing("refused", row["use"]) for name, row in table["refused"].items()}


def standing(name: str) -> Standing:
    """Return the class of an option. Raises KeyError for a name that is none."""
    return _standings()[name]


def unknown(name: str) -> BadInput:
    """Return the error for a name that is no option: what replaced it, or what was meant."""
    if name in removed():
        return BadInput(str(removed()[name]))
    meant = close_to(name)
    return BadInput(
        f"knob {name[:60]!r} is unknown; knobs are vLLM's flags in snake_case"
        + (f", did you mean {' or '.join(meant)}" if meant else "")
    )


def close_to(name: str, most: int = 3) -> list[str]:
    """Return the options that a wrong name may mean: by meaning first, then by spelling, then by words."""
    name = name.lower().replace("-", "_").strip("_")[:64]
    meant = load_yaml("options.yml")["meant"]
    bare = re.sub(r"^(enable|disable|no|use|set)_", "", name)
    turned_on = f"enable_{bare}"
    if turned_on in options():
        off = name.startswith(("disable_", "no_"))
        return [f"no-{turned_on.replace('_', '-')}" if off else turned_on]
    for word in (name, bare):
        if word in meant:
            return [meant[word]]
    found = difflib.get_close_matches(name, list(options()), most, 0.78)
    if not found:
        words = set(name.split("_")) - {"size", "max", "num", "enable", "disable", "backend", "config"}
        shared = {o: len(words & set(o.split("_"))) for o in options()}
        top = max(shared.values(), default=0)
        found = [o for o, n in shared.items() if n == top and n * 2 > len(words)][:most] if words else []
    return found


def refuse(name: str) -> None:
    """Raise BadInput for an option that the deployment sets itself."""
    if is_refused(name):
        raise BadInput(f"{name} is not for a profile or an override; use {standing(name).text}")


def is_refused(name: str) -> bool:
    """Tell whether the deployment sets an option itself."""
    return name in options() and standing(name).kind == "refused"


def checked(name: str, value: Given) -> Scalar:
    """Convert an option's value to its type and check its choices.

    A list becomes words as a shell splits them, a dictionary compact JSON. Raises BadInput, which names
    option, value and what is wanted.
    """
    option = options().get(name)
    if option is None:
        raise unknown(name)
    if isinstance(value, str) and len(value) > MOST_CHARACTERS:
        raise BadInput(f"{name} has {len(value):,} characters; the longest value is {MOST_CHARACTERS:,}")
    if option.type == "list":
        return shlex.join(str(_chosen(option, one)) for one in _items(option, value))
    return _chosen(option, value)


def _chosen(option: Option, value: Any) -> Scalar:
    """Return one value of an option, of its type and among its choices."""
    kind = option.items if option.type == "list" else option.type
    try:
        result: Scalar = _READ[kind](value)
    except (ValueError, OverflowError):
        raise BadInput(f"{option.name}={_shown(value)} is not {_WANTED[kind]}; correct it") from None
    if kind == "json" and option.keys and isinstance(result, str):
        _check_keys(option, result)
    if option.choices and str(result) not in {str(c) for c in option.choices}:
        listed = ", ".join(map(str, option.choices))
        names = [c for c in option.choices if isinstance(c, str)]
        close = difflib.get_close_matches(str(result)[:64], names, 1, 0.5)
        meant = f"; did you mean {close[0]}" if close else ""
        raise BadInput(f"{option.name}={_shown(value)} is not one of {listed}{meant}")
    return result


def checked_json(option: Option, value: Given) -> str:
    """Return the compact JSON of an option's value, whatever its fields are. BadInput for another value."""
    try:
        return _object(value)
    except ValueError:
        raise BadInput(f"{option.name}={_shown(value)} is not {_WANTED['json']}; correct it") from None


def _items(option: Option, value: Given) -> list[Any]:
    """Return the values of a list option: a list, JSON, or words."""
    if isinstance(value, dict):
        return [json.dumps(value, separators=(",", ":"))]
    if not isinstance(value, str):
        found = value if isinstance(value, list) else [value]
        return [json.dumps(v, separators=(",", ":")) if isinstance(v, dict) else v for v in found]
    text = value.strip()
    if text.startswith("["):
        listed = parse_json(text, option.name)
        return _items(option, listed if isinstance(listed, list) else [listed])
    if text.startswith("{"):
        return [text]
    try:
        return shlex.split(text)
    except ValueError:
        raise BadInput(f"{option.name}={_shown(value)} has a quote that does not end; correct it") from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _check_keys(option: Option, text: str) -> None:
    """Raise BadInput for a field that the configuration of a JSON option does not have."""
    given = json.loads(text)
    for key in given if isinstance(given, dict) else ():
        if key not in option.keys:
            if use := removed_fields().get(f"{option.name}.{key}"):
                raise BadInput(str(Removed(f"{option.name}.{key}", use)))
            close = difflib.get_close_matches(key[:64], option.keys, 2, 0.6)
            raise BadInput(
                f"{option.name} has no field {key[:60]!r}; "
                + (f"did you mean {' or '.join(close)}" if close else f"it has {_listed(option.keys)}")
            )


def _listed(names: tuple[str, ...], most: int = 12) -> str:
    """Return names in one line, the first of them if they are many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def readable_int(value: Any) -> int:
    """Convert `32k` (32,000), `32K` (32,768), `1.5m` or plain digits, as vLLM does. Raises ValueError."""
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError(value)
    text = _plain_digits(str(int(value) if isinstance(value, float) else value))
    match = re.fullmatch(r"([0-9]{1,15})(\.[0-9]{1,9})?([kmgtKMGT]?)", text)
    if match is None:
        if re.fullmatch(r"-[0-9]{1,15}", text):
            return int(text)
        raise ValueError(value)
    whole, part, suffix = match.groups()
    if part and not suffix.islower():  # vLLM takes decimals with decimal suffixes only
        raise ValueError(value)
    number = float(f"{whole}{part}") if part else int(whole)
    return _bounded(int(number * SUFFIX[suffix]))


def _plain_digits(text: str) -> str:
    """Return the text of a number without the underscores between its digits, which Python's int takes."""
    text = text.strip()
    return text.replace("_", "") if re.fullmatch(r"-?[0-9]+(_[0-9]+)*", text) else text


def _bounded(number: int) -> int:
    if abs(number) > _MOST_WHOLE:
        raise ValueError(number)
    return number


def _whole(value: Any) -> int:
    text = _plain_digits(str(value))
    if isinstance(value, float) and value.is_integer():
        text = str(int(value))
    if isinstance(value, bool) or not re.fullmatch(r"-?[0-9]{1,16}", text):
        raise ValueError(value)
    return _bounded(int(text))


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or "_" in str(value):
        raise ValueError(value)
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def readable_bool(value: Any) -> bool:
    """Read a boolean as people write it; nothing means true, as a bare flag does. Raises ValueError."""
    text = str(value).lower()
    if text in ("true", "1", "yes", "on", ""):
        return True
    if text in ("false", "0", "no", "off"):
        return False
    raise ValueError(value)


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(value)
    text = str(value)
    if not text.isprintable() or text.startswith("-"):
        raise ValueError(value)
    return text


def _object(value: Any) -> str:
    """Return compact JSON of a dictionary, a list or a text that is JSON."""
    if isinstance(value, str):
        try:
            value = parse_json(value, "value")
        except BadInput:
            raise ValueError(value) from None
    if not isinstance(value, dict | list):
        raise ValueError(value)
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except TypeError:  # a date of YAML
        raise ValueError(value) from None


_READ: dict[str, Any] = {
    "bool": readable_bool,
    "int": _whole,
    "size": readable_int,
    "size_or_auto": lambda v: "auto" if str(v).strip().lower() in ("auto", "-1") else readable_int(v),
    "float": _number,
    "str": _text,
    "flag_or_str": _text,
    "json": _object,
    "json_or_str": lambda v: _text(v) if isinstance(v, str) and not v.strip().startswith("{") else _object(v),
}

_WANTED = {
    "bool": "true or false",
    "int": "a whole number",
    "size": "a whole number, such as 4096, 32k (32,000) or 32K (32,768)",
    "size_or_auto": "a whole number, such as 4096, 32k (32,000) or 32K (32,768), or auto",
    "float": "a number",
    "str": "one line of text that does not begin with a dash",
    "flag_or_str": "one line of text that does not begin with a dash",
    "json": 'JSON, such as {"name": 1}',
    "json_or_str": 'JSON, such as {"name": 1}, or one line of text',
}


def tokens(name: str, value: Scalar) -> list[str]:
    """Return the words by which `vllm serve` gets an option whose value is `checked`; none: its default."""
    option = options()[name]
    flag = option.flags[0]
    if option.type == "bool":
        return [flag] if value else [option.off] if option.off else []
    if option.type == "list":
        return [flag, *shlex.split(str(value))]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return [flag, str(value)]


def folded(values: Mapping[str, Given]) -> dict[str, Given]:
    """Join dotted names (`compilation_config.mode`) to the JSON of their option.

    Raises BadInput where the option takes no JSON, or where its value is no object.
    """
    result: dict[str, Given] = {}
    for name, value in values.items():
        head, dot, rest = name.partition(".")
        if not dot:
            result[name] = value
            continue
        head = head.replace("-", "_")
        option = options().get(head)
        if option is None:
            raise unknown(head)
        if not option.type.startswith("json"):
            raise BadInput(
                f"{name[:80]}: {head} takes no fields, it takes {_WANTED.get(option.type, 'words')}"
            )
        into = result.setdefault(head, {})
        if isinstance(into, str):
            into = result[head] = json.loads(str(_chosen(option, into)))
        _put(into, rest, value, name)
    return result


def _put(into: Any, path: str, value: Given, name: str) -> None:
    """Set one field of a nested dictionary. A `+` after its name adds to a list."""
    *parents, last = path.split(".")
    if len(parents) > 8 or not all((*parents, last)):
        raise BadInput(f"{name[:80]} is not the name of a field; write it like compilation_config.mode")
    for key in parents:
        if not isinstance(into, dict):
            break
        into = into.setdefault(key, {})
    if not isinstance(into, dict):
        raise BadInput(f"{name[:80]}: what it is a field of has a value already; give it once")
    if last.endswith("+"):
        listed = into.setdefault(last[:-1], [])
        words = str(value).split(",")
        into[last[:-1]] = [*(listed if isinstance(listed, list) else [listed]), *words]
    else:
        into[last] = _field(value)


def _field(value: Given) -> Any:
    """Read one field as vLLM does: JSON, a number with a suffix, or text."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value, "value")
    except BadInput:
        pass
    try:
        return readable_int(value)
    except ValueError:
        return value
