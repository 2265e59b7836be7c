"""Finds `vllm serve` in a command as people paste it, and runs nothing of it.

It takes a shell command with its wrappers (sudo, docker, uv, nohup, …), a service of a compose file, a
container of a Kubernetes object, and the arguments alone.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from lowmem.data import load_yaml
from lowmem.errors import BadInput
from lowmem.files import parse_yaml
from lowmem.inputs.command import Command, read_arguments, unset_fault
from lowmem.inputs.shell import MOST_CHARACTERS, Word, assignment, commands
from lowmem.inputs.unit_file import is_unit, settings
from lowmem.schema import VLLM_VERSION, Scalar

MOST_NESTED = 6
"""Shells and wrappers inside one another."""


class _StartsNoServer(BadInput):
    """Tells of a command of vLLM that starts no server; one that does may stand beside it."""


def read_words(words: Sequence[str]) -> Command:
    """Read a command whose words a shell has split already. Raises BadInput if it starts no `vllm serve`."""
    if len(words) == 1 and len(words[0].split()) > 1:
        return read_text(words[0])
    command = Command()
    read_arguments(command, _found([_unwrapped(command, [Word(w) for w in words], 0)]))
    return command


def read_text(text: str) -> Command:
    """Read a shell text, a compose file, a Kubernetes object or arguments alone.

    Raises BadInput if it does not start exactly one `vllm serve`.
    """
    command = Command()
    if len(text) > MOST_CHARACTERS:
        raise BadInput(
            f"the command has {len(text):,} characters; the limit is {MOST_CHARACTERS:,}: paste one command"
        )
    if re.search(r"(?m)^[ \t]*(?:ENTRYPOINT|CMD)[ \t]+\S", text):
        read_arguments(command, _found([_of_dockerfile(command, text)]))
    elif is_unit(text):
        read_arguments(command, _found(_of_unit(command, settings(text))))
    elif _is_yaml(text):
        read_arguments(command, _found(_of_yaml(command, text)))
    else:
        read_arguments(command, _found([_of_shell(command, text, 0)]))
    return command


def _found(candidates: Sequence[list[Word] | None]) -> list[Word]:
    """Return the one command of the candidates."""
    found = [c for c in candidates if c is not None]
    if len(found) != 1:
        raise BadInput(
            "the text starts no `vllm serve`; paste the command that does, such as vllm serve MODEL -tp 2"
            if not found
            else f"the text starts {len(found)} servers; paste the command of one"
        )
    return found[0]


def _of_shell(command: Command, text: str, depth: int) -> list[Word] | None:
    """Return the arguments of the one server that a shell text starts; None if it starts none."""
    variables: dict[str, str] = {}
    exported: dict[str, Word] = {}  # the last setting counts
    found: list[list[Word]] = []
    other: _StartsNoServer | None = None
    for words in commands(text, variables):
        if words[0].text == "export":
            exported |= {word.text.partition("=")[0]: word for word in words[1:] if assignment(word)}
            continue
        if found and re.match(r"--?[A-Za-z]", words[0].text):
            command.faults.append(
                f"{words[0].text[:40]} stands on a line of its own, which the shell does not give to vllm;"
                " end the line before it with a backslash, and put no comment between"
            )
            continue
        one = copy.deepcopy(command)
        try:
            arguments = _unwrapped(one, words, depth)
        except _StartsNoServer as error:
            arguments, other = None, other or error
        if arguments is not None:  # nothing counts of another command
            found.append(arguments)
            command.__dict__.update(one.__dict__)
    if not found:
        if other is not None:
            raise other
        return None
    for name, word in exported.items():
        if name not in command.environment:
            command.set_variable(name, word)
    return _found(found)


def _unwrapped(command: Command, words: list[Word], depth: int) -> list[Word] | None:
    """Return the arguments after `vllm serve` in a simple command; None if it starts something else."""
    if depth > MOST_NESTED:
        raise BadInput(f"the command is nested deeper than {MOST_NESTED} levels; paste the inner one")
    while words:
        pair = assignment(words[0])
        if pair:
            command.set_variable(pair[0], words[0])
            words = words[1:]
        else:
            name = PurePosixPath(words[0].text).name
            table = load_yaml("commands.yml")
            if wrapper := table["wrappers"].get(name):
                words = _past_flags(words[1:], wrapper["values"])[wrapper["plain"] :]
            elif runner := table["runners"].get(name):
                rest = _past_flags(words[1:], runner["values"])
                if not rest or rest[0].text not in runner["subcommands"]:
                    return None
                words = _past_flags(rest[1:], runner["values"])
            else:
                return _starter(command, name, words[1:], depth)
    return None


def _starter(command: Command, name: str, rest: list[Word], depth: int) -> list[Word] | None:
    """Return the arguments of `vllm serve` that a program starts: vLLM, Python, a shell or a container."""
    if re.fullmatch(r"vllm([@=\[].*)?", name):  # uvx vllm@0.32.0
        return _after_vllm(rest)
    if re.fullmatch(r"python[0-9.]*", name):
        return _after_python(rest)
    if name in ("bash", "sh", "zsh", "dash", "ash"):
        scripts = [n for n, w in enumerate(rest[:-1]) if re.fullmatch(r"-[a-z]*c", w.text)]
        return _of_shell(command, rest[scripts[0] + 1].text, depth + 1) if scripts else None
    if name in load_yaml("commands.yml")["launchers"].split():
        return _after_any(command, rest, depth)
    if name in ("kubectl", "oc") and any(word.text == "--" for word in rest):
        image = next((w.text.partition("=")[2] for w in rest if w.text.startswith("--image=")), "")
        return _in_container(command, image, [], rest[[w.text for w in rest].index("--") + 1 :], depth)
    if name in ("docker", "podman", "nerdctl", "apptainer", "singularity"):
        return _after_container(command, rest, depth, "apptainer" if name[0] in "as" else "")
    return None


def _after_any(command: Command, rest: list[Word], depth: int) -> list[Word] | None:
    """Return the arguments of the server that a program starts by its last words, or by one text of them."""
    for n, word in enumerate(rest):
        if PurePosixPath(word.text).name == "vllm" and [w.text for w in rest[n + 1 : n + 2]] == ["serve"]:
            return _unwrapped(command, rest[n:], depth + 1)
        if word.text == "-m" and rest[n + 1 : n + 2] and rest[n + 1].text.startswith("vllm."):
            return _after_python(rest[n:])
        if re.search(r"\bvllm +serve\b|\bvllm\.entrypoints\b", word.text):
            return _of_shell(command, word.text, depth + 1)
    return None


def _past_flags(words: list[Word], values: str) -> list[Word]:
    """Return what follows a program's own flags; `values` are those that take the next word."""
    taking = values.split()
    while words and words[0].text.startswith("-") and len(words[0].text) > 1:
        if words[0].text == "--":
            return words[1:]
        words = words[2:] if words[0].text in taking else words[1:]
    return words


