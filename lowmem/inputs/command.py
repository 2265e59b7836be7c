"""Holds what a command that starts `vllm serve` asks for, and reads the arguments of `vllm serve` into it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowmem.errors import BadInput
from lowmem.files import YAML_LIMIT_BYTES, parse_yaml, read_text
from lowmem.inputs import options
from lowmem.inputs.shell import MOST_WORDS, Word
from lowmem.schema import VLLM_VERSION

_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
_ENGINE_VARIABLES = (
    "VLLM_", "NCCL_", "PYTORCH_", "TORCH_", "OMP_", "GLOO_", "FLASHINFER_", "TRITON_", "CUDA_",
)  # fmt: skip
_CARD_VARIABLES = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


@dataclass
class Command:
    """Holds what a command asks for.

    `faults` are what no plan can be made with. `removed` are the flags that this vLLM no longer has, without
    which the plan is made. `notes` are what of the command is not the plan's.
    """

    model: str | None = None
    options: dict[str, options.Given] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    cards: int | None = None
    cards_by: str = ""  # what gives the number of cards
    image: str = ""
    faults: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def set_cards(self, count: int, by: str) -> None:
        """Keep the number of cards that the command leaves the engine: the least that is named."""
        if self.cards is None or count < self.cards:
            self.cards, self.cards_by = count, by

    def set_variable(self, name: str, word: Word) -> None:
        """Keep a variable of the environment if the engine reads it."""
        value = word.text.partition("=")[2]
        gone = options.removed_environment().get(name)
        if gone is not None:
            self.removed.append(f"{name}: vLLM {VLLM_VERSION} no longer reads it; use {gone}")
        elif name in _CARD_VARIABLES:
            _visible_cards(self, name, value, word)
        elif name.startswith(_ENGINE_VARIABLES) and not _SECRET.search(name):
            if word.unset:
                self.faults.append(unset_fault(name, word))
            elif not value.isprintable():
                self.faults.append(f"{name} is not one line of printable characters; correct it")
            else:
                self.environment[name] = value
        else:
            self.notes.append(f"{name} is not part of the plan")


def unset_fault(name: str, word: Word) -> str:
    return f"{name} is {', '.join(word.unset)}, which nothing here sets; write its value"


def _visible_cards(command: Command, name: str, value: str, word: Word) -> None:
    if word.unset:
        command.faults.append(unset_fault(name, word))
    elif value.lower() in ("all", "void", "none", ""):
        return
    else:
        command.set_cards(len([v for v in value.split(",") if v.strip()]), f"{name}={value[:60]}")


def read_arguments(command: Command, words: list[Word]) -> None:
    """Read the arguments of `vllm serve` into the command. Raises BadInput for too many words."""
    if len(words) > MOST_WORDS:
        raise BadInput(f"the command has {len(words):,} words; the limit is {MOST_WORDS:,}")
    left = _with_config(command, words)
    dotted: dict[str, options.Given] = {}
    while left:
        word = left.pop(0)
        if word.text[:1] in "\u2013\u2014\u2212" and word.text:
            command.faults.append(f"{word.text[:40]} begins with a typographic dash; write --")
            _values(left, 1)
        elif not _is_flag(word.text):
            _positional(command, word)
        else:
            _flag(command, word, left, dotted)
    _fold(command, dotted)
    _shorthands(command)
    _settle(command)
    if command.model and not command.model.isprintable():
        command.faults.append(f"the model {command.model[:60]!r} is not one line of printable characters")
    for lines in (command.faults, command.removed, command.notes):
        lines[:] = [" ".join(line.split()) for line in lines]


def _with_config(command: Command, words: list[Word]) -> list[Word]:
    """Put the options of the file of `--config` before the command's own, as vLLM does."""
    place = next((n for n, w in enumerate(words) if re.match(r"--config(=|$)", w.text)), None)
    if place is None:
        return list(words)
    sign, name = words[place].text.partition("=")[1:]
    after = place + 1 if sign else place + 2
    file = words[place] if sign else words[place + 1] if words[place + 1 :] else Word("")
    name = name if sign else file.text
    rest = [*words[:place], *words[after:]]
    if not name:
        command.faults.append("--config has no value; give one")
        return rest
    if file.unset or not _is_file(name):
        command.notes.append(
            f"--config {name[:60]} is no file here, so the plan is without its options; give its path, or"
            " write them as flags"
        )
        return rest
    try:
        given = parse_yaml(read_text(Path(name), YAML_LIMIT_BYTES), name[:60])
    except BadInput as error:
        command.faults.append(str(error))
        return rest
    if not isinstance(given, dict):
        command.faults.append(
            f"--config {name[:60]} holds no options; write lines such as max-model-len: 4096"
        )
        return rest
    first = rest[:1] if rest and not _is_flag(rest[0].text) else []
    if first:  # the model of the command counts
        given.pop("model", None)
    return [*first, *_config_words(given), *rest[len(first) :]]


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # a name that no file can have
        return False


