"""The server's processes killed, stopped and starved with requests under way: each request ends, the service
comes back.
"""

from __future__ import annotations

import resource
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from .conftest import Service, none_left
from .ledger import Ledger, under_load

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    "who",
    [pytest.param(who, marks=pytest.mark.fault(f"{who}-killed")) for who in ("engine", "server", "worker")],
)
def test_a_killed_process(who: str, second: Service, fault: Any) -> None:
    before = second.family()
    with under_load(second.client) as ledger:
        began = time.monotonic()
        before[who].send_signal(signal.SIGKILL)
    ledger.nothing_lost()
    assert ledger.ends == {"error": 8}
    fault.recovery_s = second.client.recovery_s(began)
    assert none_left(before) == []
    assert not set(before.values()) & set(second.family().values())
    fault.saw(str(ledger))
    fault.saw("said: " + first_error(ledger))


@pytest.mark.fault("engine-stopped")
def test_a_hung_engine_is_noticed(
    second: Service, watched: Callable[[Service, float], Any], fault: Any
) -> None:
    before = second.family()
    with watched(second, 10) as said:
        with under_load(second.client) as ledger:
            began = time.monotonic()
            before["engine"].send_signal(signal.SIGSTOP)
            while before["engine"].status() != psutil.STATUS_STOPPED:
                time.sleep(0.05)
            # why a watchdog is needed at all
            assert second.client.get("/health")[0] == 200
        ledger.nothing_lost()
        assert ledger.ends == {"error": 8}
        fault.recovery_s = second.client.recovery_s(began)
        assert "no sign of the engine for 10 s: ended " in said.read_text()
    assert none_left(before) == []
    fault.saw(f"/health said 200; {ledger}")
    fault.saw("said: " + first_error(ledger))


@pytest.mark.fault("out-of-memory")
def test_a_worker_without_memory(second: Service, fault: Any) -> None:
    """RLIMIT_AS makes the allocation fail in the process itself; what the kernel's killer does is
    worker-killed.
    """
    client, worker = second.client, second.family()["worker"]
    before = second.family()
    limit = worker.memory_info().vms
    began = time.monotonic()
    worker.rlimit(resource.RLIMIT_AS, (limit, psutil.RLIM_INFINITY))
    ledger = Ledger()
    with ThreadPoolExecutor(8) as pool:
        prompts = [[11 + n] * 1900 for n in range(8)]
        ledger.entries = list(pool.map(lambda n: client.complete(32, prompts[n], n % 2 == 0), range(8)))
    ledger.nothing_lost()
    fault.saw(str(ledger))
    if worker.is_running():
        worker.rlimit(resource.RLIMIT_AS, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
    fault.recovery_s = client.recovery_s(began)
    fault.saw("the same worker goes on" if second.family() == before else "the server was started again")
    if "error" in ledger.ends:
        fault.saw("said: " + first_error(ledger))


def first_error(ledger: Ledger) -> str:
    said = sorted(
        {
            f"{entry.status} {entry.said}" if entry.status else entry.said
            for entry in ledger.entries
            if entry.end == "error"
        }
    )
    return "; ".join(line[:110] for line in said)