def _after_vllm(rest: list[Word]) -> list[Word]:
    if not rest or rest[0].text != "serve":
        what = " ".join(["vllm", *(word.text[:40] for word in rest[:1])])
        raise _StartsNoServer(f"`{what}` starts no server; lowmem plans `vllm serve MODEL`")
    return rest[1:]


def _after_python(rest: list[Word]) -> list[Word] | None:
    """Return the arguments of vLLM's server that Python starts as a module or a script."""
    rest = _past_flags_until_module(rest)
    if not rest:
        return None
    if rest[0].text != "-m":
        return _after_vllm(rest[1:]) if PurePosixPath(rest[0].text).name == "vllm" else None
    module, arguments = (rest[1].text if rest[1:] else ""), rest[2:]
    if module in ("vllm.entrypoints.openai.api_server", "vllm.entrypoints.launchers.api_server"):
        return arguments
    if module in ("vllm", "vllm.entrypoints.cli.main"):
        return _after_vllm(arguments)
    if module.startswith("vllm."):
        raise _StartsNoServer(
            f"python -m {module[:60]} starts no OpenAI server; lowmem plans `vllm serve MODEL`"
        )
    return None


def _past_flags_until_module(words: list[Word]) -> list[Word]:
    while words and words[0].text.startswith("-") and words[0].text not in ("-m", "-c"):
        words = words[2:] if words[0].text in ("-X", "-W") else words[1:]
    return words


