"""What a round's store says in the place of agents that are gone, so that nobody waits for them. Pure.

torch's agent asks its store at two moments, and can't be told there that a round is over. When it hands out ranks it would
wait for what a dead agent never says: it gets ranks of a world that can't come together, and is asked back to the
rendezvous before its workers have imported anything. When its workers have ended well it would wait minutes for agents that are
no more: it waits for those that live.
"""

from __future__ import annotations

import json

ROLE_INFO = "torchelastic/role_info/"
ASSIGNED = "torchelastic/assigned_ranks/"
EXIT_COUNT = "torchelastic/agent/terminal_state/num_members"
EXIT_DONE = "torchelastic/agent/terminal_state/last_member"

NOWHERE = 10**6
"""Ranks of a world of at least that many come together never."""


def of_agent(key: str) -> bool:
    """Whether agents wait for ``key`` when they hand out ranks."""
    return key.startswith((ROLE_INFO, ASSIGNED))


def stand_in(key: str) -> bytes:
    """What an agent that is gone would have said under a key of ``of_agent``."""
    number = int(key.rpartition("/")[2])
    if key.startswith(ROLE_INFO):
        return json.dumps({"role": "gone", "rank": number, "local_world_size": NOWHERE}).encode()
    first = (number + 1) * NOWHERE
    return json.dumps([first, NOWHERE**2, first, NOWHERE**2]).encode()


def seat_apart(role_info: bytes, agents: int) -> bytes:
    """The ranks of workers that have no place: of a world of ``agents`` like their own, and beyond its end."""
    here = int(json.loads(role_info)["local_world_size"])
    world = agents * here
    return json.dumps([world, world, world, world]).encode()
