"""A follower serves what training committed, swaps between requests, and refuses what is wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from kit.damage import flip
from torch import nn

from ckpt.errors import NotFoundError, UnavailableError, UsageError
from ckpt.events import Event
from ckpt.serve.follower import Follower
from ckpt.serve.generations import Generation
from ckpt.session.checkpointer import Checkpointer

WAIT_S = 60.0


class Trainer:
    """A training job that commits a model at each call."""

    def __init__(self, store: Path, model: nn.Module | None = None) -> None:
        self.model: nn.Module = model or make_model()
        self._checkpointer = Checkpointer(store, job="t")

    def commit(self, step: int, value: float | None = None, *, tag: str | None = None) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(step if value is None else value)
        self._checkpointer.save({"model": self.model}, step=step, tag=tag)

    def save(self, step: int) -> None:
        self._checkpointer.save({"model": self.model}, step=step)

    def close(self) -> None:
        self._checkpointer.close()


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 8))


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    trainer = Trainer(tmp_path / "store")
    yield trainer
    trainer.close()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def weight(generation: Generation) -> float:
    return float(next(generation.model.parameters()).detach().reshape(-1)[0])


def test_served_model_is_bit_for_bit_what_was_saved(trainer: Trainer, store: Path) -> None:
    torch.manual_seed(3)
    for parameter in trainer.model.parameters():
        nn.init.normal_(parameter)
    trainer.save(5)
    with Follower(store, into=make_model, poll_s=0.02) as follower:
        generation = follower.wait(step=5, timeout_s=WAIT_S)
        assert generation.id == "1-5"
        for name, tensor in trainer.model.state_dict().items():
            assert torch.equal(generation.model.state_dict()[name], tensor), name


def test_new_commit_is_served_and_old_requests_keep_their_generation(
    trainer: Trainer, store: Path
) -> None:
    trainer.commit(1)
    with Follower(store, into=make_model, poll_s=0.02) as follower:
        follower.wait(step=1, timeout_s=WAIT_S)
        with follower.generation() as old:
            trainer.commit(2)
            follower.wait(step=2, timeout_s=WAIT_S)
            with follower.generation() as new:
                assert (weight(old), weight(new)) == (1.0, 2.0)
                assert (old.id, new.id) == ("1-1", "1-2")
            trainer.commit(3)
            follower.wait(step=3, timeout_s=WAIT_S)
            assert weight(old) == 1.0


def test_requests_never_meet_a_mixture(trainer: Trainer, store: Path) -> None:
    """Every element of every tensor is the step: a request sees one value alone, its id's."""
    trainer.commit(0)
    mixed: list[str] = []
    seen: set[int] = set()
    over = threading.Event()
    with Follower(store, into=make_model, poll_s=0.005) as follower:
        follower.wait(timeout_s=WAIT_S)

        def request() -> None:
            while not over.is_set():
                with follower.generation() as g:
                    values = torch.cat([p.detach().reshape(-1) for p in g.model.parameters()])
                    seen.add(g.step)
                    if not bool((values == g.step).all()):
                        mixed.append(f"{g.id}: {values.unique().tolist()}")

        threads = [threading.Thread(target=request) for _ in range(3)]
        for thread in threads:
            thread.start()
        for step in range(1, 13):
            trainer.commit(step)
            follower.wait(step=step, timeout_s=WAIT_S)
        over.set()
        for thread in threads:
            thread.join()
    assert not mixed
    assert len(seen) > 1


def test_only_what_changed_is_read(tmp_path: Path) -> None:
    """A frozen base and a small head: the head's bytes alone leave the store."""

    def made() -> nn.ModuleDict:
        base, head = nn.Linear(2048, 2048, bias=False), nn.Linear(64, 64, bias=False)
        return nn.ModuleDict({"base": base, "head": head})

    model = made()
    trainer = Trainer(tmp_path / "store", model)
    trainer.save(1)
    with Follower(tmp_path / "store", into=made, poll_s=0.02) as follower:
        follower.wait(step=1, timeout_s=WAIT_S)
        first = follower.status()
        assert first.read_bytes >= 16 << 20
        for step in (2, 3, 4, 5):
            with torch.no_grad():
                model["head"].weight.fill_(step)
            trainer.save(step)
            served = follower.wait(step=step, timeout_s=WAIT_S).model.state_dict()
            assert all(torch.equal(served[name], w) for name, w in model.state_dict().items())
        read = follower.status().read_bytes - first.read_bytes
        assert read < 4 * (100 << 10), "four heads of 16 KiB and some structure"
    trainer.close()


