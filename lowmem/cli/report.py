"""Defines the command `lowmem report`, which writes the page of `lowmem.status.page`.

The page comes from receipts and, with `--live`, from the running server. This module holds input and output
only.
"""

from __future__ import annotations

import datetime as dt
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from lowmem.artefacts import read
from lowmem.errors import BadInput
from lowmem.files import write_text
from lowmem.measure.facts import versions
from lowmem.schema import Receipt
from lowmem.status.page import KEPT_S, Live, page
from lowmem.status.probe import DEFAULT_PLAN, deployed, read_samples, write_samples

SHOWN = 20
"""Receipts of a status page, the newest."""


def report(
    receipts: Annotated[
        list[Path] | None, typer.Argument(help="receipts, or folders of them; with --live there may be none")
    ] = None,
    out: Annotated[Path, typer.Option(help="page to write")] = Path("report.html"),
    live: Annotated[
        bool,
        typer.Option(
            "--live",
            help="write the status page of a deployment on this host: the running server, then its receipts",
        ),
    ] = False,
    plan: Annotated[Path, typer.Option(help="with --live: plan.json of the deployment")] = DEFAULT_PLAN,
    samples: Annotated[
        Path | None,
        typer.Option(
            help="with --live: file that keeps the last hour's samples, for rates, percentiles and curves"
        ),
    ] = None,
    every_s: Annotated[
        int,
        typer.Option(
            min=0, help="with --live: seconds between two runs, which the page states; 0: a single run"
        ),
    ] = 0,
) -> None:
    """Write one HTML page of plans against measurements.

    With --live the page also shows the running server.
    """
    given = receipts or []
    if live:
        html = status_page(plan, given, samples, every_s)
    elif samples or every_s:
        raise BadInput("--samples and --every-s go with --live")
    elif not given:
        raise BadInput("give a receipt, a folder of them, or --live")
    else:
        paths = list(_found(given))
        if not paths:
            raise BadInput(
                f"no receipt in {', '.join(map(str, given))}: give *.json files or a folder of them"
            )
        # receipt.json of a release is one of the receipts beside it once more
        told: dict[str, tuple[str, Receipt]] = {}
        for path in paths:
            receipt = read(path)
            told.setdefault(receipt.model_dump_json(), (path.stem, receipt))
        html = page(
            list(told.values()),
            dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
    write_text(out, html)
    typer.echo(out)


def status_page(plan: Path, receipts: Iterable[Path], samples: Path | None, every_s: int) -> str:
    """Render the status page as HTML, and add one look at the server to `samples`.

    A receipt that cannot be read is named on the page and is no error.
    """
    host = deployed(plan)
    shown: dict[str, tuple[str, Receipt]] = {}
    unread: list[str] = []
    for path in _found([given for given in receipts if given.exists()], newest=SHOWN):
        try:
            receipt = read(path)
        except BadInput as error:
            unread.append(str(error))
        else:
            shown.setdefault(
                receipt.created_utc, (receipt.created_utc.replace("T", " ").removesuffix("Z"), receipt)
            )
    look = host.look()
    earlier = [s for s in read_samples(samples) if look.at - KEPT_S <= s.at < look.at] if samples else []
    if samples:
        write_samples(samples, [*earlier, *([look.sample] if look.sample else [])])
    release = plan.resolve().parent
    live = Live(
        plan=host.plan,
        look=look,
        earlier=earlier,
        release=release.name if release.parent.name == "releases" else "",
        place=platform.node(),
        versions=versions(),
        every_s=every_s,
        unread=tuple(unread),
    )
    return page([shown[created] for created in sorted(shown)][-SHOWN:], "", live)


def _found(receipts: Iterable[Path], newest: int | None = None) -> Iterable[Path]:
    """Yield files, and the files of folders in the order of their names.

    Each folder gives its last `newest` files, since a host names them by their time.
    """
    for given in receipts:
        yield from sorted(given.glob("*.json"))[-(newest or 0) :] if given.is_dir() else [given]
