"""Defines the command `lowmem frontier`, which draws memory against latency."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowmem.cli.options import check_picture
from lowmem.errors import BadInput
from lowmem.inputs.devices import load_device
from lowmem.plan.search import Point, frontier, needed_bytes, pareto
from lowmem.schema import VLLM_VERSION, Load
from lowmem.status.plots import palette
from lowmem.units import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {
    "16-bit": "other",
    "8-bit": "weights",
    "4-bit": "graphs",
    "3-bit": "kv_cache",
    "2-bit": "context",
    "as stored": "graphs",
}
"""Names the colour of each weight width, see `palette`."""

_MARKS = {1: "o", 2: "s", 4: "^", 8: "D"}

_MARK_SIZES = {16: 64, 8: 40, 4: 20}
"""Area of a mark in square points, by the bits of the KV cache."""


def _kv_bits(point: Point) -> int:
    kind = str(point.knobs.get("kv_cache_dtype", "auto"))
    return 4 if "int4" in kind else 8 if "8" in kind else 16


def frontier_command(
    model: Annotated[
        str, typer.Option(help="built-in name, checkpoint directory or Hugging Face id")
    ] = "llama-2-70b",
    device: Annotated[str, typer.Option(help="name in the device table, or auto")] = "a100-40g",
    count: Annotated[int, typer.Option(help="cards on the host")] = 2,
    out: Annotated[Path, typer.Option(help="picture to write; .png or .svg")] = Path("frontier.png"),
    clients: Annotated[int, typer.Option(help="closed-loop clients")] = 8,
    input_tokens: Annotated[int, typer.Option(help="tokens of a prompt")] = 1024,
    output_tokens: Annotated[int, typer.Option(help="tokens of an answer")] = 256,
    memory_limit_gib: Annotated[float, typer.Option(help="limit line, GiB per card")] = 20.0,
    latency_limit_ms: Annotated[float, typer.Option(help="limit line, ms a token")] = 200.0,
    vllm_version: Annotated[str, typer.Option(help="version the plan is for")] = VLLM_VERSION,
) -> None:
    """Draw memory per card against time a token.

    A point stands for each weight width, card split, KV type and offload share of a model and device.
    """
    check_picture(out)
    for name, value in (
        ("clients", clients),
        ("input_tokens", input_tokens),
        ("output_tokens", output_tokens),
    ):
        if not 1 <= value <= 100_000:
            raise BadInput(f"{name}={value} is not from 1 to 100,000; correct it")
    load = Load(clients=clients, input_tokens=input_tokens, output_tokens=output_tokens)
    points = frontier(model, device, count, load, vllm_version)
    if not points:
        raise BadInput(f"no setting of {model} starts on {count} x {device}; use more or larger cards")
    draw(points, load_device(device).title, count, load, memory_limit_gib, latency_limit_ms, out)
    best = [o for weights in _COLOURS for o in pareto(points, weights)]
    typer.echo(f"{out}: {len(points)} settings, {len(best)} on the frontier of their weight width;")
    typer.echo("memory of a card, and what they are:")
    for o in best:
        memory, step = needed_bytes(o.plan) / GIB, o.plan.latency_ms.decode_expected
        typer.echo(f"{memory:7.1f} GiB {step:8.1f} ms a token  {_short(o)}")


def _short(point: Point) -> str:
    """Describe a point in at most 48 columns."""
    cards = point.plan.tensor_parallel_size
    parts = [point.weights, f"{cards} card{'s' if cards > 1 else ''}"]
    parts += [f"KV {_kv_bits(point)} bits"] if "kv_cache_dtype" in point.knobs else []
    parts += [f"{point.knobs['cpu_offload_gb']} GiB RAM"] if "cpu_offload_gb" in point.knobs else []
    return ", ".join(parts)


def draw(
    points: list[Point],
    title: str,
    count: int,
    load: Load,
    memory_limit_gib: float,
    latency_limit_ms: float,
    out: Path,
) -> None:
    """Write the picture; needs matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "svg.hashsalt": "lowmem"})
    colours = palette()
    fig, ax = plt.subplots(figsize=(9, 5.6), layout="constrained")
    x = [needed_bytes(o.plan) / GIB for o in points]
    y = [o.plan.latency_ms.decode_expected for o in points]
    ax.set_yscale("log")
    low, high = min(y) / 1.5, max([*y, latency_limit_ms]) * 1.5
    ax.set_ylim(low, high)
    right = max([*x, memory_limit_gib]) * 1.05
    ax.set_xlim(0, right)
    ax.fill_between([0, memory_limit_gib], low, latency_limit_ms, color=colours["good"], alpha=0.07, lw=0)
    ax.axvline(memory_limit_gib, color="#888888", lw=0.9, ls="--")
    ax.axhline(latency_limit_ms, color="#888888", lw=0.9, ls="--")
    inside = f"within {memory_limit_gib:g} GiB and {latency_limit_ms:g} ms"
    ax.text(0.02, 0.02, inside, transform=ax.transAxes, color=colours["good"], fontsize=9)
    for weights, name in _COLOURS.items():
        edge = pareto(points, weights)
        at = [needed_bytes(o.plan) / GIB for o in edge], [o.plan.latency_ms.decode_expected for o in edge]
        ax.step(*at, where="post", color=colours[name], lw=1.2, alpha=0.55, zorder=1)
    for o, a, b in zip(points, x, y, strict=True):
        streamed = "cpu_offload_gb" in o.knobs
        colour = colours[_COLOURS[o.weights]]
        kv_bits = _kv_bits(o)
        # a hollow mark is transparent, and a smaller one lies on top: none hides another
        ax.scatter(
            a,
            b,
            s=_MARK_SIZES[kv_bits],
            marker=_MARKS[o.plan.tensor_parallel_size],
            zorder=3 + 1 / kv_bits,
            linewidths=1.2,
            edgecolors=colour if streamed else "white",
            facecolors="none" if streamed else colour,
        )
    ax.set_xlabel(
        f"GiB per card under load, {load.clients} requests of {load.input_tokens + load.output_tokens:,}"
        " tokens held"
    )
    ax.set_ylabel(f"ms a token expected at {load.clients} clients")
    ax.set_title(f"{points[0].plan.model} on up to {count} x {title}", loc="left", fontsize=11)
    _axes(ax)
    _legend(ax, points)
    metadata = {"Date": None} if out.suffix == ".svg" else {"Software": None}
    fig.savefig(out, dpi=150, metadata=metadata)
    plt.close(fig)


