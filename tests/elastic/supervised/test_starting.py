"""A trainer that works is started in each of the ways, in real processes that use torch."""

from __future__ import annotations

import pytest

from ckpt.ipc.messages import Bye, Died, Leave

CHOOSE = """
import torch
torch.set_num_threads(2)
{above}
from ckpt.elastic.processes.enter import gather_process_facts
from ckpt.elastic.processes.start_method import choose_start_method
how = choose_start_method(gather_process_facts())
seat = sit(how)
total = torch.ones(1 << 22).add_(1.0).sum().item()
say(seat.how, seat.attempt, total)
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("above", "how"),
    [
        ("", "fork"),
        ("threading.Thread(target=threading.Event().wait, daemon=True).start()", "spawn"),
        ("torch.ones(1 << 22).add_(1.0).sum()", "spawn"),
    ],
)
def test_trainer_runs_parallel_operations_whatever_came_before_the_call(
    program, keeper, above: str, how: str
) -> None:
    run = program(CHOOSE.format(above=above))
    link = keeper.accept()
    for attempt in (1, 2):
        assert link.start(attempt).how == how
        assert run.line() == f"{how} {attempt} {float(1 << 23)}"
        assert link.expect(Died).status == 0
    link.send(Leave(status=0))
    link.expect(Bye)
    assert run.end() == 0
