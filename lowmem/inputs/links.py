"""Reads the table of links between hosts (data/links.yml)."""

from __future__ import annotations

from lowmem.data import load_yaml
from lowmem.errors import BadInput
from lowmem.schema import Link


def names() -> list[str]:
    """List the links of the table, without aliases."""
    return list(load_yaml("links.yml"))


def load_link(name: str, gb_per_s: float | None = None, round_trip_us: float | None = None) -> Link:
    """Return a link by its name or alias in any case.

    Figures that were measured replace the table's. Raises BadInput for an unknown name or a figure that is
    not positive.
    """
    for key, entry in load_yaml("links.yml").items():
        if name.lower() in (key, *entry.get("aliases", ())):
            link = Link(name=key, **{k: v for k, v in entry.items() if k != "aliases"})
            break
    else:
        raise BadInput(
            f"network {name!r} is not in the table; use one of {', '.join(names())}, and give measured"
            " figures beside it"
        )
    own = {"gb_per_s": gb_per_s, "round_trip_us": round_trip_us}
    for what, value in own.items():
        if value is not None and not 0 < value < 1e9:
            raise BadInput(f"network_{what}={value:g} is not a positive number; give a measured figure")
    given = {k: v for k, v in own.items() if v is not None}
    return link.model_copy(
        update={**given, "source": {**link.source, **dict.fromkeys(given, "given by the operator")}}
    )
