"""Each alarm of a keeper reaches the program, once: its log alone is read by nobody."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable, Iterator

import pytest
from kit.keepers.served import Served

from ckpt.events import Event
from ckpt.ipc.frames import MessageSocket
from ckpt.ipc.messages import WIRE_VERSION, Hello, PrintLine, Start
from ckpt.keeper.connection import AlarmRelay, ClientConnection, Clients

Readers = Callable[..., MessageSocket]


@pytest.fixture
def clients() -> Clients:
    """A keeper's connections; none yet."""
    return Clients()


@pytest.fixture
def join(clients: Clients) -> Iterator[Readers]:
    """Admits a client; gives its end."""
    ends: list[ClientConnection | MessageSocket] = []
    numbers = itertools.count()

    def admit(role: str, rank: int = 0) -> MessageSocket:
        ours, theirs = socket.socketpair(socket.AF_UNIX)
        ours.setblocking(False)
        client = ClientConnection(next(numbers), ours, on_blocked=lambda one: None)
        client.admit(
            Hello(version=WIRE_VERSION, role=role, pid=1, launch="l", rank=rank, ranks=4, attempt=1)
        )
        clients.add(client)
        end = MessageSocket(theirs)
        ends.extend([client, end])
        return end

    yield admit
    for end in ends:
        end.close()


@pytest.fixture
def log() -> list[Event]:
    """What went into the keeper's log."""
    return []


@pytest.fixture
def relay(clients: Clients, log: list[Event]) -> AlarmRelay:
    """The relay of a keeper whose loop takes calls at once."""
    return AlarmRelay(log.append, clients, lambda call: call())


def told(end: MessageSocket) -> list[str]:
    words, _ = end.receive_available()
    return [word.text for word, _ in words if isinstance(word, PrintLine)]


def alarm(kind: str = "gc-failed", text: str = "no") -> Event:
    return Event(kind, text, alarm=True)


def test_first_supervisor_is_told_and_nobody_else(relay, join, log) -> None:
    second, first = join("supervisor", 1), join("supervisor", 0)
    trainer = join("events", 0)
    relay(alarm())
    assert [told(end) for end in (first, second, trainer)] == [["no"], [], []]
    assert len(log) == 1


def test_first_trainer_is_told_where_there_is_no_supervisor(relay, join) -> None:
    tool, second, first = join("tool"), join("events", 3), join("events", 2)
    relay(alarm())
    assert [told(end) for end in (first, second, tool)] == [["no"], [], []]


def test_what_came_while_nobody_was_there_is_told_to_the_next_program_once(relay, join) -> None:
    for text in ("a", "b"):
        relay(alarm(text=text))
    first = join("supervisor")
    relay.joined()
    assert told(first) == ["a", "b"]
    second = join("supervisor", 1)
    relay.joined()
    assert told(second) == []


def test_alarm_that_the_program_gets_otherwise_is_not_told_twice(relay, join, log) -> None:
    supervisor = join("supervisor")
    relay(alarm("save-failed", "nobody else tells it"))
    trainer = join("events")
    for kind in ("save-failed", "tag-failed", "recovered", "ended", "stacks"):
        relay(alarm(kind, kind))
    relay(Event("gc", "no alarm"))
    assert told(supervisor) == ["nobody else tells it"]
    assert told(trainer) == []
    assert len(log) == 7


def test_alarm_that_comes_again_is_told_once_and_logged_each_time(relay, join, log) -> None:
    supervisor = join("supervisor")
    for n in range(100):
        relay(alarm(text=f"try {n}"))
    assert told(supervisor) == ["try 0"]
    assert len(log) == 100


def test_program_without_supervisors_hears_of_an_alarm_of_its_keeper(
    serve: Callable[..., Served],
) -> None:
    served = serve()
    trainer = served.trainer(0, 1)
    trainer.events.say(Start(attempt=1, port=1))  # no trainer sends that, and it has no reply
    assert "does not send this message" in trainer.events.next(PrintLine).text
    trainer.leave()
    assert served.ends()
