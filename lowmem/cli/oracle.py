"""Defines the command `lowmem oracle`, which runs in the engine's environment."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from lowmem.artefacts import read_plan
from lowmem.errors import BadInput
from lowmem.files import JSON_LIMIT_BYTES, parse_json
from lowmem.inputs.devices import load_device
from lowmem.oracle.compare import Term, problem, terms
from lowmem.oracle.question import (
    CONFIG_FILES,
    Answer,
    Question,
    Record,
    card_of,
    question_of,
    question_of_plan,
    read_record,
    write_record,
)
from lowmem.schema import Device, Plan
from lowmem.text import visible, visible_json


def oracle(
    model: Annotated[
        Path,
        typer.Argument(
            allow_dash=True,
            help="directory with config.json; weights need not be there. -: one JSON object on stdin, of"
            " files by name; its plan.json is the plan",
        ),
    ],
    against: Annotated[Path | None, typer.Option(help="plan.json to compare with; its settings hold")] = None,
    device: Annotated[
        str, typer.Option(help="name in the device table; auto: the plan's, or this machine's")
    ] = "auto",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="without a plan: knob=value, as often as needed")
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="write question and answer here, e.g. as a fixture")
    ] = None,
    reuse: Annotated[
        bool, typer.Option("--reuse", help="take the answer from --record if it is of the same question")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Ask vLLM's own classes for bytes and KV blocks.

    It needs no weights and no memory of a card, but the engine's environment.
    """
    if reuse and record is None:
        raise BadInput("--reuse needs --record, the file with the answer")
    with _checkpoint(model) as folder:
        if folder != model and (folder / "plan.json").exists():
            against = folder / "plan.json"
        plan = read_plan(against) if against else None
        if plan and set_:
            raise BadInput("--set and --against exclude each other: the settings are the plan's")
        if plan:
            question = question_of_plan(folder, plan, _device_of(plan, device))
        else:
            question = question_of(folder, words_of(set_ or []), {}, card_of(load_device(device), 1024))
        answer = _asked(folder, question, record, reuse)
    compared = terms(plan, answer) if plan else []
    differ = [term for term in compared if not term.agrees]
    if json_:
        rows = [
            {"term": t.name, "planned": t.planned, "engine": t.engine, "agrees": t.agrees} for t in compared
        ]
        said = {"answer": answer.model_dump(mode="json"), "terms": rows}
        sys.stdout.write(visible_json(json.dumps(said, indent=1)) + "\n")
    else:
        sys.stdout.write(visible("\n".join(_lines(answer, compared))) + "\n")
    for term in differ:
        sys.stderr.write(f"oracle: {problem(term)}\n")
    raise typer.Exit(2 if differ else 0)


def _device_of(plan: Plan, named: str) -> Device | None:
    """Return the device that is named, else the plan's; None for one that is not in the table."""
    if named != "auto":
        return load_device(named)
    with contextlib.suppress(BadInput):
        return load_device(plan.device)
    return None


@contextlib.contextmanager
def _checkpoint(model: Path) -> Iterator[Path]:
    """Give the directory of the checkpoint; for `-` one of the files that stdin names."""
    if str(model) != "-":
        yield model
        return
    files = parse_json(sys.stdin.buffer.read(JSON_LIMIT_BYTES + 1)[:JSON_LIMIT_BYTES], "stdin")
    known = (*CONFIG_FILES, "plan.json")
    if not isinstance(files, dict) or not all(n in known and isinstance(f, dict) for n, f in files.items()):
        raise BadInput(f"stdin is no JSON object of files; it may hold {', '.join(known)}, each an object")
    with tempfile.TemporaryDirectory(prefix="lowmem-oracle-") as folder:
        for name, content in files.items():
            (Path(folder) / name).write_text(json.dumps(content), encoding="utf-8")
        yield Path(folder)


def _asked(model: Path, question: Question, record: Path | None, reuse: bool) -> Answer:
    if record and reuse and record.exists():
        kept = read_record(record)
        if kept.question == question:
            return kept.answer
    from lowmem.oracle.engine import ask

    answer = ask(model, question)
    if record:
        write_record(record, Record(question=question, answer=answer))
    return answer


def words_of(assignments: list[str]) -> tuple[str, ...]:
    """Write knobs as arguments of `vllm serve`. Raises BadInput for one that the plan refuses too."""
    from lowmem.plan.knobs import checked_all, parse_assignments, tokens_of

    given = checked_all(parse_assignments(assignments))
    return tuple(word for name, value in given.items() for word in tokens_of(name, value))


_WAYS = {
    "card": "on this machine's card",
    "stubs": "as on the card, with stubs for NVML and CUDA",
    "cpu": "on this machine's CPU",
}


def _lines(answer: Answer, compared: list[Term]) -> list[str]:
    lines = [
        f"{answer.architecture} in {answer.dtype}, vLLM {answer.vllm}, {_WAYS[answer.way]}",
        f"parameters {answer.parameter_bytes:,} bytes, buffers {answer.buffer_bytes:,} bytes on one GPU",
    ]
    cache = answer.kv_cache
    if cache is None:
        lines.append("no KV cache")
    else:
        lines.append(
            f"KV cache: {cache.bytes_per_block:,} bytes a block; a request of max_model_len holds"
            f" {cache.blocks_per_request} blocks, {cache.bytes_per_request:,} bytes"
        )
        lines += [
            f"  {g.spec}: {g.layers} layers, {g.block_tokens} tokens and {g.page_bytes:,} bytes a block"
            for g in cache.groups
        ]
    for term in compared:
        verdict = "agrees" if term.agrees else "differs"
        lines.append(f"{term.name}: planned {term.planned:,}, vLLM {term.engine:,}: {verdict}")
    return lines
