"""Defines what a measurement observes, before anything is judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lowmem.measure.engine_log import EngineLog, read
from lowmem.schema import LoadResult

Reading = tuple[int, ...]
"""Bytes: one figure for each GPU, or one for the host."""


def highest(peaks: Mapping[str, Mapping[str, Reading]], probe: str, *phases: str) -> Reading:
    """Return the highest reading of a probe over these phases, or over all if none is named.

    It is empty without any.
    """
    readings = [p[probe] for name, p in peaks.items() if probe in p and (not phases or name in phases)]
    return tuple(max(column) for column in zip(*readings, strict=True)) if readings else ()


@dataclass
class Observation:
    """Data that one session observed.

    Memory is in bytes; `source` names the probe that the limit is held against.
    """

    source: str  # gpu or host
    memory_source: str
    interval_s: float
    hardware: dict[str, str]
    versions: dict[str, str]
    attached: bool
    argv: tuple[str, ...]
    environment: dict[str, str]
    created_utc: str = ""
    before: Reading = ()
    idle: Reading = ()
    ready: bool = False
    ready_s: float | None = None
    loads: list[LoadResult] = field(default_factory=list)
    peaks: dict[str, dict[str, Reading]] = field(default_factory=dict)
    longest_gap_s: float = 0.0
    log: EngineLog = field(default_factory=lambda: read([]))
    findings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def measured_phases(self) -> list[str]:
        """Return the phases in which the service ran.

        The list is never empty, so that `peak` does not mean all of them.
        """
        return [name for name in self.peaks if name not in ("before", "stopping")] or ["none"]

    def peak(self, *phases: str) -> Reading:
        """Return the highest reading of the limit's probe over these phases."""
        return highest(self.peaks, self.source, *phases)

    def above_before(self, reading: Sequence[int]) -> int | None:
        """Return the most that one GPU has above what was in use before; None without a reading."""
        if not reading:
            return None
        return max(r - b for r, b in zip(reading, self.before, strict=True))
