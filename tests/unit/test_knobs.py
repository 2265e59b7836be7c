"""The knob table against vLLM 0.32.0: its list of flags always, its own parser where an engine environment
exists.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from lowmem.data import load_yaml
from lowmem.errors import BadInput
from lowmem.inputs import profiles
from lowmem.plan.engine_config import graph_sizes
from lowmem.plan.knobs import checked, flag_of, parse_assignments, tokens_of
from lowmem.plan.planner import make_plan
from lowmem.plan.request import PlanRequest
from lowmem.plan.support import missing_flags
from lowmem.schema import Knob
from lowmem.units import parse_bytes

ROOT = Path(__file__).parents[2]
FLAGS = set(
    (ROOT / "tests" / "data" / "vllm_0.32_flags.txt").read_text().split()
)  # `vllm serve --help=all` of 0.32.0
TABLE = load_yaml("knobs.yml")
GONE = [n for n, spec in TABLE.items() if spec.get("never") or "removed" in spec]


def engine_python() -> Path | None:
    """The Python of a vLLM environment: $LOWMEM_ENGINE_PYTHON, or the one that the demo built."""
    if named := os.environ.get("LOWMEM_ENGINE_PYTHON"):
        return Path(named)
    return next(iter(sorted((ROOT / ".lowmem" / "host" / "envs").glob("vllm-*/bin/python"))), None)


@pytest.mark.parametrize("name", [n for n in TABLE if n not in GONE])
def test_the_pinned_version_has_the_flag(name):
    assert flag_of(name) in FLAGS
    if TABLE[name].get("negation"):
        assert "--no-" + name.replace("_", "-") in FLAGS


@pytest.mark.parametrize("name", GONE)
def test_the_pinned_version_no_longer_has_the_flag(name):
    assert flag_of(name) not in FLAGS


@pytest.mark.engine
def test_every_profile_is_accepted_by_the_engines_own_parser():
    python = engine_python()
    if python is None:
        pytest.skip("no vLLM environment; `make demo` builds one, $LOWMEM_ENGINE_PYTHON names another")
    wanted = {name: make_plan(PlanRequest(name, search=False)).argv for name in profiles.names()}
    wanted["two_hosts, second host"] = make_plan(PlanRequest("two_hosts", search=False)).nodes[1].argv
    prefetch = {
        "cpu_offload_gb": 0,
        "offload_group_size": 16,
        "offload_num_in_group": 9,
        "offload_params": "gate_up_proj down_proj",
    }
    wanted["prefetch"] = make_plan(PlanRequest("offload", overrides=prefetch, search=False)).argv
    wanted["graphs"] = make_plan(
        PlanRequest(
            "low_latency",
            overrides={"cudagraph_capture_sizes": "1 2 4 8", "enable_prefix_caching": False},
            search=False,
        )
    ).argv
    script = (
        "import json, sys\nfrom vllm.entrypoints.launchers.cli_args import make_arg_parser\nfrom"
        " vllm.utils.argparse_utils import FlexibleArgumentParser\nparser ="
        " make_arg_parser(FlexibleArgumentParser(prog='vllm serve'))\nout = {}\nfor name, argv in"
        " json.load(sys.stdin).items():\n    try:\n        a = parser.parse_args(argv)\n        out[name] ="
        " [a.model_tag, a.kv_cache_memory_bytes, a.max_model_len, a.cudagraph_capture_sizes]\n    except"
        " SystemExit:\n        out[name] = 'refused'\nprint('\\n' + json.dumps(out))\n"
    )
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    done = subprocess.run(
        [python, "-c", script],
        input=json.dumps(wanted),
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result.pop("article") == "refused"
    assert "unrecognized arguments: --max-batch-size 2 --swap-space 20" in done.stderr
    assert "refused" not in result.values(), done.stderr
    plan = make_plan(PlanRequest("low_mem", search=False))
    assert result["low_mem"] == ["llama-2-70b-compressed-tensors", plan.per_gpu["kv_cache"], 2048, None]
    assert result["graphs"][3] == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("256M", 268435456),
        ("1g", 10**9),
        ("1G", 2**30),
        ("1.5GiB", 3 * 2**29),
        ("20GB", 20 * 10**9),
        ("123", 123),
        (7, 7),
        ("2 GiB", 2**31),
    ],
)
def test_sizes(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GiB", "1 gib", "-1G", "1,5G", "0x10", "1e9"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("name", "value", "tokens"),
    [
        ("enforce_eager", True, ["--enforce-eager"]),
        ("enforce_eager", False, []),
        ("enable_prefix_caching", False, ["--no-enable-prefix-caching"]),
        ("cpu_offload_gb", 19.0, ["--cpu-offload-gb", "19"]),
        ("gpu_memory_utilization", 0.45, ["--gpu-memory-utilization", "0.45"]),
        ("cudagraph_capture_sizes", "1 2 4", ["--cudagraph-capture-sizes", "1", "2", "4"]),
    ],
)
def test_tokens(name, value, tokens):
    assert tokens_of(name, value) == tokens


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("max-num-seqs=8", "max_num_seqs", "8"),
        ("--max-num-seqs=8", "max_num_seqs", "8"),
        ("a=b=c", "a", "b=c"),
    ],
)
def test_assignments(text, name, value):
    assert parse_assignments([text]) == {name: value}


@pytest.mark.parametrize("texts", [["max_num_seqs"], ["=8"], ["a=1", "a=2"]])
def test_bad_assignments(texts):
    with pytest.raises(BadInput):
        parse_assignments(texts)


def test_flags_come_and_go_with_versions():
    assert missing_flags({"swap_space": Knob(value=20, why="")}, (0, 17, 0)) == []
    assert missing_flags({"swap_space": Knob(value=20, why="")}, (0, 18, 0))[0].startswith(
        "unrecognized arguments: --swap-space: removed in vLLM 0.18"
    )
    assert missing_flags({"offload_group_size": Knob(value=2, why="")}, (0, 17, 0)) == []


def test_sizes_are_whole_and_typed():
    assert checked("kv_cache_memory_bytes", "auto") == "auto"
    assert checked("max_num_seqs", 8.0) == 8
    assert checked("cudagraph_capture_sizes", "1,2,4") == "1 2 4"


def test_default_graph_sizes_are_the_engines():
    assert graph_sizes(8, 512, None, None) == (1, 2, 4, 8, 16)
    assert len(graph_sizes(256, 8192, None, None)) == 51
    assert graph_sizes(8, 512, "4 1", None) == (1, 4)