def _after_container(command: Command, words: list[Word], depth: int, kin: str) -> list[Word] | None:
    """Return the arguments of the server that `docker run` and its like start."""
    words = _past_flags(words, "-H --host -c --context --log-level --config")
    if words and words[0].text == "compose":
        return _after_any(command, words[1:], depth)
    if words and words[0].text == "container":
        words = words[1:]
    if not words or words[0].text not in ("run", "exec", "create"):
        return None
    kind, words, entry = words[0].text, words[1:], ""
    while words and words[0].text.startswith("-") and len(words[0].text) > 1:
        flag, value, words = _container_flag(words, kin)
        entry = _take_container_flag(command, flag, value) or entry
    if not words:
        raise BadInput("the container's image is missing; paste the whole command")
    image, rest = words[0], words[1:]
    if kind == "exec" and not image.text.endswith(".sif"):
        return _unwrapped(command, rest, depth + 1)
    _take_image(command, image)
    return _in_container(command, image.text, [Word(w) for w in entry.split()], rest, depth)


def _container_flag(words: list[Word], kin: str = "") -> tuple[str, Word, list[Word]]:
    """Return a flag of a container's command line, its value and the words after them.

    Raises BadInput for a flag that is not known, since the word after it may be its value or the image.
    """
    text, unknown = words[0].text, words[0].unset
    table = load_yaml("commands.yml")["container"]
    taking, switches = table["values"].split(), table["switches"].split()
    if kin:
        switches = table[f"{kin}_switches"].split() + switches
        taking = table[f"{kin}_values"].split() + [flag for flag in taking if flag not in switches]
    flag, sign, value = text.partition("=")
    if text.startswith("--"):
        if sign:
            return flag, Word(value, unknown), words[1:]
        if flag in taking:
            return flag, words[1] if words[1:] else Word(""), words[2:]
        if flag in switches:
            return flag, Word(""), words[1:]
        raise BadInput(
            f"{flag[:60]} of the container is not known here; write {flag[:60]}=VALUE or leave it out"
        )
    short = text[:2]
    if short in taking:  # -p 8000:8000, -p8000:8000
        if text[2:]:
            return short, Word(text[2:], unknown), words[1:]
        return short, words[1] if words[1:] else Word(""), words[2:]
    if short in switches:  # -itd, -dp 8000:8000
        last = "-" + text[-1]
        if text[2:] and last in taking:
            return last, words[1] if words[1:] else Word(""), words[2:]
        return short, Word(""), words[1:]
    raise BadInput(f"{text[:60]} of the container is not known here; leave it out")


def _take_container_flag(command: Command, flag: str, word: Word) -> str:
    """Keep what a container's flag says of the engine. Return the entry point if it names one."""
    if flag in ("-e", "--env") and "=" in word.text:
        command.set_variable(word.text.partition("=")[0], word)
    elif flag == "--env-file":
        command.notes.append(f"--env-file {word.text[:60]} is not read; name its VLLM_ variables with --env")
    elif flag == "--gpus":
        _take_gpus(command, word)
    elif flag == "--device" and (match := re.fullmatch(r"nvidia\.com/gpu=([\w:-]+)", word.text)):
        if match[1] != "all":  # given once for each card
            before = command.cards or 0 if command.cards_by == "--device" else 0
            command.cards, command.cards_by = before + 1, "--device"
    elif flag == "--entrypoint":
        return word.text
    return ""


