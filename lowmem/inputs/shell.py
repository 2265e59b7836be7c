"""Splits the text of a shell into simple commands, as bash would, and runs nothing.

Variables are known if the text itself sets them. What only a shell could say (another variable, the output of
a command) stays in the word as it was written, and the word names it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from lowmem.errors import BadInput

MOST_CHARACTERS = 65_536
"""Of a text, and of what its variables give."""

MOST_WORDS = 2_000

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(\+?)=")
_ARRAY = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\[[@*]\]\}")
_ARGUMENTS = re.compile(r"\{?[@*]\}?")  # of the script, which is pasted without any
_QUOTED_ARGUMENTS = re.compile(r'"\$(\{[@*]\}|[@*])"')
_BRACED = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*|[0-9])(?::?[-=]([^{}]*)|:?\?[^{}]*)?\}")
_OTHER = re.compile(r"\$(\{[A-Za-z_0-9#!][^{}\n]{0,200}\}|[0-9])")
_CONTINUED = re.compile(r"(\\|[`^](?=[ \t]*\n))[ \t]*\n")
_REDIRECTION = re.compile(r"&?(<<<|>>|>\||<>|[<>])(&[0-9-]?)?")
_PROMPT = re.compile(
    r"""(?mx)^[ \t]*(?:
      (?:\([\w.-]{1,40}\)[ \t]*)?  # of a Python environment
      (?:[\w.-]{1,40}@[\w.-]{1,60}[^\s$\#%]{0,80}(?:[ \t][^\s$\#%]{1,80})?[ \t]?[$\#%]
        |\[[^\]\n]{1,100}\][ \t]?[$\#]|[$%])[ \t]+
      |PS[ \t][^>\n]{0,120}>[ \t]*|[A-Za-z]:\\[^>\n]{0,120}>[ \t]*  # of Windows
      |>+[ \t]+(?=-|vllm\b|python|docker\b)  # of a line that goes on
      |!(?=[A-Za-z])  # of a notebook
    )"""
)
_SETTING = re.compile(
    r"""(?mx)(?:^|(?<=;)|(?<=&))[ \t]*(?:
      \$[Ee][Nn][Vv]:(\w+)[ \t]*=[ \t]*  # PowerShell
      |(?:setenv|set[ \t]+-\w*x\w*)[ \t]+(\w+)[ \t]+  # csh, fish
      |[Ss][Ee][Tt][ \t]+(?=\w+=)  # cmd.exe
    )"""
)
_TYPOGRAPHIC = "\u201c\u201d\u2018\u2019"
_ENDS = ("&&", "||", ";;", "|&", ";", "|", "\n", "(", ")", "&")


@dataclass(frozen=True)
class Word:
    """Word of a command. `unset` names what of it only a running shell could say."""

    text: str
    unset: tuple[str, ...] = ()


@dataclass
class _Reader:
    """Place in the text, and the word that is being read."""

    text: str
    variables: dict[str, str]
    arrays: dict[str, list[Word]] = field(default_factory=dict)
    at: int = 0
    words: list[Word] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    unset: list[str] = field(default_factory=list)
    started: bool = False
    skip: bool = False  # the next word is the file of a redirection
    expanded: int = 0  # characters that variables gave so far

    def end_word(self) -> None:
        """Keep the word that was read, if there is one."""
        if self.started and not self.skip:
            self.words.append(Word("".join(self.parts), tuple(self.unset)))
        if self.started:
            self.skip = False
        self.parts, self.unset, self.started = [], [], False

    def add(self, text: str) -> None:
        self.parts.append(text)
        self.started = True


def commands(text: str, variables: dict[str, str] | None = None) -> Iterator[list[Word]]:
    """Yield the simple commands of a text, in order.

    Raises BadInput for a quote that does not end, a here-document, typographic quotes, or too many words.
    """
    reader = _Reader(_cleaned(text), {} if variables is None else variables)
    count = 0
    while reader.at < len(reader.text):
        if not _step(reader):
            continue
        reader.end_word()
        reader.skip = False
        if reader.words:
            count += len(reader.words)
            if count > MOST_WORDS:
                raise BadInput(f"the command has more than {MOST_WORDS:,} words; paste one command")
            words, reader.words = reader.words, []
            _remember(words, reader.variables)
            yield words


def _cleaned(text: str) -> str:
    """Return the text without the marks of a page that it was copied from."""
    text = text.replace("\r\n", "\n").replace("\xa0", " ").lstrip("\ufeff")
    if "\0" in text:
        raise BadInput("the command holds a NUL character; paste text")
    lines = [line for line in text.split("\n") if not line.lstrip().startswith("```")]
    return _SETTING.sub(_exported, _PROMPT.sub("", "\n".join(lines))) + "\n"


def _exported(setting: re.Match[str]) -> str:
    """Return what a POSIX shell writes for the setting of a variable in another shell."""
    name = setting[1] or setting[2]
    return f"export {name}=" if name else "export "


def _step(reader: _Reader) -> bool:
    """Read on; True at the end of a simple command."""
    text, at = reader.text, reader.at
    char = text[at]
    if continued := _CONTINUED.match(text, at):
        reader.at = continued.end()
    elif char == "\\":
        reader.add(text[at + 1 : at + 2])
        reader.at += 2
    elif arguments := _QUOTED_ARGUMENTS.match(text, at):
        reader.at = arguments.end()
    elif char in "'\"":
        _quoted(reader, char)
    elif char == "`" or char == "$":
        _expansion(reader, quoted=False)
    elif char == "#" and not reader.started:
        reader.at = text.index("\n", at)
    elif char in "<>" or text.startswith("&>", at):
        _redirection(reader)
    elif char == "(" and (name := _ASSIGNMENT.fullmatch("".join(reader.parts))):
        _array(reader, name[1], bool(name[2]))
    elif end := next((e for e in _ENDS if text.startswith(e, at)), ""):
        reader.at += len(end)
        return True
    elif char.isspace():
        reader.end_word()
        reader.at += 1
    elif char in _TYPOGRAPHIC:
        raise BadInput(f"the command has the typographic quote {char}; write \" or ' in its place")
    else:
        reader.add(char)
        reader.at += 1
    return False


def _quoted(reader: _Reader, quote: str) -> None:
    """Read up to the closing quote."""
    reader.add("")
    reader.at += 1
    while reader.at < len(reader.text):
        char = reader.text[reader.at]
        if char == quote:
            reader.at += 1
            return
        if quote == '"' and char == "\\" and reader.text[reader.at + 1] in '"\\$`\n':
            if reader.text[reader.at + 1] != "\n":
                reader.add(reader.text[reader.at + 1])
            reader.at += 2
        elif quote == '"' and char in "$`":
            _expansion(reader, quoted=True)
        else:
            reader.add(char)
            reader.at += 1
    raise BadInput(f"a quote ({quote}) of the command does not end; close it")


def _expansion(reader: _Reader, quoted: bool) -> None:
    """Put in the value of a variable that the text sets; name anything else that a shell would put in."""
    text, at = reader.text, reader.at
    default: str | None = None
    if text[at] == "`":
        end = text.find("`", at + 1) + 1 or len(text)
        name = text[at:end]
    elif text.startswith("$(", at):
        end = _closing(text, at + 1)
        name = text[at:end]
    elif (array := _ARRAY.match(text, at + 1)) and array[1] in reader.arrays:
        reader.at = array.end()
        _add_array(reader, reader.arrays[array[1]])
        return
    elif arguments := _ARGUMENTS.match(text, at + 1):
        reader.at = arguments.end()
        reader.started = bool(reader.parts)  # "$@" of no arguments is no word
        return
    elif braced := _BRACED.match(text, at + 1):
        end, name, default = braced.end(), braced[1], braced[2]
    elif plain := _NAME.match(text, at + 1):
        end, name = plain.end(), plain[0]
    elif other := _OTHER.match(text, at):  # of arrays, or cut from a variable
        end, name = other.end(), other[0]
    elif not quoted and text[at + 1 : at + 2] in ("'", '"'):  # $'…'
        reader.at += 1
        return
    else:  # a dollar sign alone, as of a prompt
        reader.add("$")
        reader.at += 1
        return
    reader.at = end
    value = reader.variables.get(name, default)
    if value is None:
        reader.unset.append(" ".join(name.split())[:60])
        reader.add(text[at:end])
        return
    reader.expanded += len(value)
    if reader.expanded > MOST_CHARACTERS:
        raise BadInput(
            f"the variables of the command give more than {MOST_CHARACTERS:,} characters; write less"
        )
    if quoted:
        reader.add(value)
    else:
        _split(reader, value)


def _array(reader: _Reader, name: str, added: bool) -> None:
    """Keep the words of `NAME=(…)`, or add those of `NAME+=(…)`."""
    end = _closing(reader.text, reader.at)
    inner = reader.text[reader.at + 1 : end - 1]
    if "=(" in inner:
        raise BadInput(f"the array {name[:60]} holds another; write its words")
    words = [w for part in commands(inner.replace("\n", " "), reader.variables) for w in part]
    reader.arrays[name] = [*(reader.arrays.get(name, []) if added else []), *words]
    reader.parts, reader.started, reader.at = [], False, end


def _add_array(reader: _Reader, words: list[Word]) -> None:
    """Add the words of an array, each a word of its own."""
    reader.started = bool(words) or any(reader.parts)  # of no words is none made
    reader.expanded += sum(len(word.text) + 1 for word in words)
    for n, word in enumerate(words):
        if n:
            reader.end_word()
        reader.add(word.text)
        reader.unset += word.unset


def _split(reader: _Reader, value: str) -> None:
    """Add a value outside of quotes, which its spaces split into words."""
    for n, part in enumerate(value.split()):
        if n:
            reader.end_word()
        reader.add(part)


def _closing(text: str, at: int) -> int:
    """Return the place after the bracket that closes the one at `at`."""
    depth = 0
    for place in range(at, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place + 1
    raise BadInput("a bracket of $( does not end; write what it prints in its place")


def _redirection(reader: _Reader) -> None:
    """Pass over a redirection; its file is no word of the command."""
    if reader.text.startswith(("<<", "<("), reader.at) and not reader.text.startswith("<<<", reader.at):
        raise BadInput("the text has a here-document or <(…); paste the command alone")
    if reader.started and "".join(reader.parts).isdigit():
        reader.parts, reader.started = [], False
    reader.end_word()
    match = _REDIRECTION.match(reader.text, reader.at)
    assert match  # noqa: S101 - the caller saw < or >
    reader.at = match.end()
    reader.skip = not (match[2] and len(match[2]) > 1)


def assignment(word: Word) -> tuple[str, str] | None:
    """Return name and value of `NAME=value`; None for another word."""
    match = _ASSIGNMENT.match(word.text)
    return (match[1], word.text[match.end() :]) if match else None


def _remember(words: list[Word], variables: dict[str, str]) -> None:
    """Keep the variables that a command of assignments sets, for the commands after it."""
    rest = words[1:] if words[0].text in ("export", "declare", "set", "readonly", "local") else words
    pairs = [assignment(word) for word in rest]
    if all(pairs) or rest is not words:
        for word, pair in zip(rest, pairs, strict=True):
            if pair and not word.unset:
                added = word.text.startswith(f"{pair[0]}+=")
                variables[pair[0]] = variables.get(pair[0], "") + pair[1] if added else pair[1]
