"""How a trainer is started: forked, spawned as a fresh process, or not at all. Pure.

``enter.gather_process_facts`` collects the facts.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessFacts:
    """What a process knows about itself at the start of a decorated call.

    ``ranks_unknown``: there are several ranks, and the number on this node is unknown.
    ``unranked_child``: multiprocessing started this process, and it has no rank. ``threads`` are
    the names of Python threads beside the main one. ``main_thread``: the call is made there.
    ``event_loop``: the call is made inside a running loop of asyncio.
    ``rerun``: the same command can be run again. ``probe_hung``: a forked child did not return
    from one parallel operation.
    """

    platform: str = "linux"
    asked_in_place: bool = False
    under_pytest: bool = False
    notebook: bool = False
    process_group: bool = False
    several_nodes: bool = False
    ranks_unknown: bool = False
    unranked_child: bool = False
    main_thread: bool = True
    event_loop: bool = False
    threads: tuple[str, ...] = ()
    gpu_open: bool = False
    rerun: bool = True
    probe_hung: bool = False


@dataclass(frozen=True, slots=True)
class Fork:
    """Trainers are forked: every import and every value above the call is there at once."""


@dataclass(frozen=True, slots=True)
class Spawn:
    """Trainers are fresh interpreters that run the same command up to the call.

    ``reason``: why no fork. ``folder``: where the command runs ("": where this process started).
    """

    reason: str
    folder: str = ""


@dataclass(frozen=True, slots=True)
class InPlace:
    """No supervisor: the function runs in this process, and only the launcher can restart it.

    ``remedy`` says what to change; "" if this is intended and needs no warning.
    """

    reason: str
    remedy: str = ""


def choose_start_method(facts: ProcessFacts) -> Fork | Spawn | InPlace:
    """How to start trainers in a process with these ``facts``."""
    in_place = _in_place(facts)
    if in_place is not None:
        return in_place
    reason = _no_fork(facts)
    if reason is None:
        return Fork()
    if facts.rerun:
        return Spawn(reason)
    return InPlace(
        f"{reason}, and the command that started this process cannot be run a second time",
        "call the decorated function before any thread, GPU or parallel operation is used",
    )


def _in_place(facts: ProcessFacts) -> InPlace | None:
    if facts.asked_in_place:
        return InPlace("CKPT_IN_PLACE=1")
    if facts.under_pytest:
        return InPlace("the call is part of a test under pytest")
    if facts.platform != "linux":
        return InPlace(
            f"trainers are restarted on Linux only. platform={facts.platform}", "run it on Linux"
        )
    if facts.process_group:
        return InPlace(
            "a process group exists before the decorated call, and a new trainer could not leave "
            "it",
            "call init_process_group() inside the decorated function",
        )
    if facts.notebook:
        return InPlace(
            "this is a notebook or an interactive interpreter", "run the program as a script"
        )
    if facts.unranked_child:
        return InPlace(
            "multiprocessing started this process, so the program's ranks are not known to each "
            "other",
            "start the ranks by torchrun",
        )
    if facts.ranks_unknown:
        return InPlace(
            "it is unknown how many of the job's ranks are on this node",
            "set LOCAL_WORLD_SIZE beside WORLD_SIZE and RANK, as torchrun does",
        )
    if facts.several_nodes:
        return InPlace(
            "the job has several nodes, whose keepers don't know of each other",
            "start it by ckpt run or --rdzv-backend=ckpt",
        )
    if not facts.main_thread:
        return InPlace(
            "the decorated function is called in a thread beside the main one",
            "call it in the main thread",
        )
    if facts.event_loop:
        return InPlace(
            "the decorated function is called inside a running event loop, which a second process "
            "would share",
            "call it outside of asyncio.run()",
        )
    return None


def _no_fork(facts: ProcessFacts) -> str | None:
    """Why a forked child would not work, or None."""
    if facts.threads:
        return f"Python threads run before the decorated call. threads={', '.join(facts.threads)}"
    if facts.gpu_open:
        return "a GPU is in use before the decorated call"
    if facts.probe_hung:
        return "parallel operations ran before the decorated call, and hang in a forked child"
    return None