def test_memory_that_a_program_changed_is_read_anew(trainer: Trainer, store: Path) -> None:
    trainer.commit(1)
    with Follower(store, into=make_model, poll_s=0.02, keep_generations=1) as follower:
        for step in (1, 2):
            trainer.commit(step + 1, 1.0)
            generation = follower.wait(step=step + 1, timeout_s=WAIT_S)
            # A server must not, and numpy leaves no trace of it.
            next(generation.model.parameters()).detach().numpy()[:] = 77.0
        trainer.commit(4, 1.0)
        assert weight(follower.wait(step=4, timeout_s=WAIT_S)) == 1.0


@pytest.mark.parametrize("how", ["nan", "check raises", "check says no", "shape", "dtype"])
def test_bad_snapshot_is_refused_once_and_the_next_is_served(
    how: str, tmp_path: Path, events: list[Event]
) -> None:
    trainer = Trainer(tmp_path / "store")
    trainer.commit(1)

    def check(candidate: Generation) -> bool:
        if how == "check raises" and candidate.step == 2:
            raise RuntimeError("accuracy 0.1")
        return not (how == "check says no" and candidate.step == 2)

    with Follower(
        tmp_path / "store", into=make_model, poll_s=0.02, check=check, emit=events.append
    ) as follower:
        follower.wait(step=1, timeout_s=WAIT_S)
        good = trainer.model
        if how == "shape":
            trainer.model = nn.Sequential(nn.Linear(64, 9))
        elif how == "dtype":
            trainer.model = make_model().double()
        trainer.commit(2, float("nan") if how == "nan" else None)
        wait_until(lambda: bool(follower.status().refused))
        with follower.generation() as g:
            assert (g.step, weight(g)) == (1, 1.0)
        trainer.model = good
        trainer.commit(3)
        assert weight(follower.wait(step=3, timeout_s=WAIT_S)) == 3.0
        assert list(follower.status().refused) == ["1-2"]
    alarms = [event for event in events if event.kind == "generation-refused"]
    assert len(alarms) == 1
    assert alarms[0].alarm
    trainer.close()


def test_nan_that_stays_is_refused_in_the_next_snapshot_too(tmp_path: Path) -> None:
    """Its bytes are in the buffer that was refused, and the next fill would find them there."""
    trainer = Trainer(tmp_path / "store")
    trainer.commit(1)
    with Follower(tmp_path / "store", into=make_model, poll_s=0.02) as follower:
        follower.wait(step=1, timeout_s=WAIT_S)
        trainer.commit(2, float("nan"))
        wait_until(lambda: "1-2" in follower.status().refused)
        with torch.no_grad():
            trainer.model[2].bias.fill_(3.0)
        trainer.save(3)
        wait_until(lambda: "1-3" in follower.status().refused)
        assert follower.wait(timeout_s=1.0).step == 1
    trainer.close()


