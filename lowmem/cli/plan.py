"""Defines the command `lowmem plan`, whose exit status is the plan's verdict."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from lowmem.cli.options import ModelName, SearchedProfile, complete_device, limit_bytes
from lowmem.cli.pasted import check_flags, profile_of_command, read_command
from lowmem.errors import BadInput, EngineRefuses
from lowmem.inputs.links import load_link
from lowmem.inputs.profiles import load_profile
from lowmem.plan.calibration import read_calibration
from lowmem.plan.goals import DEFAULT_PROFILE
from lowmem.plan.knobs import parse_assignments
from lowmem.plan.planner import make_plan
from lowmem.plan.request import PlanRequest
from lowmem.schema import VLLM_VERSION, Deploy
from lowmem.text import visible, visible_json

EXIT = {"fits": 0, "slow": 3, "impossible": 2}


def plan(
    command: Annotated[
        list[str] | None, typer.Argument(help="-- vllm serve …: plan this command; - is stdin")
    ] = None,
    command_file: Annotated[
        str | None,
        typer.Option("--command", help="file with a command to plan, or a compose file; - is stdin"),
    ] = None,
    as_profile: Annotated[
        str | None, typer.Option(help="write the profile of the command to this YAML file")
    ] = None,
    only_flags: Annotated[
        bool, typer.Option("--check-flags", help="check the flags of the command; needs no model")
    ] = False,
    profile: SearchedProfile = None,
    model: ModelName = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="stored, or quantized first: profile (as it says) or a format such as awq-4bit; default:"
            " stored for a directory or Hugging Face id"
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="name in the device table, auto, custom:24GiB,936GB/s,71TFLOPS,sm_86 or a YAML file;"
            " default: the profile's",
            autocompletion=complete_device,
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(help="cards on each host; default: the profile's, one of a --device in a search"),
    ] = None,
    hosts: Annotated[
        int | None, typer.Option(help="hosts that one server spans; default: the profile's")
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(help="link between the hosts, a name in the link table; default: the profile's"),
    ] = None,
    network_gb_per_s: Annotated[
        float | None, typer.Option(help="measured bandwidth of that link, one direction")
    ] = None,
    network_round_trip_us: Annotated[
        float | None, typer.Option(help="measured round trip of that link")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="knob=value, as often as needed")] = None,
    env: Annotated[
        list[str] | None,
        typer.Option("--env", help="NAME=value of the service's environment, as often as needed"),
    ] = None,
    clients: Annotated[int | None, typer.Option(help="closed-loop clients of the load")] = None,
    input_tokens: Annotated[int | None, typer.Option(help="tokens of a prompt")] = None,
    output_tokens: Annotated[int | None, typer.Option(help="tokens of an answer")] = None,
    accepted_tokens: Annotated[
        float | None,
        typer.Option(help="with drafts: mean tokens that a step gives, on your text"),
    ] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(help="per card, e.g. 20GiB; default: the profile's, the whole card in a search"),
    ] = None,
    tpot_ms: Annotated[
        float | None, typer.Option(help="limit of a token, ms; default: the profile's, 200 in a search")
    ] = None,
    ttft_ms: Annotated[
        float | None,
        typer.Option(help="limit of the first token, ms; default: the profile's, none in a search"),
    ] = None,
    maximize: Annotated[
        str | None, typer.Option(help="requests, context or throughput: as much of it as the limits allow")
    ] = None,
    vllm_version: Annotated[str, typer.Option(help="version the plan is for")] = VLLM_VERSION,
    calibration: Annotated[
        Path | None, typer.Option(help="constants of your hosts, as `lowmem calibrate` writes them")
    ] = None,
    model_path: Annotated[
        str | None, typer.Option(help="checkpoint on the host, for a deployment's arguments")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="name clients ask for")] = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on")] = 8000,
    node: Annotated[
        list[str] | None,
        typer.Option(help="address of a host of a multi-host server; once for each host, in order"),
    ] = None,
    interface: Annotated[
        str, typer.Option(help="network interface that joins the hosts, the same on each")
    ] = "",
    suggest: Annotated[
        bool, typer.Option("--suggest", help="list the options that meet the limits, best first")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Say whether a model fits, and how fast it will be."""
    pasted = read_command(command, command_file)
    if pasted is None and (as_profile is not None or only_flags):
        raise BadInput("--as-profile and --check-flags need a command: lowmem plan -- vllm serve MODEL …")
    if pasted is not None and only_flags:
        check_flags(pasted)
    deploy = None
    if model_path is not None or served_model_name is not None:
        path = model_path or model or profile or DEFAULT_PROFILE
        deploy = Deploy(
            model_path=path,
            served_model_name=served_model_name or path.rstrip("/").rsplit("/", 1)[-1],
            host=host,
            port=port,
            nodes=tuple(node or ()),
            interface=interface,
        )
    elif node or interface:
        raise BadInput("--node and --interface describe a deployment: give --model-path too")
    searched = profile is None and pasted is None and (model is not None or maximize is not None)
    named = network or (None if searched or pasted else load_profile(profile or DEFAULT_PROFILE).network)
    if named is None and (network_gb_per_s is not None or network_round_trip_us is not None):
        raise BadInput(
            "--network-gb-per-s and --network-round-trip-us need --network, which names the kind of link"
        )
    base = profile or DEFAULT_PROFILE
    request = PlanRequest(
        profile_of_command(pasted, base, device, model, as_profile, hosts, network) if pasted else base,
        model,
        device,
        count,
        parse_assignments(set_ or []),
        deploy,
        clients=clients,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        accepted_tokens=accepted_tokens,
        memory_limit_bytes=limit_bytes(memory_limit),
        tpot_p99_ms=tpot_ms,
        ttft_p99_ms=ttft_ms,
        environment={k: str(v) for k, v in parse_assignments(env or [], "--env").items()},
        vllm_version=vllm_version,
        hosts=hosts,
        network=load_link(named, network_gb_per_s, network_round_trip_us) if named else None,
        weights="stored" if pasted and weights is None else weights,
        calibration=read_calibration(calibration) if calibration else None,
    )
    with _refusal_as_verdict(json_):
        if searched or suggest or maximize:
            goals = importlib.import_module("lowmem.cli.goals")
            raise typer.Exit(goals.answer(request, searched, suggest, maximize, json_))
        result = make_plan(request)
    if json_:
        sys.stdout.write(visible_json(result.model_dump_json(indent=2)) + "\n")
    else:
        from lowmem.plan.render import show_plan

        show_plan(result)
    raise typer.Exit(EXIT[result.verdict])


@contextmanager
def _refusal_as_verdict(as_json: bool) -> Iterator[None]:
    """Print the reason for which the engine refuses a checkpoint, and exit as for an impossible plan."""
    try:
        yield
    except EngineRefuses as refusal:
        said = {"verdict": "impossible", "reasons": [str(refusal)]}
        text = (
            visible_json(json.dumps(said, indent=2)) if as_json else f"impossible\n  {visible(str(refusal))}"
        )
        sys.stdout.write(f"{text}\n")
        raise typer.Exit(EXIT["impossible"]) from None
