"""Tells whether a value that an operator sets is of its kind.

A shell, a unit or a configuration sees it only then.

`lowmem/data/variables.yml` names the kind of each variable. A kind is one of KINDS or made of them:
`empty or KIND`, `list of KIND`, `KIND to KIND` (a dictionary), `one of A, B`.

An inert kind takes only characters that bash, systemd, nginx, supervisor and YAML read as themselves.
A value of any other kind is quoted where it is written.

This module imports the standard library only, since plugins load it for each task.
"""

from __future__ import annotations

import functools
import ipaddress
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

SHOWN_CHARACTERS = 120

RESERVED = frozenset({
    "BASHOPTS", "BASH_ENV", "BASH_VERSINFO", "ENV", "EUID", "IFS", "PPID", "SHELLOPTS", "UID",
    "arguments", "release",
})  # fmt: skip
"""Names that bash does not let a script set, or that the launcher itself uses."""

RESERVED_PREFIXES = ("LOWMEM_", "VLLM_API_KEY", "BASH_FUNC_")
"""What this project sets itself, the keys among it, and functions of bash."""


@dataclass(frozen=True)
class Kind:
    """Rule of one kind of value."""

    accepts: Callable[[Any], bool]
    must_be: str
    inert: bool = True
    secret: bool = False
    fault: Callable[[Any], tuple[Any, str] | None] = lambda _: None
    """The part of a list or dictionary that is bad, and its rule."""


def pattern(regex: str, must_be: str, *, inert: bool = True, secret: bool = False) -> Kind:
    """Make a kind of the texts that match as a whole; a number that YAML read counts as its text."""
    compiled = re.compile(regex)

    def accepts(value: Any) -> bool:
        return (
            isinstance(value, str | int | float)
            and not isinstance(value, bool)
            and compiled.fullmatch(str(value)) is not None
        )

    return Kind(accepts, must_be, inert, secret)


def boolean(value: Any) -> bool:
    """Tell whether the value is one that Ansible's filter `bool` reads."""
    words = ("true", "false", "yes", "no", "on", "off", "y", "n", "t", "f", "1", "0")
    return isinstance(value, bool) or (isinstance(value, str | int) and str(value).lower() in words)


def number(least: float, most: float, *, whole: bool) -> Callable[[Any], bool]:
    """Return a test of a number in plain decimal digits; neither `true`, `1_0` nor ` 1` is one."""
    plain = re.compile(r"-?[0-9]{1,18}" if whole else r"-?[0-9]{1,18}(\.[0-9]{1,18})?")

    def accepts(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return False
        if isinstance(value, float) and not whole:
            return least <= value <= most  # false for NaN
        return plain.fullmatch(str(value)) is not None and least <= float(value) <= most

    return accepts


def ip_address(value: Any) -> bool:
    """Tell whether the value is one IPv4 or IPv6 address, without a scope."""
    try:
        return isinstance(value, str) and "%" not in value and bool(ipaddress.ip_address(value))
    except ValueError:
        return False


def ip_network(value: Any) -> bool:
    """Tell whether the value is an address or a network in CIDR notation; host bits may be set."""
    if not isinstance(value, str):
        return False
    address, slash, prefix = value.partition("/")
    if slash and not (prefix.isascii() and prefix.isdecimal()):
        return False
    try:
        return ip_address(address) and bool(ipaddress.ip_interface(value))
    except ValueError:
        return False


def loopback(value: Any) -> bool:
    """Tell whether a server on this address is reached from its own host only."""
    return value == "localhost" or (ip_address(value) and ipaddress.ip_address(value).is_loopback)


def text(value: Any) -> bool:
    """Tell whether the value is a plain one that an environment holds: no NUL, no half of a UTF-16 pair."""
    if not isinstance(value, str | int | float):
        return False
    return not any(c == "\0" or "\ud800" <= c <= "\udfff" for c in str(value))


def one_line(value: Any) -> bool:
    """Tell whether the value ends no line and steers no terminal."""
    return text(value) and str(value).isprintable()


def environment_name(value: Any) -> bool:
    """Tell whether the value names a variable that an operator may set for the service."""
    named = isinstance(value, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,127}", value) is not None
    return named and value not in RESERVED and not value.startswith(RESERVED_PREFIXES)


def key_limits(value: Any) -> bool:
    """Tell whether the value is the limits of one key, each a whole number from 1."""
    names = {"requests_per_minute", "burst", "concurrent_requests"}
    whole = number(1, 999_999_999, whole=True)
    return (
        isinstance(value, Mapping) and bool(value) and set(value) <= names and all(map(whole, value.values()))
    )


HOST = r"[A-Za-z0-9:][A-Za-z0-9._:%-]{0,252}"
"""Pattern of a name or an address; a shell sees nothing in it, and no option begins so."""

INTERFACE = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,14}"

_PATH_END = r"(?!.*/\.\.?(/|$))"

_NO_PARENT = r"(?!(.*/)?\.\.(/|$))"

