"""low_mem.sh is the plan's arguments and no more, and the installed vLLM takes them."""

from __future__ import annotations

import json
import shlex
from typing import Any

from lowmem.schema import Plan

PARSE = r"""
import sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser
arguments = make_arg_parser(FlexibleArgumentParser(prog="vllm serve")).parse_args(sys.argv[1:])
validate_parsed_serve_args(arguments)
"""


def rendered_argv(deployment: Any) -> list[str]:
    """What the launcher hands to vLLM, told by running it with a stand-in that prints its arguments."""
    python, launcher = f"{deployment.environment}/bin/python", deployment.path("etc/low_mem.sh")
    script = (
        'set -eu; folder=$(mktemp -d); trap \'rm -rf "$folder"\' EXIT; cd "$folder";'
        ' echo "import json, sys; print(json.dumps(sys.argv[1:]))" >serve;'
        f" VLLM_BIN={shlex.quote(python)} {shlex.quote(launcher)}"
    )
    words: list[str] = json.loads(deployment.host.check_output("bash -c %s", script))
    return words


def test_bash_takes_the_launcher(deployment: Any) -> None:
    done = deployment.host.run("bash -n %s", deployment.path("etc/low_mem.sh"))
    assert (done.rc, done.stderr) == (0, "")


def test_arguments_are_the_plans(deployment: Any, plan: Plan) -> None:
    assert rendered_argv(deployment) == plan.argv


def test_the_installed_vllm_takes_the_arguments(deployment: Any, plan: Plan) -> None:
    environment = "TORCHDYNAMO_DISABLE=1 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1"
    words = shlex.join([f"{deployment.environment}/bin/python", "-c", PARSE, *plan.argv])
    done = deployment.host.run(f"env {environment} {words}")
    assert done.rc == 0, done.stderr.strip().splitlines()[-1]


def test_the_running_process_has_the_plans_arguments(deployment: Any, plan: Plan) -> None:
    argv = next(p["argv"] for p in deployment.processes()["processes"] if p["main"])
    assert argv[argv.index("serve") + 1 :] == plan.argv