def test_damaged_snapshot_is_refused(trainer: Trainer, store: Path, events: list[Event]) -> None:
    trainer.commit(1)
    before = packs_of(store)
    with Follower(store, into=make_model, poll_s=0.02, emit=events.append) as follower:
        follower.wait(step=1, timeout_s=WAIT_S)
        follower.follow("tag:good")
        trainer.commit(2)
        for pack in packs_of(store) - before:
            flip(str(store), str(pack.relative_to(store)), pack.stat().st_size // 2)
        follower.follow("latest")
        wait_until(lambda: bool(follower.status().refused))
        assert weight(follower.wait(timeout_s=1.0)) == 1.0


def test_rollback_is_at_once_and_holds_until_told_to_follow(trainer: Trainer, store: Path) -> None:
    trainer.commit(1)
    with Follower(store, into=make_model, poll_s=0.02) as follower:
        follower.wait(step=1, timeout_s=WAIT_S)
        trainer.commit(2)
        follower.wait(step=2, timeout_s=WAIT_S)
        assert follower.rollback().id == "1-1"
        with follower.generation() as g:
            assert weight(g) == 1.0
        trainer.commit(3)
        assert follower.status().held
        with pytest.raises(NotFoundError, match="kept="):
            follower.rollback("1-99")
        follower.follow("latest")
        assert weight(follower.wait(step=3, timeout_s=WAIT_S)) == 3.0


def test_tag_is_followed_in_both_directions(trainer: Trainer, store: Path) -> None:
    trainer.commit(1, tag="prod")
    trainer.commit(2)
    with Follower(store, into=make_model, follow="tag:prod", poll_s=0.02) as follower:
        assert follower.wait(timeout_s=WAIT_S).step == 1
        trainer.commit(3, tag="prod")
        follower.wait(step=3, timeout_s=WAIT_S)
        follower.follow(2)
        wait_until(lambda: follower.wait(timeout_s=1.0).step == 2)


def test_follower_waits_for_a_job_that_has_not_begun(store: Path) -> None:
    with Follower(store, into=make_model, poll_s=0.02) as follower:
        with pytest.raises(UnavailableError, match="no generation is served yet"):
            follower.generation().__enter__()
        trainer = Trainer(store)
        trainer.commit(1)
        assert follower.wait(timeout_s=WAIT_S).step == 1
        trainer.close()


def test_store_that_is_gone_stops_no_request(
    trainer: Trainer, store: Path, events: list[Event]
) -> None:
    trainer.commit(1)
    with Follower(store, into=make_model, poll_s=0.02, emit=events.append) as follower:
        follower.wait(step=1, timeout_s=WAIT_S)
        away = store.rename(store.with_name("away"))
        wait_until(lambda: any(event.kind == "serving-waits" for event in events))
        assert follower.status().waits_for
        with follower.generation() as g:
            assert weight(g) == 1.0
        away.rename(store)
        wait_until(lambda: not follower.status().waits_for)
        trainer.commit(2)
        follower.wait(step=2, timeout_s=WAIT_S)
    assert [event.kind for event in events if event.kind.startswith("serving")] == [
        "serving-waits",
        "serving-follows",
    ]


def test_long_request_holds_its_generation_back_from_being_filled(
    trainer: Trainer, store: Path, events: list[Event]
) -> None:
    trainer.commit(1)
    with Follower(
        store, into=make_model, poll_s=0.02, keep_generations=1, emit=events.append
    ) as follower:
        follower.wait(step=1, timeout_s=WAIT_S)
        with follower.generation() as old:
            trainer.commit(2)
            follower.wait(step=2, timeout_s=WAIT_S)
            trainer.commit(3)
            wait_until(lambda: any(event.kind == "generation-pinned" for event in events))
            assert weight(old) == 1.0
            assert follower.wait(timeout_s=1.0).step == 2
        follower.wait(step=3, timeout_s=WAIT_S)


def test_arguments_that_cannot_work_are_refused(store: Path) -> None:
    model = make_model()
    with pytest.raises(UsageError, match="follow is"):
        Follower(store, into=model, follow="newest")
    with pytest.raises(UsageError, match="keep_generations"):
        Follower(store, into=model, keep_generations=0)
    with pytest.raises(UsageError, match="one module twice"):
        Follower(store, into=lambda: model)
    with pytest.raises(UsageError, match="no module"):
        Follower(store, into=dict)  # type: ignore[arg-type]


def packs_of(store: Path) -> set[Path]:
    return {path for path in (store / "packs").rglob("*") if path.is_file()}


@pytest.fixture
def events() -> list[Event]:
    return []


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)