def _axes(ax: Axes) -> None:
    """Format the ticks of a logarithmic axis as plain numbers, and draw a light grid."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
    ax.yaxis.set_minor_formatter(FuncFormatter(lambda v, _: ""))
    ax.grid(True, which="major", color="#dddddd", lw=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _legend(ax: Axes, points: list[Point]) -> None:
    """Explain colours and marks beside the picture."""
    from matplotlib.lines import Line2D

    colours = palette()
    used = [w for w in _COLOURS if any(o.weights == w for o in points)]
    splits = sorted({o.plan.tensor_parallel_size for o in points})
    handles = [
        Line2D([], [], ls="", marker="o", color=colours[_COLOURS[w]], label=f"{w} weights") for w in used
    ]
    handles += [
        Line2D([], [], ls="", marker=_MARKS[n], color="#555555", label=f"{n} card{'s' if n > 1 else ''}")
        for n in splits
    ]
    handles += [
        Line2D(
            [], [], ls="", marker="o", mfc="white", mec="#555555", label="hollow: weights streamed from RAM"
        )
    ]
    handles += [
        Line2D([], [], ls="-", color="#555555", label="best of each width"),
    ]
    handles += [
        Line2D(
            [],
            [],
            ls="",
            marker="o",
            color="#555555",
            mec="white",
            ms=size**0.5,
            label=f"{bits}-bit KV cache",
        )
        for bits, size in _MARK_SIZES.items()
    ]
    ax.legend(handles=handles, frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