def _config_words(given: Mapping[Any, Any]) -> list[Word]:
    """Return the words that vLLM makes of a configuration file."""
    words = []
    for key, value in given.items():
        off = f"--no-{key}".replace("_", "-")
        if value is None or (value is False and off not in options.flags()) or value == []:
            continue
        words.append(Word(off if value is False else f"--{key}"))
        if isinstance(value, dict):
            words.append(Word(json.dumps(value, default=str)))
        elif not isinstance(value, bool):
            words += [Word(str(one)) for one in (value if isinstance(value, list) else [value])]
    return words


def _is_flag(text: str) -> bool:
    return len(text) > 1 and text[0] == "-" and not re.fullmatch(r"-[0-9.]+", text)


def _positional(command: Command, word: Word) -> None:
    if word.unset:
        command.faults.append(unset_fault("the model", word))
    if command.model is None:
        command.model = word.text
    else:
        command.faults.append(f"{word.text[:60]!r} stands alone; vLLM takes one model, {command.model[:60]}")


def _values(left: list[Word], most: int) -> list[Word]:
    """Take the words up to the next flag, at most so many."""
    taken: list[Word] = []
    while left and len(taken) < most and not _is_flag(left[0].text):
        taken.append(left.pop(0))
    return taken


def _flag(command: Command, word: Word, left: list[Word], dotted: dict[str, options.Given]) -> None:
    """Read one flag with its values."""
    text = word.text
    if match := re.fullmatch(r"-O=?(\w+)", text):
        command.options["optimization_level"] = match[1]
        return
    if text == "-O" and left and re.fullmatch(r"\w+", left[0].text):
        text = "--optimization-level"
    elif text.startswith(("-O.", "-O=", "-O{")) or (text == "-O" and left and left[0].text[:1] == "{"):
        now = f"-cc{'=' * text.startswith('-O{')}{text[2:]}"
        command.removed.append(
            f"-O with a configuration: vLLM {VLLM_VERSION} has it no longer; use {now.partition('=')[0][:60]}"
        )
        text = now
    elif text == "-O":
        command.faults.append("-O takes a level from 0 to 3; give one")
        return
    head, sign, value = text.partition("=")
    head, dot, path = head.partition(".")
    if head.startswith("--"):
        head = "--" + head[2:].replace("_", "-")
    given = [Word(value, word.unset)] if sign else []
    if head == "--model":
        for one in given or _values(left, 1):
            _positional(command, one)
        return
    found = _option(command, head)
    if found is None:
        known = _removed(command, head)
        if not sign and (not (known and known.switch) or _says_boolean(left)):
            _values(left, 1)
        return
    option, on = found
    if dot:
        taken = given or left[:1]
        if not sign:
            del left[:1]
        if not taken:
            command.faults.append(f"{head}.{path[:60]} has no value; give one")
        elif taken[0].unset:
            command.faults.append(unset_fault(f"{head}.{path[:60]}", taken[0]))
        else:
            dotted[f"{option.name}.{path}"] = taken[0].text
    elif option.type == "bool":
        _switch(command, option, on, given or (_values(left, 1) if _says_boolean(left) else []))
    else:
        _valued(command, option, given or _values(left, 10_000 if option.type == "list" else 1))


def _says_boolean(left: list[Word]) -> bool:
    return bool(left) and left[0].text.lower() in ("true", "false")


def _option(command: Command, head: str) -> tuple[options.Option, bool] | None:
    """Return the option of a flag, or of the one flag that it abbreviates, as argparse does."""
    flags = options.flags()
    if head in flags:
        return flags[head]
    if options.removed_flag(head) or not head.startswith("--"):
        return None
    longer = sorted(flag for flag in flags if flag.startswith(head)) if len(head) > 4 else []
    if len({flags[flag][0].name for flag in longer}) == 1:
        command.notes.append(f"{head} is short for {longer[0]}")
        return flags[longer[0]]
    return None


def _removed(command: Command, head: str) -> options.Removed | None:
    """Say what replaced a flag that is gone, or what an unknown one may mean."""
    found = options.removed_flag(head)
    if found:
        if str(found) not in command.removed:
            command.removed.append(str(found))
        return found
    joined = re.fullmatch(r"(-[a-z]{2,4})(\d{1,6})", head)
    if joined and joined[1] in options.flags():
        command.faults.append(f"{head} is no flag of vLLM {VLLM_VERSION}; write {joined[1]} {joined[2]}")
        return None
    close = options.close_to(head.lstrip("-"))
    meant = " or ".join("--" + name.replace("_", "-") for name in close)
    command.faults.append(
        f"{head[:60]} is no flag of vLLM {VLLM_VERSION}"
        + (f"; did you mean {meant}" if meant else "; leave it out")
    )
    return None


