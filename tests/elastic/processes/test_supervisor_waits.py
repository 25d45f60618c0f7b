"""How long a program waits at a keeper's door."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ckpt.elastic.processes import supervisor
from ckpt.errors import ConflictError, UnavailableError
from ckpt.ipc.client import HungUpError


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[float]]:
    """Has ``supervise`` answer with errors, then take the program; time passes by pauses alone,
    ``pause_s`` each."""

    def make(*answers: BaseException, pause_s: float = 1.0) -> list[float]:
        left = list(answers)
        now = [0.0]

        def supervise(link: object, plan: object) -> str:
            if left:
                raise left.pop(0)
            return "seat"

        def sleep(seconds: float) -> None:
            now[0] += pause_s

        monkeypatch.setattr(supervisor, "supervise", supervise)
        monkeypatch.setattr(supervisor.time, "monotonic", lambda: now[0])
        monkeypatch.setattr(supervisor.time, "sleep", sleep)
        return now

    return make


def test_keeper_that_settles_what_an_earlier_launch_left_is_waited_for_and_that_is_said_once(
    door, capsys
) -> None:
    now = door(*[UnavailableError("still bringing step 7 to the store")] * 500)
    assert supervisor.supervise_accepted(lambda: None, None) == "seat"
    assert now[0] == 500
    said = capsys.readouterr().err
    assert said.count("still bringing step 7") == 1
    assert said.startswith("ckpt: ")


def test_keeper_that_settles_for_ever_is_not_waited_for_for_ever(door) -> None:
    now = door(*[UnavailableError("still bringing")] * 1000)
    with pytest.raises(UnavailableError, match="still bringing"):
        supervisor.supervise_accepted(lambda: None, None)
    assert 600 < now[0] < 603


def test_another_launch_is_given_time_to_go(door, capsys) -> None:
    door(*[ConflictError("running already")] * 9)
    assert supervisor.supervise_accepted(lambda: None, None) == "seat"
    now = door(*[ConflictError("running already")] * 100)
    with pytest.raises(ConflictError):
        supervisor.supervise_accepted(lambda: None, None)
    assert now[0] < 13
    assert capsys.readouterr().err == ""


def test_keeper_that_is_just_ending_is_asked_for_again_in_silence(door, capsys) -> None:
    door(*[HungUpError("gone")] * 20)
    assert supervisor.supervise_accepted(lambda: None, None) == "seat"
    assert capsys.readouterr().err == ""


def test_keeper_that_cannot_be_started_is_not_waited_for(door) -> None:
    now = door()

    def nobody() -> None:
        raise UnavailableError("no keeper")

    with pytest.raises(UnavailableError, match="no keeper"):
        supervisor.supervise_accepted(nobody, None)
    assert now[0] == 0.0
