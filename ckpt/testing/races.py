"""Several processes that try to create the same keys at the same moment."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

from ckpt.backends.base import Backend
from ckpt.errors import KeyExistsError

_ANSWER_S = 120.0


def race_processes(opener: Callable[[], Backend], names: Sequence[str], *, racers: int) -> list[set[str]]:
    """Let ``racers`` fresh processes create each of ``names``; returns which names each of them won.

    The processes meet before each name, so that their puts overlap. ``opener`` must be picklable. Process ``n`` writes
    ``process n``. Raises TimeoutError where one does not answer within two minutes.
    """
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(racers)
    pipes = [context.Pipe(duplex=False) for _ in range(racers)]
    processes = [
        context.Process(target=_race, args=(opener, tuple(names), me, gate.wait, pipes[me][1]), daemon=True)
        for me in range(racers)
    ]
    for process in processes:
        process.start()
    try:
        return [_answer(pipe) for pipe, _ in pipes]
    finally:
        for process in processes:
            process.join(5)
            process.kill()
            process.join()
        for ends in pipes:
            for end in ends:
                end.close()


def _answer(pipe: Connection) -> set[str]:
    if not pipe.poll(_ANSWER_S):
        raise TimeoutError(f"a racing process did not answer. waited_s={_ANSWER_S}")
    won: set[str] = pipe.recv()
    return won


def _race(
    opener: Callable[[], Backend], names: Sequence[str], me: int, meet: Callable[[float], int], answer: Connection
) -> None:
    store = opener()
    won = set()
    for name in names:
        meet(_ANSWER_S)
        try:
            store.put(name, [f"process {me}".encode()], create_only=True)
            won.add(name)
        except KeyExistsError:
            pass
    answer.send(won)
    store.close()
