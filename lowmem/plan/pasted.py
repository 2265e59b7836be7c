"""Makes a profile of a pasted command, which is then planned as any other."""

from __future__ import annotations

from lowmem.errors import BadInput
from lowmem.inputs.command import Command
from lowmem.plan.knobs import checked
from lowmem.plan.request import fitting_tokens
from lowmem.schema import Device, Knob, Profile, Quantization
from lowmem.units import MIB
from lowmem.values import kinds

WHY = "of the pasted command"


def profile_of(command: Command, base: Profile, device: Device, model: str | None, name: str) -> Profile:
    """Return a profile that asks vLLM for what the command asks for, and for nothing else.

    Load, latency limits and hosts are those of `base`. The memory limit is the whole card:
    a command has none.
    Raises BadInput if the command names no model, or more cards than it leaves the engine.
    """
    wanted = model or command.model
    if not wanted:
        raise BadInput("the command names no model; name it in the command, or give --model")
    knobs = {key: Knob(value=checked(key, value), why=WHY) for key, value in command.options.items()}
    if refused := kinds.refusal("environment", "environment_name to text", command.environment):
        raise BadInput(refused)
    longest = knobs.get("max_model_len")
    return Profile(
        name=name,
        summary="what a pasted command asks for",
        device=device.name,
        device_count=_cards(command, knobs, base.hosts),
        hosts=base.hosts,
        network=base.network,
        model=wanted,
        quantization=Quantization(),
        limits=base.limits.model_copy(update={"memory_bytes": device.nvml_total_mib * MIB}),
        load=base.load.model_copy(update=fitting_tokens(base.load, longest.value if longest else "auto")),
        knobs=knobs,
        environment={key: Knob(value=value, why=WHY) for key, value in command.environment.items()},
    )


def _cards(command: Command, knobs: dict[str, Knob], hosts: int) -> int:
    """Return the cards of a host: as many as the command leaves the engine, or else as many as it needs."""
    need = 1
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        need *= int(knobs[name].value) if name in knobs else 1
    split = hosts == 1 and "pipeline_parallel_size" in knobs
    need = -(-need // hosts)
    if command.cards is not None and command.cards < need:
        raise BadInput(
            f"{command.cards_by} leaves the engine {command.cards} card(s), and its parallel sizes need"
            f" {need}; give as many cards or lower a size"
            + (", or give --hosts and --network for a server of several hosts" if split else "")
        )
    return command.cards or max(1, min(need, 64))
