"""What the command says without a plan: help, version, completion, and what a mistyped word may mean."""

import shutil
import subprocess

import pytest
from typer.testing import CliRunner

import lowmem
from lowmem.cli.main import COMMANDS, EXIT_CODES, app
from lowmem.text import nearest_words


def said(*words, columns=80, **environment):
    return CliRunner().invoke(app, words, prog_name="lowmem", env={"COLUMNS": str(columns)} | environment)


def test_the_version_names_the_engine_too():
    done = said("--version")
    assert (done.exit_code, done.stdout) == (0, f"lowmem {lowmem.__version__}, for vLLM 0.32.0\n")


def test_each_command_says_its_exit_status():
    assert EXIT_CODES.keys() == COMMANDS.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_short_help_is_the_long_one_and_ends_with_the_exit_status(command):
    done = said(command, "-h")
    assert done.exit_code == 0
    assert done.stdout == said(command, "--help").stdout
    assert " ".join(done.stdout.split()).endswith(f"Exit status: {EXIT_CODES[command]}.")
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_each_thing_once_and_in_one_way(command):
    shown = " ".join(said(command, "-h").stdout.split())
    for other in ("Exit 0", "Exit 1", "Exit 2", "(default:", "repeatable", "the same as JSON"):
        assert other not in shown


def test_the_list_of_commands_is_uncut():
    shown = said("-h").stdout
    assert "..." not in shown.split("Commands:")[1]
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("pln",), "there is no command 'pln'; did you mean plan?"),
        (("reciept",), "there is no command 'reciept'; did you mean receipt?"),
        (("xyzzy",), "there is no command 'xyzzy': use one of plan, explain, "),
        (("plan", "--device", "h100-xl"), "use one of h100, h100-nvl, h200-nvl (the nearest)"),
        (("plan", "--model", "lama-3.1-8b"), "did you mean llama-3.1-8b"),
        (("plan", "--model", "meta-llama/Llama-3.1-8B-Instrct"), "did you mean meta-llama/llama-3.1-8b-in"),
        (("plan", "--profile", "low-men"), "did you mean low_mem?"),
    ],
)
def test_a_mistyped_word_is_one_line_with_what_it_may_mean(words, message):
    done = said(*words)
    assert (done.exit_code, done.stdout) == (1, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_model_may_be_named_without_its_owner():
    assert said("plan", "--model", "Llama-3.1-8B-Instruct", "--json").exit_code in (0, 2, 3)


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("pln", ["plan"]),
        ("PLAN_", ["plan"]),
        ("a100", ["a100-40g", "a100-80g"]),
        ("a100-40g-sxm4", ["a100-40g"]),
        ("", []),
        ("x" * 10_000, []),
    ],
)
def test_near_words(word, near):
    assert nearest_words(word, ["plan", "explain", "a100-40g", "a100-80g", "h100"]) == near


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_of_each_shell_is_a_script_that_it_reads(shell):
    script = said(_LOWMEM_COMPLETE=f"source_{shell}").stdout
    assert f"_LOWMEM_COMPLETE=complete_{shell}" in script
    if program := shutil.which(shell):
        subprocess.run([program, "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("lowmem fl", "fleet"),
        ("lowmem plan --sug", "--suggest"),
        ("lowmem plan --device rtx", "rtx-4090"),
        ("lowmem plan --profile low_m", "low_mem"),
        ("lowmem plan --model smol", "smollm2-135m"),
    ],
)
def test_completion_knows_commands_options_and_names(words, expected):
    done = said(_LOWMEM_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(words.count(" ")))
    assert expected in done.stdout.split()


@pytest.mark.parametrize(
    "words",
    [
        ("plan",),
        ("plan", "--profile", "article"),
        ("plan", "--profile", "two_hosts"),
        ("plan", "--profile", "demo_cpu"),
        ("plan", "--profile", "offload_speculative"),
        ("plan", "--suggest", "--count", "2"),
        ("plan", "--model", "llama-3.1-70b", "--device", "l4", "--count", "2"),
        ("plan", "--model", "gpt-oss-20b", "--device", "rtx-4090", "--maximize", "throughput"),
        ("explain", "low_mem"),
        ("explain", "two_hosts"),
        ("capacity",),
        ("check-article",),
        ("fleet", "--qps", "1", "--profile", "low_mem"),
        ("doctor", "--plan", "no/plan.json"),
        ("receipt", "docs/measurements/2026-11-23-2xh200/low_mem-4-channels.json"),
    ],
    ids=" ".join,
)
def test_output_fits_80_columns_uncut(words):
    done = said(*words)
    assert done.exit_code in (0, 2, 3), done.output
    # a quoted word of a command may be longer, such as the JSON of an option
    long = [line for line in done.stdout.splitlines() if len(line) > 80 and "'" not in line]
    assert long == []
    assert "…" not in done.stdout.replace("of which …", "").replace("… 23", "")


def test_frontier_fits_80_columns(tmp_path):
    pytest.importorskip("matplotlib")
    done = said("frontier", "--out", str(tmp_path / "f.png"))
    assert max(map(len, done.stdout.splitlines()[1:])) <= 80


def test_a_pipe_gets_each_sentence_on_one_line(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    shown = CliRunner().invoke(app, ["explain", "low_mem"]).stdout
    assert "one request of this length must fit the KV pool\n" in shown
    assert max(map(len, shown.splitlines())) > 100
