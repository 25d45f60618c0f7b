"""One read of the store gives one wrong bit: a second read gives the right bytes, and nothing older
is taken."""

from __future__ import annotations

import pytest
import torch

import ckpt
from ckpt.backends.memory import MemoryBackend
from ckpt.testing.faults import Fault, FaultyBackend, Harm

NEWEST = 2
KINDS = ("ckpt.json", "log/", "manifests/", "parts/", "packs/")


def state(step: int) -> dict[str, object]:
    """Two tensors and a number; all say their step."""
    values = torch.full((3_000,), float(step))
    return {"state": {"a": values, "b": torch.arange(70) + step, "step": step}}


@pytest.fixture
def store() -> MemoryBackend:
    store = MemoryBackend("flipped")
    with ckpt.Checkpointer(store, job="job", compression="off") as checkpointer:
        for step in (1, NEWEST):
            checkpointer.save(state(step), step=step)
    return store


@pytest.mark.parametrize("harm", [Harm.FLIPPED, Harm.TRUNCATED], ids=lambda harm: harm.value)
@pytest.mark.parametrize("kind", KINDS)
def test_any_one_read_of_a_restore_may_be_wrong(
    store: MemoryBackend, kind: str, harm: Harm
) -> None:
    struck = 0
    for skip in range(50):
        faulty = FaultyBackend(store, [Fault(harm=harm, op="read_into", key=kind, skip=skip)])
        with ckpt.Checkpointer(faulty, job="job") as checkpointer:
            target = state(0)
            assert checkpointer.restore(target).step == NEWEST
            assert checkpointer.verify().damaged == ()
        assert target["state"]["step"] == NEWEST  # type: ignore[index]
        struck += len(faulty.struck)
        if not faulty.struck:
            break
    assert struck > 0, "no read of this kind was harmed"


def test_what_stays_wrong_is_still_damage(store: MemoryBackend) -> None:
    always = Fault(harm=Harm.TRUNCATED, op="read_into", key="packs/", times=None)
    with (
        ckpt.Checkpointer(FaultyBackend(store, [always]), job="job") as checkpointer,
        pytest.raises(ckpt.IntegrityError),
    ):
        checkpointer.restore(state(0))
    with ckpt.Checkpointer(FaultyBackend(store, [always]), job="job") as checkpointer:
        assert checkpointer.verify().damaged
