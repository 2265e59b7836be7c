"""When one host of a server over several says that the others are gone."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field

import pytest

from lowmem.schema import Deploy
from lowmem.service.members import Bond, Connection, MemberHosts, plain
from lowmem.service.ready import wait_joined
from lowmem.service.watchdog import MemberLook

FIRST: Connection = ("10.0.0.2", 40000, "10.0.0.1", 29501)
NEXT: Connection = ("10.0.0.2", 40002, "10.0.0.1", 29501)
PROBE: Connection = ("10.0.0.2", 40001, "10.0.0.1", 29501)
DEPLOY = Deploy(model_path="/m", served_model_name="m", nodes=("10.0.0.1", "10.0.0.2"), rank=1)


@dataclass
class Stub:
    """What the kernel says at each look; the last one stays."""

    looks: list[set[Connection]]
    meetings: list[str | None] = field(default_factory=lambda: ["there"])
    first: str = "10.0.0.1"
    asked: str = "10.0.0.1"

    def connections(self):
        return frozenset(self.looks.pop(0) if len(self.looks) > 1 else self.looks[0])

    def answers(self):
        return {self.asked: self.meetings.pop(0) if len(self.meetings) > 1 else self.meetings[0]}


def looked_at(looks, meetings=("there",), seconds=5, silence_s=60, asked="10.0.0.1"):
    """What each of as many looks said as there are entries of the longer list."""
    bond = Bond(Stub(list(looks), list(meetings), asked=asked), silence_s)
    return [bond.look(float(n * seconds)) for n in range(max(len(looks), len(meetings) + 2))]


def test_one_that_has_not_joined_yet_is_in_no_trouble():
    assert looked_at([set()] * 50) == [""] * 50


def test_one_that_stays_joined_is_in_no_trouble():
    assert looked_at([set(), {FIRST}, {FIRST}, {FIRST}, {FIRST}]) == [""] * 5


def test_a_connection_that_is_gone_is_said_once():
    said = looked_at([{FIRST}, {FIRST}, set(), set(), set()])
    assert said == [
        "",
        "",
        "the connection with 10.0.0.1 has ended, and a new engine there cannot join this one",
        "",
        "",
    ]


def test_another_connection_in_its_place_is_another_engine():
    said = looked_at([{FIRST}, {FIRST}, {NEXT}, {NEXT}, {NEXT}, set()])
    assert [bool(why) for why in said] == [False, False, True, False, False, True]


def test_one_of_several_that_is_gone():
    assert bool(looked_at([{FIRST, NEXT}, {FIRST, NEXT}, {NEXT}])[2])


def test_what_only_asks_whether_the_port_is_there_joins_nobody():
    assert looked_at([{PROBE}, set(), {PROBE, FIRST}, {FIRST}, {FIRST}]) == [""] * 5


def test_a_first_host_that_listens_no_more_has_another_engine_soon():
    said = looked_at([{FIRST}, {FIRST}, {FIRST}, {FIRST}], ["there", "refused"])
    assert said == ["", "", "", "10.0.0.1 no longer has an engine at the rendezvous port"]


def test_a_first_host_that_is_silent_for_too_long():
    said = looked_at([{FIRST}] * 20, ["there", "nothing"], silence_s=60)
    # joined at 5 s, heard last at 10 s
    assert said.index("10.0.0.1 has not answered for 60 s") == 14
    assert said[:14] == [""] * 14


def test_a_short_silence_is_none():
    assert looked_at([{FIRST}] * 12, ["there", *["nothing"] * 8, "there", *["nothing"] * 8]) == [""] * 20


def test_another_host_that_refuses_is_there():
    """Nobody listens at that port but on the first host: it is the kernel that answers."""
    assert looked_at([{FIRST}] * 40, ["refused"], asked="10.0.0.2") == [""] * 40


def test_another_host_without_power_is_seen_by_the_first():
    said = looked_at([{FIRST}] * 20, ["refused", "nothing"], silence_s=30, asked="10.0.0.2")
    assert said.index("10.0.0.2 has not answered for 30 s") == 8
    assert said[:8] == [""] * 8


def test_a_host_that_a_firewall_hides_is_in_no_trouble():
    assert looked_at([{FIRST}] * 40, ["nothing"]) == [""] * 40


def test_what_one_engine_heard_is_nothing_to_the_next():
    bond = Bond(Stub([{FIRST}, {FIRST}, {FIRST}, set(), {NEXT}], ["there", "nothing"]), 60)
    assert [bool(bond.look(now)) for now in (0.0, 5.0, 10.0, 15.0, 500.0, 505.0, 510.0)] == [
        False,
        False,
        False,
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("running", "ended"),
    [(["old", "old"], True), (["old", "new"], False), (["old", None], False), ([None, None], False)],
)
def test_only_the_engine_that_was_joined_is_ended(running, ended):
    """What the service manager started since then is to live."""
    look = MemberLook(Bond(Stub([{FIRST}, {FIRST}, set()]), 60), server=None, deploy=DEPLOY)
    look._running = lambda: running.pop(0)
    said = [look.trouble(n) for n in range(4)]
    assert [bool(why) for why in said] == [False, False, ended, False]


def test_ready_when_joined():
    assert wait_joined(Stub([set(), {PROBE}, {FIRST}, {FIRST}]), lambda: True, 60) == ""


def test_not_ready_where_the_engine_ends_or_nobody_is_there():
    assert wait_joined(Stub([set()]), lambda: False, 60) == "the engine has ended"
    assert wait_joined(Stub([set()]), lambda: True, 0.01).startswith("not joined with 10.0.0.1 within 0.01 s")


def test_addresses_of_a_socket_of_both_families():
    assert plain("::ffff:10.0.0.2") == "10.0.0.2"
    assert [plain(address) for address in ("10.0.0.2", "fd00::2", "fe80::1%eth0")] == [
        "10.0.0.2",
        "fd00::2",
        "fe80::1%eth0",
    ]


def test_the_kernels_own_words():
    """Both ends of a real connection, on loopback addresses; a listener that is gone refuses."""
    with socket.create_server(("127.0.0.2", 0)) as listener:
        port = listener.getsockname()[1]
        first, other = (
            MemberHosts(
                DEPLOY.model_copy(
                    update={"nodes": ("127.0.0.2", "127.0.0.3"), "master_port": port, "rank": rank}
                )
            )
            for rank in (0, 1)
        )
        assert (first.connections(), other.connections()) == (frozenset(), frozenset())
        with socket.create_connection(("127.0.0.2", port), source_address=("127.0.0.3", 0)) as joined:
            accepted, _ = listener.accept()
            own = joined.getsockname()
            assert other.connections() == {(*own, "127.0.0.2", port)}
            assert first.connections() == {("127.0.0.2", port, *own)}
            accepted.close()
        assert (first.answers(), other.answers()) == ({"127.0.0.3": "refused"}, {"127.0.0.2": "there"})
    assert other.answers() == {"127.0.0.2": "refused"}