def _switch(command: Command, option: options.Option, on: bool, given: list[Word]) -> None:
    if given:
        said = given[0].text.lower()
        if said not in ("true", "false"):
            command.faults.append(
                f"{option.flags[0]} takes no value, and {given[0].text[:40]!r} is given; leave it out"
            )
            return
        right = option.flags[0] if (said == "true") == on else option.off or "nothing"
        command.notes.append(f"{option.flags[0]} takes no value in vLLM {VLLM_VERSION}; write {right}")
        on = on == (said == "true")
    command.options[option.name] = on


def _valued(command: Command, option: options.Option, given: list[Word]) -> None:
    flag = option.flags[0]
    if not given and option.type != "flag_or_str":
        command.faults.append(f"{flag} has no value; give one")
        return
    unset = [word for word in given if word.unset]
    if options.standing(option.name).kind == "refused":
        _deployment(command, option, given)
    elif unset:
        command.faults.append(unset_fault(flag, unset[0]))
    elif option.type == "list":
        command.options[option.name] = [word.text for word in given]
    else:
        if option.name in command.options and not option.repeat:
            command.notes.append(f"{flag} is given twice; vLLM takes the last, {given[0].text[:60]}")
        command.options[option.name] = given[0].text


def _deployment(command: Command, option: options.Option, given: list[Word]) -> None:
    """Note an option that the deployment sets itself; the value of a secret is not shown."""
    value = "" if _SECRET.search(option.name) else " " + " ".join(w.text for w in given)[:60]
    use = options.standing(option.name).text
    command.notes.append(f"{option.flags[0]}{value} is the deployment's, not the plan's; use {use}")
    if option.name == "device_ids":
        ids = [i for i in given[0].text.split(",") if i.strip()]
        command.set_cards(len(ids), f"--device-ids {given[0].text[:60]}")


def _fold(command: Command, dotted: Mapping[str, options.Given]) -> None:
    for name, value in dotted.items():
        head = name.partition(".")[0]
        try:
            both = {head: command.options[head]} if head in command.options else {}
            command.options |= options.folded({**both, name: value})
        except BadInput as error:
            command.faults.append(str(error))
            command.options.pop(head, None)


def _shorthands(command: Command) -> None:
    """Join --spec-method, --spec-model and --spec-tokens to the configuration that vLLM makes of them."""
    fields = {"spec_method": "method", "spec_model": "model", "spec_tokens": "num_speculative_tokens"}
    given = {key: command.options.pop(name) for name, key in fields.items() if name in command.options}
    if not given:
        return
    if "speculative_config" in command.options:
        command.faults.append("--speculative-config and --spec-… are both given; vLLM takes one of them")
        return
    if str(given.get("num_speculative_tokens", "")).isdecimal():
        given["num_speculative_tokens"] = int(str(given["num_speculative_tokens"])[:9])
    command.options["speculative_config"] = given


NEVER = {
    "trust_remote_code": "no code of a checkpoint is run on a host; a model type that vLLM knows needs none",
}
"""Options that many commands have, and that a deployment never has."""


def _settle(command: Command) -> None:
    """Check each option's value, and leave out what the deployment sets itself."""
    for name, value in list(command.options.items()):
        if options.standing(name).kind == "refused":
            _deployment(command, options.options()[name], [])
            del command.options[name]
            continue
        if name in NEVER and value is not False:
            command.notes.append(f"{options.options()[name].flags[0]} is left out: {NEVER[name]}")
            del command.options[name]
            continue
        try:
            value = command.options[name] = _of_today(command, options.options()[name], value)
            if value == {}:  # it had nothing but fields that are gone
                del command.options[name]
            else:
                command.options[name] = options.checked(name, value)
        except BadInput as error:
            hint = "; put JSON in single quotes" if "is not JSON" in str(error) else ""
            command.faults.append(f"{error}{hint}")


def _of_today(command: Command, option: options.Option, value: options.Given) -> options.Given:
    """Return a JSON option's value as this vLLM takes it, without the fields that it no longer has."""
    if not option.type.startswith("json"):
        return value
    flag = option.flags[0]
    if isinstance(value, str) and re.fullmatch(r"\w{1,40}=\d{1,9}(,\w{1,40}=\d{1,9}){0,20}", value):
        pairs = [pair.split("=") for pair in value.split(",")]
        today = json.dumps({name: int(number) for name, number in pairs}, separators=(",", ":"))
        command.removed.append(f"{flag} {value[:60]}: vLLM {VLLM_VERSION} takes JSON; use '{today[:120]}'")
        return today
    gone = {path: use for path, use in options.removed_fields().items() if path.startswith(f"{option.name}.")}
    if not gone or (isinstance(value, str) and not value.lstrip().startswith("{")):
        return value
    fields: dict[str, Any] | list[Any] = json.loads(options.checked_json(option, value))
    if not fields:
        return value
    for path, use in gone.items():
        *parents, last = path.split(".")[1:]
        level: Any = fields
        for key in parents:
            level = level.get(key) if isinstance(level, dict) else None
        if isinstance(level, dict) and last in level:
            del level[last]
            command.removed.append(str(options.Removed(f"{option.name}.{'.'.join([*parents, last])}", use)))
    return fields