def _take_gpus(command: Command, word: Word) -> None:
    """Read docker's `--gpus`: all, 2, device=0,1, "device=0,1", count=2."""
    text = word.text.strip("'\" ")
    if word.unset:
        command.faults.append(unset_fault("--gpus", word))
    elif text in ("all", "-1") or text.startswith("all,"):
        return
    elif text.isdecimal() and len(text) < 4:
        command.set_cards(int(text), f"--gpus {text}")
    elif match := re.match(r"(?:.*,)?count=(\d{1,3})", text):
        command.set_cards(int(match[1]), f"--gpus {text[:60]}")
    elif match := re.search(r"device=([^=]*?)(?:,\w+=.*)?$", text):
        ids = [i for i in match[1].strip("'\"").split(",") if i.strip()]
        command.set_cards(len(ids), f"--gpus {text[:60]}")
    else:
        command.faults.append(f"--gpus {text[:60]} is not read here; write all, a number or device=0,1")


def _take_image(command: Command, image: Word) -> None:
    command.image = image.text
    tag = image.text.rpartition("@")[0] or image.text
    version = re.search(r":v?(0\.\d+(?:\.\d+)?)[^/]*$", tag)
    if version and "vllm" in tag and version[1] != VLLM_VERSION:
        command.notes.append(f"the image has vLLM {version[1]}; the plan is for {VLLM_VERSION}")


def _in_container(
    command: Command, image: str, entry: list[Word], rest: list[Word], depth: int
) -> list[Word] | None:
    """Return the arguments of the server that a container starts: by its command, or by the image itself."""
    words = [*entry, *rest]
    if words and (entry or not words[0].text.startswith("-")):
        name = PurePosixPath(words[0].text).name
        table = load_yaml("commands.yml")
        known = name in (*table["wrappers"], *table["runners"], "vllm", "bash", "sh", "zsh", "dash", "ash")
        if known or assignment(words[0]) or re.fullmatch(r"python[0-9.]*", name):
            return _unwrapped(command, words, depth + 1)
        if name == "serve":  # of images whose entry point is vllm
            return words[1:]
        if entry:
            return None
    if "vllm" in image.lower() or not image:
        return rest
    return None


def _of_dockerfile(command: Command, text: str) -> list[Word] | None:
    """Return the arguments of the server that ENTRYPOINT and CMD of a Dockerfile start."""
    joined = re.sub(r"\\[ \t]*\r?\n", " ", text)
    words: list[Word] = []
    for keyword, rest in re.findall(r"(?m)^[ \t]*(ENV|ENTRYPOINT|CMD)[ \t]+([^\n]*)$", joined):
        if keyword != "ENV" and rest.startswith("["):
            words += _yaml_words(parse_yaml(rest, "the Dockerfile"), {})
        elif keyword != "ENV":
            words += [Word("sh"), Word("-c"), Word(rest)]
        else:  # ENV A=1 B=2, or ENV A 1
            given = rest if "=" in rest.split(" ", 1)[0] else rest.replace(" ", "=", 1)
            for word in [word for part in commands(given) for word in part]:
                if pair := assignment(word):
                    command.set_variable(pair[0], word)
    return _in_container(command, "", [], words, 0)


def _of_unit(command: Command, unit: Mapping[str, list[str]]) -> list[list[Word] | None]:
    """Return the arguments of each server that a unit of systemd or of podman's Quadlet starts."""
    variables: dict[str, str] = {}
    for line in unit.get("environment", ()):
        for word in [word for words in commands(line) for word in words]:
            if pair := assignment(word):
                variables[pair[0]] = pair[1]
                command.set_variable(pair[0], word)
    for line in unit.get("environmentfile", ()):
        command.notes.append(f"EnvironmentFile {line[:60]} is not read; name its VLLM_ variables here")

    def words_of(key: str) -> list[list[Word]]:
        lines = [line.lstrip("-@:+!") if key == "execstart" else line for line in unit.get(key, ())]
        return [[word for part in commands(line, variables) for word in part] for line in lines]

    image = (unit.get("image") or [""])[-1]
    if not image:
        return [_unwrapped(command, words, 0) for words in words_of("execstart")]
    for line in unit.get("adddevice", ()):
        _take_container_flag(command, "--device", Word(line))
    for words in words_of("podmanargs"):
        while words:
            flag, value, words = _container_flag(words)
            _take_container_flag(command, flag, value)
    _take_image(command, Word(image))
    entry = [word for words in words_of("entrypoint")[-1:] for word in words]
    return [_in_container(command, image, entry, words, 0) for words in words_of("exec")[-1:] or [[]]]


