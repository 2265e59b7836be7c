#!/usr/bin/env python3
"""Writes the table of the options of `vllm serve`, as the parser of an installed engine has them.

Run it with the Python of an engine's environment. lowmem/data/engine_options_<version>.json is its output.
One option takes one line. The fields of an option are:

flags    its names, the long one first; the `no` form stands in `off`
type     bool, int, size (1k: 1000, 1K: 1024), size_or_auto, float, str, list, json, json_or_str, flag_or_str
items    type of the items of a list
choices  the values that it takes; absent: any
keys     fields of the configuration that a JSON option describes
default  absent: None
help     first sentence of its description
"""

import argparse
import dataclasses
import json
import re
import sys

sys.argv = ["vllm", "serve", "--help"]  # vLLM reads the descriptions of its options for help only

import vllm.platforms  # noqa: E402

if not vllm.platforms.current_platform.device_type:  # a CUDA build on a machine without a GPU
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()

from vllm import __version__  # noqa: E402
from vllm.entrypoints.launchers.cli_args import make_arg_parser  # noqa: E402
from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: E402

PLAIN = {str: "str", int: "int", float: "float", json.loads: "json", None: "str"}
NAMED = {
    "human_readable_int": "size",
    "human_readable_int_or_auto": "size_or_auto",
    "union_dict_and_str": "json_or_str",
    "parse_dataclass": "json",
}


def unwrapped(kind):
    """Return the type inside vLLM's wrappers for optional values."""
    while getattr(kind, "__name__", "") in ("_optional_type", "_parse_type"):
        kind = kind.__closure__[0].cell_contents
    return kind


def type_of(action):
    """Return the type of one value of an option. Raises KeyError for one that this script does not know."""
    kind = unwrapped(action.type)
    if kind in PLAIN:
        return PLAIN[kind]
    name = getattr(kind, "__name__", "")
    return "str" if name == "<lambda>" else NAMED[name]


def plain(value):
    """Return a default as JSON has it; an object of vLLM's own has no such form."""
    value = getattr(value, "value", value)
    if isinstance(value, bool | int | float | str) or value is None:
        return None if value == argparse.SUPPRESS else value
    if isinstance(value, list | tuple) and all(isinstance(v, str | int | float) for v in value):
        return list(value) or None
    return None


def first_sentence(text):
    """Return the first sentence of a description, on one line."""
    text = " ".join((text or "").split("\n\n")[0].split())
    return re.split(r"(?<=[a-z`)\]])\. |:? - ", text)[0].replace("%%", "%")[:160].rstrip(".")


def row(action):
    """Describe one option."""
    flags = sorted(action.option_strings, key=lambda f: (not f.startswith("--"), len(f)))
    boolean = isinstance(action, argparse.BooleanOptionalAction)
    off = [f for f in flags if boolean and f.startswith("--no-")]
    found = {"flags": [f for f in flags if f not in off]}
    if off:
        found["off"] = off[0]
    if boolean or action.nargs == 0:
        found["type"] = "bool"
    elif action.nargs in ("+", "*"):
        found |= {"type": "list", "items": "str" if action.dest == "lora_modules" else type_of(action)}
    else:
        found["type"] = type_of(action)
        if action.nargs == "?":
            found["type"] = "flag_or_str"
    if isinstance(action, argparse._AppendAction):
        found["repeat"] = True
    choices = [getattr(c, "value", c) for c in action.choices or [] if c is not None]
    if choices:
        found["choices"] = choices
    kind = unwrapped(action.type)
    if getattr(kind, "__name__", "") == "parse_dataclass":
        config = kind.__defaults__[0]
        found["keys"] = sorted(f.name for f in dataclasses.fields(config) if f.init)
    if (default := plain(action.default)) is not None:
        found["default"] = default
    found["help"] = first_sentence(action.help if action.help != argparse.SUPPRESS else "")
    return found


def table():
    """Return the options of `vllm serve` by name, in alphabetical order."""
    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
    actions = [a for a in parser._actions if a.option_strings and a.dest != "help"]
    return {a.dest: row(a) for a in sorted(actions, key=lambda a: a.dest)}


def main():
    """Print the table as JSON, one option a line."""
    options = table()
    lines = [f"{json.dumps(n)}: {json.dumps(o, ensure_ascii=False)}" for n, o in options.items()]
    version = re.match(r"\d+\.\d+\.\d+", __version__)[0]
    sys.stdout.write(f'{{"vllm": "{version}", "options": {{\n' + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    main()
