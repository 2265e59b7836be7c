"""The command as other tools call it: exit codes, one JSON object, one line on stderr."""

import json
import re

import pytest

from .command import lowmem


@pytest.mark.parametrize(
    ("words", "code", "verdict"),
    [
        (
            ("--profile", "low_mem", "--model", "llama-2-70b", "--device", "a100-40g", "--count", "2"),
            0,
            "fits",
        ),
        (("--profile", "offload"), 3, "slow"),
        (("--profile", "article"), 2, "impossible"),
        (("--profile", "low_latency", "--set", "gpu_memory_utilization=0.45"), 2, "impossible"),
    ],
)
def test_exit_code_and_one_json_object(words, code, verdict):
    done = lowmem("plan", *words, "--json")
    assert (done.returncode, done.stderr) == (code, "")
    assert json.loads(done.stdout)["verdict"] == verdict


@pytest.mark.parametrize(
    "words",
    [
        ("--profile", "nope"),
        ("--count", "two"),
        ("--nonsense",),
        ("--set", "max_num_seqs"),
        ("--model", "no/such-model-here"),
        ("--memory-limit", "20 gallons"),
        ("--env", "A"),
    ],
)
def test_bad_input_exits_1_with_one_line(words):
    done = lowmem("plan", *words, "--json")
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("lowmem: ")


def test_human_output_has_a_bar_per_term_and_the_command():
    done = lowmem("plan", "--profile", "low_mem")
    assert done.returncode == 0
    for word in (
        "fits",
        "weights",
        "kv_cache",
        "nccl",
        "peak under load",
        "█",
        "vllm serve llama-2-70b-compressed-tensors",
        "--kv-cache-memory-bytes",
    ):
        assert word in done.stdout


def test_explain_quotes_measurements_of_variables_and_of_flags_that_are_not_set():
    shown = lowmem("explain", "low_mem").stdout
    assert "NCCL_MAX_NCHANNELS=2" in shown
    assert "measured: H100, 2026-11-26: without it 20,884 MiB under load" in shown
    assert (
        shown.index("left as the engine has them:")
        < shown.index("--enforce-eager")
        < shown.index("--disable-custom-all-reduce")
    )
    assert "left as the engine" not in lowmem("explain", "long_context").stdout


def test_deployment_arguments():
    done = lowmem(
        "plan",
        "--profile",
        "demo_cpu",
        "--model-path",
        "/srv/m",
        "--served-model-name",
        "demo",
        "--port",
        "8012",
        "--json",
    )
    argv = json.loads(done.stdout)["argv"]
    assert argv[:7] == ["/srv/m", "--served-model-name", "demo", "--host", "127.0.0.1", "--port", "8012"]


def test_suggest_lists_only_what_fits():
    done = lowmem("plan", "--suggest", "--count", "2", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0
    assert {o["plan"]["verdict"] for o in found} == {"fits"}
    assert any(o["weights"] == "4-bit" for o in found)
    assert not any(o["weights"] == "16-bit" for o in found)


def test_suggest_says_when_nothing_fits():
    done = lowmem("plan", "--suggest", "--profile", "article", "--memory-limit", "8GiB")
    assert done.returncode == 2
    assert "no setting of llama-2-70b" in done.stdout


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_frontier_draws(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    out = tmp_path / f"f.{suffix}"
    done = lowmem("frontier", "--out", str(out))
    assert done.returncode == 0, done.stderr
    head = out.read_bytes()[:300]
    assert head.startswith(b"\x89PNG") or b"<?xml" in head
    assert "on the frontier of their weight width" in done.stdout
    if suffix == "svg":
        drawn = out.read_text()
        # a hollow mark is transparent: what lies under it shows
        assert len(re.findall(r"fill: none; stroke: #[0-9a-f]{6}; stroke-width: 1.2", drawn)) > 0
        assert re.findall(r"fill: #ffffff; stroke: #[0-9a-f]{6}; stroke-width: 1.2", drawn) == []


def test_frontier_refuses_other_suffixes(tmp_path):
    done = lowmem("frontier", "--out", str(tmp_path / "f.gif"))
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)


def test_explain_names_every_flag_with_its_reason():
    done = lowmem("explain", "low_mem")
    assert done.returncode == 0
    for word in (
        "--tensor-parallel-size 2",
        "half of each layer on each card",
        "MiB a card under load",
        "ms a token",
        "--kv-cache-memory-bytes",
    ):
        assert word in done.stdout


def test_check_article_computes():
    done = lowmem("check-article", "--json")
    found = json.loads(done.stdout)
    assert "36.6 GB" in found[0]["truth"]
    assert "690 TFLOP/s on a card of 312" in found[1]["truth"]
    assert all(c["holds"] in ("no", "barely", "harmful") for c in found[:-1])
    assert found[-1]["holds"] == "by plan"
