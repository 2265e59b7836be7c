"""Checks every variable that was set for a host: its name, its type and its choices.

Ansible takes any name for a variable, so a mistyped one would deploy the default without a word. What names
there are is read from the roles' argument specs and from playbooks/vars/variables.yml.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from ansible.errors import AnsibleError
from ansible.module_utils.parsing.convert_bool import boolean
from ansible.plugins.action import ActionBase

from lowmem.text import visible
from lowmem.values.problems import FACT

DOCUMENTATION = r"""
module: check_variables
short_description: Refuse variables with an unknown name, a wrong type or a value that is not a choice
description:
  - Reads all variables of the host, wherever they were set. Runs on the controller, also in check mode.
  - Lists all problems at once, one line each. A secret is never shown.
  - In a play that collects problems (V(__preflight_collects)) the task succeeds, and each line becomes a fact
    as those of C(require) do.
"""

REPOSITORY = Path(__file__).resolve().parents[2]
LONGEST_SHOWN = 60
SECRET = re.compile(r"token|password|passphrase|secret|api_key|environment$")
UNDEFINED = re.compile(r"'(\w+)' is undefined")


class Known(NamedTuple):
    """The variables that there are."""

    options: Mapping[str, Mapping[str, Any]]  # name -> its entry of an argument spec
    facts: frozenset[str]  # what a run sets itself
    renamed: Mapping[str, str]  # name of an earlier release -> name

    @property
    def names(self) -> frozenset[str]:
        return self.facts | self.options.keys()


def read_known(repository: Path) -> Known:
    """Read the variables of all roles and of the playbooks."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    def read(path: Path) -> Any:
        return yaml.load(path.read_text(), Loader=loader)  # noqa: S506 - both loaders are safe

    own = read(repository / "playbooks/vars/variables.yml")
    options = dict(own["options"])
    for path in sorted(repository.glob("roles/*/meta/argument_specs.yml")):
        for entry in read(path)["argument_specs"].values():
            options |= entry.get("options", {})
    return Known(options, frozenset(own["facts"]), own["renamed"])


# Ansible reads this file once, in its main process; then it forks a process for each task of each host.
KNOWN = read_known(REPOSITORY)
# Role plan has no variables of its own name: an operator sets lowmem_* for it.
PREFIXES = ("lowmem_", *(f"{p.name}_" for p in sorted((REPOSITORY / "roles").iterdir()) if p.name != "plan"))


# Of a word that others do not use: a site may have a `router_zone` or `gateways_of_ours`.
OWN_PREFIXES = tuple(prefix for prefix in PREFIXES if prefix.count("_") > 1 or prefix == "lowmem_")
# What Ansible itself gives a template. Nothing that an operator sets is behind these.
MAGIC = frozenset({"hostvars", "vars", "groups", "group_names", "ansible_facts", "inventory_hostname"})


def fold(name: str) -> str:
    """Return a name as most variables are written, in small letters and with underscores."""
    return re.sub(r"[-. ]", "_", name.strip().lower())


def one_edit_apart(left: str, right: str) -> bool:
    """Tell whether one letter more, less or changed, or two neighbours swapped, makes one of the other."""
    if abs(len(left) - len(right)) > 1:
        return False
    while left and right and left[0] == right[0]:
        left, right = left[1:], right[1:]
    while left and right and left[-1] == right[-1]:
        left, right = left[:-1], right[:-1]
    return max(len(left), len(right)) <= 1 or (len(left) == 2 and left == right[::-1])


def begins_almost(folded: str) -> bool:
    """Tell whether a name begins with a mistyped prefix."""
    return any(
        one_edit_apart(folded[: len(prefix) + more], prefix) for prefix in OWN_PREFIXES for more in (-1, 0, 1)
    )


def is_unknown(name: str, known: frozenset[str]) -> bool:
    """Tell whether a name belongs to this project, by its prefix or nearly its whole, and is not known."""
    if name in known or name.startswith(("_", "ansible_")):
        return False
    folded = fold(name)
    if folded.startswith(PREFIXES) or f"{folded}_" in OWN_PREFIXES:
        return True
    likeness = 0.8 if begins_almost(folded) else 0.9
    return any(one_edit_apart(folded, other) for other in known) or bool(
        difflib.get_close_matches(folded, known, n=1, cutoff=likeness)
    )


def name_problems(names: Iterable[Any], known: Known) -> dict[str, str]:
    """Return unknown name -> a line. The value is not shown: it may be a secret."""
    names, settable, problems = list(names), sorted(known.options), {}
    # a run registers lowmem_planned first
    if "lowmem_plan" in names and "lowmem_planned" not in names:
        problems["lowmem_plan"] = "lowmem_plan is what a run computes for itself: take it out."
    for name in sorted(name for name in names if isinstance(name, str)):
        if name in known.renamed:
            problems[name] = f"{name} was renamed: set {known.renamed[name]} in its place."
        elif is_unknown(name, known.names):
            folded = fold(name)
            near = [other for other in settable if one_edit_apart(folded, other)]
            near = near or difflib.get_close_matches(folded, settable, n=1, cutoff=0.75)
            hint = f"did you mean {near[0]}? Correct it" if near else "correct it (docs/variables.md)"
            problems[name] = f"{visible(name)} is not a variable of this project: {hint}, or take it out."
    return problems


