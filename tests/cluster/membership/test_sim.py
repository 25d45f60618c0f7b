"""Many seeds of ``membership_sim``: one line of epochs, nobody acts whose ranks were given away,
and all goes on in the end."""

from __future__ import annotations

import os

import pytest
from kit.membership.simulation import MembershipSimulation

SOAK = os.environ.get("CKPT_SOAK") == "1"
SEEDS = 10_000 if SOAK else 200
GROUPS = 20 if SOAK else 4


@pytest.mark.slow
@pytest.mark.parametrize("group", range(GROUPS))
def test_whatever_fails_there_is_one_line_of_epochs_and_it_goes_on(group: int) -> None:
    epochs = 0
    for seed in range(group, SEEDS, GROUPS):
        world = MembershipSimulation(seed)
        try:
            world.run()
        except Exception as error:
            raise AssertionError(f"seed={seed} now_s={world.now_s:.3f}") from error
        epochs += len(world.service.epochs)
    assert epochs > 2 * SEEDS // GROUPS  # the faults had something to spoil


def test_a_run_is_the_same_for_the_same_seed() -> None:
    one, other = MembershipSimulation(3), MembershipSimulation(3)
    one.run()
    other.run()
    assert one.service.epochs == other.service.epochs
