"""Defines the command `lowmem capacity`: how many requests fit at each context, as a table and a picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowmem.cli.options import ModelName, SearchedProfile, check_picture, complete_device, limit_bytes
from lowmem.errors import BadInput
from lowmem.plan.capacity import Capacity, capacity_of
from lowmem.plan.goals import DEFAULT_PROFILE, find, goal_of
from lowmem.plan.knobs import parse_assignments
from lowmem.plan.request import Inputs, PlanRequest, gather
from lowmem.schema import VLLM_VERSION
from lowmem.text import visible_json
from lowmem.units import mib

if TYPE_CHECKING:
    from rich.console import Console

SHORT = {
    "auto": "16-bit",
    "fp8": "fp8",
    "int8_per_token_head": "int8",
    "int4_per_token_head": "int4",
}
"""Names of the KV types in the table's head; the line above it has the whole names."""


SHORT_REQUEST = 1024
"""Tokens of the request that settings are searched for where no profile has them."""

COUNTED = ("max_model_len", "max_num_seqs")
"""Knobs that the table goes through, so that nobody can set them."""

LINES = {
    "auto": ("weights", "-", "o"),
    "fp8": ("kv_cache", "-", "s"),
    "int8_per_token_head": ("graphs", "--", "o"),
    "int4_per_token_head": ("context", "-", "^"),
}
"""Names the colour of each KV type, see `palette`, its line and its mark; lines may lie on one another."""


def capacity(
    profile: SearchedProfile = None,
    model: ModelName = None,
    weights: Annotated[str | None, typer.Option(help="stored, or a format such as awq-4bit")] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="name in the device table, or auto; default: the profile's", autocompletion=complete_device
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(help="cards on the host; default: the profile's, one of a --device in a search"),
    ] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(help="per card, e.g. 20GiB; default: the profile's, the whole card in a search"),
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="knob=value, as often as needed")] = None,
    out: Annotated[Path | None, typer.Option(help="picture to write; .png or .svg")] = None,
    vllm_version: Annotated[str, typer.Option(help="version the plan is for")] = VLLM_VERSION,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Count the requests that fit at each context length.

    Each count is a plan with as many seats. Memory decides it; `lowmem plan --maximize` looks at latency too.
    """
    if out is not None:
        check_picture(out)
    overrides = parse_assignments(set_ or [])
    for name in COUNTED:
        if name in overrides:
            raise BadInput(
                f"--set {name}={overrides[name]}: the table goes through its values; leave it out, or plan"
                " one with `lowmem plan`"
            )
    request = PlanRequest(
        profile or DEFAULT_PROFILE,
        model,
        device,
        count,
        overrides,
        memory_limit_bytes=limit_bytes(memory_limit),
        vllm_version=vllm_version,
        weights=weights,
    )
    inputs = inputs_of(request, searched=profile is None and model is not None)
    kv_type = request.overrides.get("kv_cache_dtype")
    found = capacity_of(inputs, None if kv_type is None else str(kv_type))
    if as_json:
        told = {"contexts": found.contexts, "requests": found.requests, "limit_bytes": found.limit_bytes}
        sys.stdout.write(visible_json(json.dumps(told, indent=2)) + "\n")
    else:
        show(found, inputs)
    if out is not None and found.requests:
        draw(found, inputs, out)
        if not as_json:
            typer.echo(f"picture: {out}")
    if not found.requests:
        raise typer.Exit(2)


def inputs_of(request: PlanRequest, searched: bool) -> Inputs:
    """Return the settings of the profile, or those that a search finds for one short request."""
    if not searched:
        return gather(request)
    goal = goal_of(request, searched=True)
    whole = min(SHORT_REQUEST, goal.card.max_position_embeddings)
    sizes = {"clients": 1, "input_tokens": whole - whole // 4, "output_tokens": whole // 4}
    load = goal.load.model_copy(update=sizes)
    return find(goal.with_load(load)).choice.inputs


def show(found: Capacity, inputs: Inputs, console: Console | None = None) -> None:
    """Print requests against context, a column for each KV type."""
    from rich.markup import escape
    from rich.table import Table

    from lowmem.text import terminal

    out = console or terminal()
    q = inputs.card.quantization
    weights = "16-bit" if q.method == "none" else f"{q.method} {q.bits}-bit"
    out.print(
        f"{escape(inputs.card.name)} ({weights}) on {inputs.count} x {inputs.device.name}, at most"
        f" {mib(found.limit_bytes)} a card: requests that fit at once"
    )
    if not found.requests:
        out.print("not one request fits; `lowmem plan` says what is in its way")
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("tokens a request", justify="right")
    for kv_type in found.requests:
        table.add_column(f"{SHORT.get(kv_type, kv_type)} KV", justify="right")
    for n, tokens in enumerate(found.contexts):
        counts = [row[n] for row in found.requests.values()]
        table.add_row(f"{tokens:,}", *(f"{count:,}" if count else "none" for count in counts))
    out.print(table)
    long = [f"{SHORT[kv]} is {kv}" for kv in found.requests if SHORT.get(kv, kv) not in (kv, "16-bit")]
    if long:
        out.print("; ".join(long))


def draw(found: Capacity, inputs: Inputs, out: Path) -> None:
    """Write the picture; needs matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullLocator

    from lowmem.status.plots import palette

    plt.rcParams.update({"font.size": 10, "svg.hashsalt": "lowmem"})
    colours = palette()
    fig, ax = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    for kv_type, row in found.requests.items():
        x, y = zip(*((c, n) for c, n in zip(found.contexts, row, strict=True) if n), strict=True)
        colour, line, mark = LINES.get(kv_type, ("other", "-", "x"))
        label = f"{SHORT.get(kv_type, kv_type)} KV cache"
        ax.plot(x, y, line, marker=mark, ms=6, lw=1.6, mfc="none", color=colours[colour], label=label)
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], labels[::-1], frameon=False, loc="upper right")  # as the lines lie
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xlim(found.contexts[0] / 1.2, found.contexts[-1] * 1.2)
    ax.set_xticks(found.contexts, [f"{c // 1024}k" if c % 1024 == 0 else f"{c:,}" for c in found.contexts])
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.grid(True, which="major", color="#dddddd", lw=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.set_xlabel("tokens a request, prompt and answer")
    ax.set_ylabel("requests that fit at once")
    ax.set_title(
        f"{inputs.card.name}, {inputs.count} x {inputs.device.title},"
        f" {found.limit_bytes / 2**30:.1f} GiB a card",
        loc="left", fontsize=11,
    )  # fmt: skip
    metadata = {"Date": None} if out.suffix == ".svg" else {"Software": None}
    fig.savefig(out, dpi=150, metadata=metadata)
    plt.close(fig)
