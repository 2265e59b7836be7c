"""Samples memory while a service starts and works, and keeps the highest reading of each phase.

GPU memory is NVML's version-2 `used`, which nvidia-smi prints. Version 1 adds the driver's own reserve, some
500 MiB. Host memory is the process tree's PSS, in which a page shared by n processes counts 1/n for each. A
sum of RSS would count torch's libraries once per process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence


class Sampler:
    """Thread that reads `probes`, each of which returns one figure in bytes or one per GPU.

    `phase` may be set at any time. `peaks[phase][probe]` holds the highest readings. Sampling runs inside the
    context manager.
    """

    def __init__(self, probes: Mapping[str, Callable[[], Sequence[int]]], interval_s: float = 0.1) -> None:
        self.probes = probes
        self.interval_s = interval_s
        self.phase = "before"
        self.peaks: dict[str, dict[str, tuple[int, ...]]] = {}
        self.latest: dict[str, tuple[int, ...]] = {}
        self.samples = 0
        self.longest_gap_s = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)

    def __enter__(self) -> Sampler:
        self.sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def sample(self) -> None:
        phase = self.phase
        for name, probe in self.probes.items():
            reading = tuple(probe())
            self.latest[name] = reading
            peaks = self.peaks.setdefault(phase, {})
            known = peaks.get(name, (0,) * len(reading))
            peaks[name] = tuple(max(a, b) for a, b in zip(known, reading, strict=True))
        self.samples += 1

    def peak(self, probe: str, *phases: str) -> tuple[int, ...]:
        """Return the highest reading over these phases, or over all if none is named; empty without a
        reading.
        """
        readings = [
            p[probe] for name, p in self.peaks.items() if probe in p and (not phases or name in phases)
        ]
        return tuple(max(column) for column in zip(*readings, strict=True)) if readings else ()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._done.wait(self.interval_s):
            self.sample()
            now = time.monotonic()
            self.longest_gap_s = max(self.longest_gap_s, now - last)
            last = now