def _is_yaml(text: str) -> bool:
    """Tell whether a text is a compose file, a Kubernetes object or a part of one, and no shell command."""
    keys = re.search(
        r"(?m)^[ \t]*(- )?(services|containers|apiVersion|command|args|image|modelURL|modelSpec)\s*:(\s|$)",
        text,
    )
    return bool(keys) or bool(re.match(r"\s*(-\s+[\"']?-|\[\s*[\"']|\{\s*\")", text))


def _of_yaml(command: Command, text: str) -> list[list[Word] | None]:
    """Return the arguments of each server in a YAML text."""
    found: list[list[Word] | None] = []
    for part in re.split(r"(?m)^---.*$", text)[:50]:
        value = parse_yaml(part, "the YAML text")
        if isinstance(value, list):
            found.append(_in_container(command, "", [], _yaml_words(value, {}), 0))
            continue
        for container in _containers(value):
            one = Command()
            arguments = _of_container(one, container)
            if arguments is not None:
                found.append(arguments)
                command.__dict__.update(one.__dict__)
    return found


def _containers(value: Any) -> list[dict[str, Any]]:
    """Return the dictionaries of a YAML text that describe a container, or a model of vLLM's Helm chart.

    An extension of a compose file, `x-…`, describes none: services take their keys from it.
    """
    found, level = [], [value]
    while level:
        one = level.pop()
        if isinstance(one, dict):
            if "modelURL" in one or "command" in one or "args" in one or "image" in one:
                found.append(_with_image(one))
            else:
                level += [v for key, v in one.items() if not str(key).startswith("x-")]
        elif isinstance(one, list):
            level += one
    return found


def _with_image(container: dict[str, Any]) -> dict[str, Any]:
    """Return a container whose image is a text. Values of a chart name its parts and may hold the command."""
    image = container.get("image")
    if not isinstance(image, dict):
        return container
    named = f"{image.get('repository', '')}:{image.get('tag', '')}"
    kept = {key: image[key] for key in ("command", "args") if key in image}
    return {"resources": {}, **container, **kept, "image": named}


def _of_model_spec(command: Command, spec: Mapping[str, Any]) -> list[Word]:
    """Return the arguments that the Helm chart of vLLM's production stack makes of a `modelSpec`."""
    _take_image(command, Word(f"{spec.get('repository', '')}:{spec.get('tag', '')}"))
    count = str(spec.get("requestGPU", ""))
    if count.isdecimal() and 0 < len(count) < 4:
        command.set_cards(int(count), f"requestGPU: {count}")
    settings_of = spec.get("vllmConfig")
    words = _yaml_words([spec["modelURL"]], {})
    for key, value in settings_of.items() if isinstance(settings_of, dict) else ():
        flag = "--" + re.sub(r"[A-Z]", lambda m: "-" + m[0].lower(), str(key))
        if key == "extraArgs":
            words += _yaml_words(value, {})
        elif value is True:
            words.append(Word(flag))
        elif value is False and flag.startswith("--enable"):
            words.append(Word(flag.replace("--", "--no-", 1)))
        elif value is not False and key not in ("v0", "v1"):  # of the chart, not of the engine
            words += [Word(flag), *_yaml_words([value], {})]
    return words


def _of_container(command: Command, container: Mapping[str, Any]) -> list[Word] | None:
    """Return the arguments of the server of a compose service or a Kubernetes container."""
    if "modelURL" in container:
        return _of_model_spec(command, container)
    variables = dict(_yaml_environment(container))
    image = str(container.get("image") or "")
    kubernetes = "args" in container or "resources" in container or isinstance(container.get("env"), list)
    entry = container.get("command") if kubernetes else container.get("entrypoint")
    rest = container.get("args") if kubernetes else container.get("command")
    first, words = _yaml_words(entry, variables), _yaml_words(rest, variables)
    if kubernetes and not words and first and first[0].text.startswith("-"):
        first, words = [], first
    if container.get("env_file") or container.get("envFrom"):
        command.notes.append("the container's file of variables is not read; name its VLLM_ variables here")
    for name, value in variables.items():
        command.set_variable(name, Word(f"{name}={value}"))
    _yaml_cards(command, container)
    if image:
        _take_image(command, Word(image))
    return _in_container(command, image, first, words, 0)