_HOST = r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9]([A-Za-z0-9._-]{0,252}[A-Za-z0-9])?)"

_URL_REST = rf"{_NO_PARENT}[A-Za-z0-9._~:/@+=,-]*"

_PATH_SAYS = "an absolute path of letters, digits and _ . / + @ -, without '..'"

KINDS: dict[str, Kind] = {
    "boolean": Kind(boolean, "true or false"),
    "integer": Kind(number(-1e18, 1e18, whole=True), "a whole number in digits, such as 10"),
    "number": Kind(number(-1e18, 1e18, whole=False), "a number in digits, such as 1.5"),
    "seconds": Kind(number(0, 1e9, whole=True), "a whole number of seconds, 0 or more, such as 30"),
    "port": Kind(number(1, 65535, whole=True), "a TCP port, 1 to 65535"),
    "port or 0": Kind(number(0, 65535, whole=True), "a TCP port, 0 to 65535"),
    "card": Kind(number(0, 255, whole=True), "the number of a card, as in /dev/nvidia0"),
    # without quotes in configurations of nginx, systemd and nftables
    "config_path": pattern(rf"{_PATH_END}(/[A-Za-z0-9_.+@-]+)+", _PATH_SAYS),
    "root_path": pattern(rf"{_PATH_END}(/+[A-Za-z0-9_.+@-]+)+/*", _PATH_SAYS),
    "controller_path": pattern(
        rf"{_PATH_END}(/+[A-Za-z0-9_.+@,-]+)+/*",
        "an absolute path of letters, digits and _ . / + @ , -, without '..'",
    ),
    # of this repository, or of a site's own beside its inventory
    "profile": pattern(
        rf"{_NO_PARENT}[A-Za-z0-9_./+@,-]{{1,4096}}",
        "the name of a profile or the path of its file, of letters, digits and _ . / + @ , -, without '..'",
    ),
    "device": pattern(
        rf"{_NO_PARENT}[A-Za-z0-9_./][A-Za-z0-9_./:=+@,-]{{0,4095}}",
        "the name of a device, auto, custom:24GiB,936GB/s,71TFLOPS,sm_86, or the path of a YAML file,"
        " without blanks and '..'",
    ),
    "relative_path": pattern(
        rf"{_NO_PARENT}[A-Za-z0-9_.+@-]+(/[A-Za-z0-9_.+@-]+)*",
        "a relative path of letters, digits and _ . / + @ -, without '..'",
    ),
    "host_folder": pattern(
        rf"{_PATH_END}/[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]*",
        "an absolute path in one line, without '..'",
        inert=False,
    ),
    "file_glob": pattern(
        rf"{_NO_PARENT}[A-Za-z0-9_.*?\[\]!/+@-]+",
        "a pattern of file names, such as *.json, without '..'",
        inert=False,
    ),
    # a part of unit names, tables of nftables and folders
    "instance_name": pattern(r"[A-Za-z0-9_]{1,32}", "1 to 32 letters, digits or _"),
    "user_name": pattern(
        r"[a-z_][a-z0-9_-]{0,31}", "a user's name of small letters, digits, _ or -, at most 32"
    ),
    # what an HTTP header, a shell and an environment file hold without quotes
    "api_key": pattern(
        r"[A-Za-z0-9._~+/=-]{16,256}", "16 to 256 letters, digits or . _ ~ + / = -", secret=True
    ),
    "api_key_name": pattern(
        r"[A-Za-z][A-Za-z0-9_]{0,31}", "a letter and then at most 31 letters, digits or _"
    ),
    "token": pattern(
        r"[A-Za-z0-9._~+/=-]{1,1024}", "at most 1024 letters, digits or . _ ~ + / = -", secret=True
    ),
    "name": pattern(
        r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}", "a name of letters, digits and . _ + -, at most 128"
    ),
    "version": pattern(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}", "a version, such as 1.2.3"),
    "major_minor": pattern(r"[0-9]+\.[0-9]+", "major.minor, such as 13.0"),
    "sha256": pattern(r"[0-9a-fA-F]{64}", "a SHA-256, 64 hexadecimal digits"),
    "commit": pattern(r"[0-9a-f]{40}", "a commit, 40 hexadecimal digits; a branch can move"),
    "fingerprint": pattern(
        r"[0-9A-Fa-f ]{40,60}", "the 40 hexadecimal digits of a key's fingerprint", inert=False
    ),
    "repository": pattern(
        r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}",
        "of the form owner/name, of letters, digits and . _ -, without '..'",
    ),
    "repository_url": pattern(
        rf"(https?://[A-Za-z0-9\[]|file:///){_URL_REST}",
        "a URL of letters, digits and . _ ~ : / @ + = , - that starts with https://, http:// or file:///",
    ),
    "http_url": pattern(
        rf"https?://{_HOST}(:[0-9]{{1,5}})?(/{_URL_REST})?",
        "http:// or https://, a host, and perhaps a port and a path, such as https://example.org:8443/path",
    ),
    "server_url": pattern(rf"https?://{_HOST}:[0-9]{{1,5}}", "http://host:port"),
    "host_port": pattern(rf"{_HOST}:[0-9]{{1,5}}", "an address and a port, such as 127.0.0.1:8000"),
    "host": pattern(HOST, "the name or address of a host", inert=False),  # a scope begins with %
    "host_name": pattern(r"[A-Za-z0-9_]([A-Za-z0-9._:-]{0,253})", "the name or address of a host"),
    "certificate_name": pattern(
        r"[A-Za-z0-9.:_*-]{1,64}", "a host name or an IP address, at most 64 characters", inert=False
    ),
    "ip_address": Kind(ip_address, "an IP address, such as 127.0.0.1"),
    "ip_network": Kind(ip_network, "an IP address or a network, such as 10.0.0.2 or 10.0.0.0/24"),
    "interface": pattern(INTERFACE, "the name of a network interface, such as eth0"),
    "route": pattern(
        r"(GET|POST|PUT|PATCH|DELETE) (/([A-Za-z0-9_~-][A-Za-z0-9._~-]*|[{][a-z_]+[}]))+",
        "GET, POST, PUT, PATCH or DELETE, one blank, and a path, such as GET /v1/models",
        inert=False,
    ),
    "label": pattern(r"[A-Za-z_][A-Za-z0-9_]{0,127}", "a letter or _, and then letters, digits or _"),
    "knob": pattern(r"[a-z][a-z0-9_]{0,63}", "the name of a knob, vLLM's flag in snake_case"),
    "environment_name": Kind(
        environment_name,
        "a letter or _, and then letters, digits or _; and none that bash or this project sets"
        " (LOWMEM_*, VLLM_API_KEY*)",
    ),
    "key_limits": Kind(
        key_limits, "one or more of requests_per_minute, burst, concurrent_requests, each 1 or more"
    ),
    "line": Kind(one_line, "at most one line of printable characters", inert=False),
    "one_line": Kind(lambda v: one_line(v) and str(v) != "", "one line of printable characters", inert=False),
    "scalar": Kind(
        lambda v: isinstance(v, bool) or one_line(v), "a number, true, false or one line of text", inert=False
    ),
    "text": Kind(text, "a text without NUL", inert=False),
}