def is_text(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    return is_text(value) and re.fullmatch(r"[+-]?[0-9]{1,18}", str(value).strip()) is not None


def is_number(value: Any) -> bool:
    try:
        return is_text(value) and "_" not in str(value) and math.isfinite(float(value))
    except ValueError:
        return False


def is_bool(value: Any) -> bool:
    try:
        return isinstance(boolean(value), bool)
    except TypeError:
        return False


TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "str": ("a string", is_text),
    "path": ("a path", is_text),
    "int": ("a whole number", is_whole),
    "float": ("a number", is_number),
    "bool": ("true or false", is_bool),
    "list": ("a list, such as [a, b]", lambda value: isinstance(value, (list, tuple))),
    "dict": ("a dictionary, such as {name: value}", lambda value: isinstance(value, Mapping)),
}


def shown(name: str, value: Any, option: Mapping[str, Any]) -> str:
    """Return the value as a line may show it."""
    if option.get("no_log") or SECRET.search(name):
        return "set to a value that is not shown here"
    text = visible(" ".join(str(value).lower().split() if isinstance(value, bool) else str(value).split()))
    return (text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…") or "empty"


def value_problem(name: str, value: Any, option: Mapping[str, Any]) -> str | None:
    """Say in one line what is wrong with a resolved value; None if nothing is."""
    kind, fits = TYPES[option.get("type", "str")]
    if value is None:
        return f"{name} has no value: it must be {kind}; give it one, or take the line out."
    said = f"{name} is {shown(name, value, option)}: it must be"
    choices = [str(choice) for choice in option.get("choices", [])]
    many = isinstance(value, (list, tuple))
    chosen = value if many else [] if option.get("type") == "list" else [value]
    if choices and any(str(member) not in choices for member in chosen):
        return f"{said} {'of these' if many else 'one of these'}: {', '.join(choices)}; correct it."
    if not fits(value):
        return f"{said} {kind}; correct it."
    member_kind, member_fits = TYPES[option.get("elements", "str")]
    if "elements" in option and not all(member_fits(member) for member in value):
        return f"{said} a list, and each of its members {member_kind}; correct it."
    return None


def is_later(named: frozenset[str], variables: Mapping[str, Any]) -> bool:
    """Tell whether a template waits for the plan, which comes after the first look, or for a host's facts."""
    if "lowmem_plan" in named:
        return "lowmem_plan" not in variables
    return "hostvars" in named or any(word.startswith("ansible_") for word in named)


def first_line(error: BaseException) -> str:
    """Return what went wrong at the root of an error, as one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return visible(" ".join(str(error).split()))


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from strings(member)
    elif isinstance(value, (list, tuple)):
        for member in value:
            yield from strings(member)


def roots(problems: Mapping[str, str], variables: Mapping[str, Any]) -> dict[str, str]:
    """Leave out the problem of a variable that takes its value from another one with a problem.

    Of variables that take their values from one another in a circle, each is told.
    """
    behind = {name: sources(name, variables) for name in problems}

    def inherited(name: str) -> bool:
        return any(name not in behind[other] for other in behind[name] & problems.keys() - {name})

    return {name: line for name, line in problems.items() if not inherited(name)}


def sources(name: str, variables: Mapping[str, Any]) -> frozenset[str]:
    """Return the variables from which one takes its value, by the names in its templates, all the way."""
    return words(name, variables) & variables.keys()


def words(name: str, variables: Mapping[str, Any]) -> frozenset[str]:
    """Return the words in the templates of a variable and of those from which it takes its value."""
    found: set[str] = set()
    open_names = {name}
    while open_names:
        text = " ".join(part for part in strings(variables[open_names.pop()]) if "{{" in part or "{%" in part)
        new = set(re.findall(r"\w+", text)) - found
        found |= new
        open_names |= (new & variables.keys()) - MAGIC
    return frozenset(found)


def unresolved(name: str, error: Exception, later: bool) -> str | None:
    """Say why a value cannot be resolved; None for one that a later fact may resolve."""
    reason = first_line(error)
    if "decrypt" in reason.lower():
        return (
            f"{name} is encrypted with ansible-vault and no password opens it: give"
            " --vault-password-file FILE or --ask-vault-pass."
        )
    if "recursi" in reason.lower():
        return f"{name} takes its value from itself, perhaps through others: give it a value of its own."
    missing = UNDEFINED.search(reason)
    if missing and missing[1] not in KNOWN.names and not missing[1].startswith(("_", "ansible_")):
        return f"{name} refers to {missing[1]}, which is not set: set it, or correct the name."
    if missing or ("has no attribute" in reason and later):
        return None
    if "Undefined' is unsupported" in reason:
        return f"{name} has a template that gives no value in this case: give it one, such as with `else`."
    hidden = KNOWN.options[name].get("no_log") or SECRET.search(name)
    return f"{name} cannot be resolved{'' if hidden else f': {reason}'}; correct it."


class ActionModule(ActionBase):
    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        self.validate_argument_spec({})
        variables = task_vars or {}
        problems = roots(name_problems(variables, KNOWN) | self._value_problems(variables), variables)
        if not problems:
            return {"changed": False}
        if variables.get("__preflight_collects"):
            return {
                "changed": False,
                "ansible_facts": {f"{FACT}{k}": v for k, v in problems.items()},
            }
        return {"failed": True, "changed": False, "msg": "\n".join(problems.values())}

    def _value_problems(self, variables: Mapping[str, Any]) -> dict[str, str]:
        problems = {}
        for name, option in KNOWN.options.items():
            if name not in variables:
                continue
            try:
                value = self._templar.template(variables[name])
                problem = value_problem(name, value, option)
            except (AnsibleError, RecursionError) as error:
                problem = unresolved(name, error, is_later(words(name, variables), variables))
            if problem:
                problems[name] = problem
        return problems