def _yaml_environment(container: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the variables of a container that have a value."""
    given = container.get("environment") or container.get("env") or {}
    if isinstance(given, dict):
        return [(str(k), str(v)) for k, v in given.items() if isinstance(v, Scalar) and not _refers(v)]
    pairs = []
    for one in given if isinstance(given, list) else ():
        if isinstance(one, dict) and "name" in one and isinstance(one.get("value"), Scalar):
            pairs.append((str(one["name"]), str(one["value"])))
        elif isinstance(one, str) and "=" in one and not _refers(one):
            name, _, value = one.partition("=")
            pairs.append((name, value))
    return pairs


def _refers(value: object) -> bool:
    return "$" in str(value)


def _yaml_words(value: Any, variables: Mapping[str, str]) -> list[Word]:
    """Return the words of a command of YAML: a text, or a list of words."""
    if value is None:
        return []
    if isinstance(value, str):
        return [word for words in commands(_plain(value), dict(variables)) for word in words]
    if not isinstance(value, list):
        raise BadInput(f"a command of the YAML text is {str(value)[:40]!r}; write a list of words or a text")
    words = []
    for one in value:
        if isinstance(one, dict | list):  # `- --flag: value` is a mapping, and people mean two words
            kind = "mapping" if isinstance(one, dict) else "list"
            raise BadInput(f"a word of the YAML text is a {kind}, {str(one)[:60]}; write it in quotes")
        text = str(one).lower() if isinstance(one, bool) else str(one)
        known = re.sub(r"\$[({]([A-Za-z_]\w*)[)}]", lambda m: variables.get(m[1], m[0]), text)
        default = re.sub(r"\$\{[A-Za-z_]\w*:?-([^{}]*)\}", r"\1", known).replace("$$", "$")
        unknown = tuple(re.findall(r"\$\{\w+[^}]*\}|\$\(\w+\)|\$[A-Za-z_]\w*", default))
        script = "\n" in default or " " in default
        words.append(Word(default, () if script else unknown))
    return words


def _plain(text: str) -> str:
    """Return the text of a folded YAML command as one line, unless a shell is to see its lines."""
    return text if re.search(r"\\\s*\n|&&|;", text) else " ".join(text.split("\n"))


def _yaml_cards(command: Command, container: Mapping[str, Any]) -> None:
    """Read the number of cards that a container is given."""
    resources = container.get("resources")
    for kind in ("limits", "requests"):
        wanted = resources.get(kind) if isinstance(resources, dict) else None
        count = str(wanted.get("nvidia.com/gpu", "")) if isinstance(wanted, dict) else ""
        if count.isdecimal() and 0 < len(count) < 4:
            command.set_cards(int(count), f"nvidia.com/gpu: {count}")
    gpus = container.get("gpus")
    if isinstance(gpus, int) and 0 < gpus < 1000:
        command.set_cards(gpus, f"gpus: {gpus}")
    level: list[Any] = [one for one in (container.get("deploy"), gpus) if isinstance(one, dict | list)]
    for _ in range(5):  # deploy.resources.reservations.devices
        level = [v for one in level for v in (one.values() if isinstance(one, dict) else one)
                 if isinstance(v, dict | list)]  # fmt: skip
        for one in level:
            if isinstance(one, dict) and ("device_ids" in one or "count" in one):
                ids, number = one.get("device_ids"), str(one.get("count", ""))
                if isinstance(ids, list):
                    command.set_cards(len(ids), f"device_ids: {len(ids)}")
                elif number.isdecimal() and len(number) < 4:
                    command.set_cards(int(number), f"count: {number}")
