"""What asks for code of its own, and what only brings some that the engine leaves aside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lowmem.checkpoint import own_code
from lowmem.cli.main import app
from lowmem.errors import BadInput
from lowmem.inputs.model_cards import card_from_config
from lowmem.plan.knobs import checked
from lowmem.plan.planner import make_plan
from lowmem.plan.request import PlanRequest
from lowmem.service.start_check import unsafe_content

MAP = {"AutoConfig": "configuration_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.Evil"}
EVIL = "'configuration_evil.EvilConfig'"
CONFIG = "config.json: model_type {} needs the code {} of auto_map, and no code of a checkpoint is ever run"
TOKENIZER = "tokenizer_config.json: tokenizer_class {} needs the code {} of auto_map, and no code"


@pytest.mark.parametrize(
    ("config", "tokenizer", "said"),
    [
        ({"model_type": "evil", "auto_map": MAP}, {}, CONFIG.format("'evil'", EVIL)),
        ({"auto_map": MAP}, {}, CONFIG.format("None", EVIL)),
        (
            {"model_type": "\x1b[2J", "auto_map": {"AutoConfig": "else/where--a.B"}},
            {},
            CONFIG.format(r"'\x1b[2J'", "'else/where--a.B'"),
        ),
        ({"model_type": "evil", "auto_map": "AutoConfig"}, {}, CONFIG.format("'evil'", "'AutoConfig'")),
        (
            {"model_type": "kimi_k2"},
            {"tokenizer_class": "TikTokenTokenizer", "auto_map": {"AutoTokenizer": ["tok.TikToken", None]}},
            TOKENIZER.format("'TikTokenTokenizer'", "'tok.TikToken'"),
        ),
        (
            {"model_type": "kimi_k2"},
            {"auto_map": ["tok.Slow", "tok.Fast"]},
            TOKENIZER.format("None", "'tok.Slow', 'tok.Fast'"),
        ),
        # what the libraries know by themselves is served, whatever code lies beside it
        ({"model_type": "deepseek_v3", "auto_map": MAP}, {"auto_map": {"AutoTokenizer": ["a.B", None]}}, ""),
        (
            {"model_type": "kimi_k2", "auto_map": MAP},
            {"tokenizer_class": "LlamaTokenizerFast", "auto_map": {"AutoTokenizer": ["a.B", None]}},
            "",
        ),
        ({"model_type": "evil", "auto_map": {"AutoProcessor": "a.B"}}, {"tokenizer_class": "Own"}, ""),
        ({"model_type": ["evil"], "auto_map": None}, {"auto_map": 3, "tokenizer_class": 5}, ""),
    ],
)  # fmt: skip
def test_who_needs_code(config: dict[str, Any], tokenizer: dict[str, Any], said: str) -> None:
    lines = list(own_code.refusals(config, tokenizer, own_code.table()))
    assert [line.startswith(said) for line in lines] == ([True] if said else [])


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A known architecture of an unknown type, with code that leaves a trace when it is run."""
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "evil", "architectures": ["LlamaForCausalLM"], "auto_map": MAP})
    )
    (folder / "configuration_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    return folder


@pytest.mark.fault("hostile-checkpoint")
def test_the_plan_and_the_start_refuse_by_name(evil: Path, fault: Any) -> None:
    said = CONFIG.format("'evil'", EVIL)
    done = CliRunner().invoke(app, ["plan", "--profile", "demo_cpu", "--model", str(evil)])
    assert done.exit_code == 1
    assert done.stderr.startswith(f"lowmem: {evil}: {said}")
    with pytest.raises(BadInput, match="needs the code"):
        card_from_config({"model_type": "evil", "auto_map": MAP}, "m", "owner/name")
    place = {"model_path": str(evil), "served_model_name": "m", "host": "127.0.0.1", "port": 8000}
    plan = make_plan(PlanRequest("demo_cpu", deploy=place))
    lines = unsafe_content(plan)
    assert [line.removeprefix(f"{evil}: ")[: len(said)] for line in lines[:1]] == [said]
    assert lines[1:] == [
        f"{evil}: it has no .safetensors file, and no other format of weights is served: convert it"
    ]
    (evil / "config.json").write_text("[" * 100_000)
    assert unsafe_content(plan)[0] == f"{evil}: config.json cannot be read (RecursionError): bring it again"
    assert not (evil.parent / "ran").exists()
    fault.saw(f"plan, preflight, fetch and start refuse: {lines[0].removeprefix(f'{evil}: ')}; nothing ran")


@pytest.mark.parametrize("value", [True, "true", 1, ""])
def test_no_profile_turns_it_on(value: Any) -> None:
    with pytest.raises(BadInput, match=r"^trust_remote_code=.* is refused: it runs code that comes with a"):
        checked("trust_remote_code", value)
    assert checked("trust_remote_code", "false") is False