@functools.cache
def kind(name: str) -> Kind:
    """Return the kind of that name, or make it of others. KeyError for an unknown name."""
    if name in KINDS:
        return KINDS[name]
    if name.startswith("empty or "):
        own = kind(name.removeprefix("empty or "))
        return Kind(lambda v: v == "" or own.accepts(v), f"{own.must_be}, or empty", own.inert, own.secret)
    if name.startswith("list of "):
        return _list_of(kind(name.removeprefix("list of ")))
    if name.startswith("one of "):
        choices = name.removeprefix("one of ").split(", ")
        return Kind(
            lambda v: isinstance(v, str | int) and not isinstance(v, bool) and str(v) in choices,
            f"one of {', '.join(choices)}",
        )
    keys, _, values = name.partition(" to ")
    return _dict_of(kind(keys), kind(values))


def _list_of(own: Kind) -> Kind:
    def fault(value: Any) -> tuple[Any, str] | None:
        bad = [one for one in value if not own.accepts(one)] if isinstance(value, list | tuple) else []
        return (bad[0], f"each must be {own.must_be}") if bad else None

    return Kind(
        lambda v: isinstance(v, list | tuple) and all(map(own.accepts, v)),
        f"a list, each item {own.must_be}",
        own.inert,
        own.secret,
        fault,
    )


def _dict_of(keys: Kind, values: Kind) -> Kind:
    def known(key: Any) -> bool:
        return isinstance(key, str) and keys.accepts(key)

    def fault(value: Any) -> tuple[Any, str] | None:
        for key, one in value.items() if isinstance(value, Mapping) else ():
            if not known(key):
                return key, f"a name must be {keys.must_be}"
            if not values.accepts(one):
                return (key if values.secret else {key: one}), f"a value must be {values.must_be}"
        return None

    return Kind(
        lambda v: isinstance(v, Mapping) and all(known(k) and values.accepts(one) for k, one in v.items()),
        f"a dictionary; a name must be {keys.must_be}, and a value {values.must_be}",
        keys.inert and values.inert,
        values.secret,
        fault,
    )


def shown(value: Any) -> str:
    """Return the value in one line of printable characters, cut to SHOWN_CHARACTERS."""
    said = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in said)
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]}…"


def refusal(name: str, kind_name: str, value: Any) -> str:
    """Return the one line that refuses a value of this variable; empty if it is of its kind."""
    own = kind(kind_name)
    if own.accepts(value):
        return ""
    if part := own.fault(value):
        # of a dictionary of secrets the name is shown alone; a list of secrets there is none
        return f"{name} has {shown(part[0]) or 'an empty text'}: {part[1]}."
    if own.secret:
        return f"{name} must be {own.must_be}."
    return f"{name} is {shown(value) or 'empty'}: it must be {own.must_be}."
