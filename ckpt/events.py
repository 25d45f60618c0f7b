"""Events: what ckpt reports while it works, in one form.

An event is a kebab-case kind, a sentence for people and flat facts for programs. Code that reports
takes an ``Emit`` callable; a session passes one that writes to Python's logger ``ckpt``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

Fact = str | int | float | bool | None

# Programs match on these kinds, so a kind keeps its name and its meaning. A test compares this
# table with what the package emits.
KINDS: Final[Mapping[str, str]] = {
    # ---- a run
    "epoch": "an epoch is open in the log; snapshots captured from here on belong to it",
    "paused": "training paused (`run.paused()`); the hang watch waits too",
    "resumed": "training resumed after a pause",
    "unprotected": "the program uses its run in a way that protects nothing",
    "log": "values that the user logged",
    "spawn": "trainers are started as fresh interpreters, because a fork would not be safe",
    "unwritten-file": "a file from above the call can't be written out, so attempts may repeat it",
    "pipe-above": "a process from above the call reads from a pipe that never ends for it",
    "left": "a rank left without telling the other ranks",
    "late-leaver": "a rank did not report that it left, within the time limit",
    # ---- saving
    "staged": "a snapshot is in shared memory",
    "durable": "a snapshot is committed on enough stores",
    "end-waits": "training is finished and its last snapshot is not durable yet; tried again",
    "skipped": "a due snapshot is skipped, because no slot was free or the last is not durable yet",
    "save-failed": "a snapshot did not become durable",
    "tag-failed": "a snapshot is durable, but lacks a tag",
    "base-gone": "what a snapshot refers to was dropped meanwhile, so it is written again whole",
    "memory-every": "copies in memory are taken at another interval from here on",
    "memory-short": "not enough shared memory for all slots",
    "replicas-unsampled": "replicas are not compared, because a device's memory is full",
    "pinning-refused": "copies from CUDA devices are slow, because their memory is not locked",
    "replicas-diverged": "ranks hold different bytes of what they should hold alike",
    # ---- restoring
    "fallback": "a snapshot was damaged; an older one is restored",
    "suspect-restored": "the restored snapshot is marked as a mixture of different replicas",
    "read-elsewhere": "stored bytes were damaged; equal ones of another place were restored",
    "chosen-anew": "a newer snapshot was committed in the meantime and is restored instead",
    "maybe-stale": "too few stores answered to know that the restored snapshot is the newest",
    "untracked": "the restored snapshot has items that the program does not track",
    "settling": "waiting until the last run's snapshot is durable",
    "unsettled": "the last run's snapshot did not become durable within the time limit",
    # ---- a node's processes
    "keeper-busy": "waiting for the keeper of the last run",
    "keeper-silent": "the keeper of the last run does not answer",
    "keeper-replaced": "a new keeper took over, or training continues without one",
    "keeper-alarm": "an alarm of the keeper that this process writes through",
    "keeper-failed": "a defect in the keeper",
    "no-keeper": "no keeper can be started or reached; state is not protected by one",
    "home-lost": "the keeper lost its runtime folder",
    "home-renewed": "the keeper made its socket anew",
    "preempted": "the program stopped at a boundary because its machine is to be taken away",
    "slow-start": "an attempt's first step takes very long",
    "replaced": "the keeper ended for one with the settings of a new launch",
    "full": "the keeper cannot accept another connection",
    "stranger-refused": "another user's process connected to the keeper",
    "peer-lost": "a process lost its connection to the keeper",
    "refused": "the keeper refused a request",
    "stalled": "the keeper or its machine stood still",
    "not-thin": "a supervisor could not drop what the program built above the call",
    "not-prepared": "not enough memory to start a trainer ahead of need",
    "prepared-died": "a trainer that was started ahead of need died",
    "missing": "a rank or a node has not joined yet",
    "ended": "the launch ends: all supervisors leave",
    "recovered": "the ranks train again after a failure, and how long that took",
    "stacks": "the stack of a rank that hangs",
    # ---- uploads by the keeper
    "open-failed": "an epoch could not be opened in the log",
    "open-waits": "an epoch cannot be opened yet; tried again",
    "choices-wait": "the log cannot be read yet; tried again",
    "store-waits": "whether all nodes see the same stores is not known yet",
    "follow-waits": "an upload cannot be followed up yet; tried again",
    "store-changed": "the store's log was replaced by another one",
    "settle-failed": "the final flush failed",
    "dropped": "the keeper ended before everything was durable",
    # ---- nodes of a job
    "joined": "this node is a member of its job",
    "out": "this node lost its membership and joins again",
    "leads": "this node is the leader",
    "epoch-published": "the leader published an epoch",
    "suspects": "this node suspects another one to be dead",
    "leave-failed": "a membership could not be ended; its lease will run out",
    "membership-waits": "the membership service does not answer; tried again",
    "membership-failed": "a defect in the membership",
    "line-refused": "a connection between two nodes was refused",
    "nodes-awaited": "for which nodes of the job this one waits",
    "node-refused": "a member gets no ranks, and why",
    "tls": "how connections between nodes are encrypted, or that a certificate expires soon",
    "peer-server-defect": "a defect in the server that serves this node's memory",
    # ---- mirrors in peers' memory
    "protected": "each node's state is mirrored again",
    "mirror-failed": "state could not be mirrored to a peer",
    "mirrors-begin-anew": "mirrors are made anew",
    "memory-awaited": "nodes have not said which snapshots they hold in memory",
    "memory-gathered": "which snapshots the nodes' memory holds is known",
    "memory-lost": "the nodes' memory does not hold all ranks' state",
    # ---- rendezvous under torchrun
    "round": "the agents' next round is published",
    "round-over": "a round ended before it began",
    "apart": "this node starts its workers without ranks",
    "asked-back": "the workers of this node are started anew",
    "standby-released": "the job ended without needing this node",
    "close-failed": "the rendezvous could not be closed",
    "agent-out": "an agent lost its membership and joins again",
    "rendezvous-waits": "the agents' membership service does not answer; tried again",
    # ---- several stores
    "stores": "the log's set of stores changed",
    "store-down": "a store does not answer; writes to it are put off",
    "store-back": "a store answers again and receives what it missed",
    "store-behind": "a store lacks records of the log, or objects that another store has",
    "store-empty": "a store came back empty and cannot be filled",
    "store-returns": "a store came back empty and is being filled",
    "store-full": "a store holds everything again and counts",
    "under-replicated": "an object is on fewer stores than required",
    "copy-mended": "missing copies were written",
    "fill-damaged": "a store was filled, but some objects are damaged on every other store",
    "mark-unwritten": "what was seen of the log cannot be noted on this machine",
    "scrub-unnoted": "no store took the note of where a scrub is",
    "care-waits": "store maintenance could not run; tried again",
    "care-failed": "a defect in store maintenance",
    # ---- serving
    "generation": "another generation of the model is served",
    "generation-back": "a generation that was kept in memory is served again",
    "generation-pinned": "a generation's memory waits for requests that still use it",
    "generation-refused": "a snapshot is not served, because something is wrong with it",
    "serving-waits": "a follower can't see what is newest; it serves what it has",
    "serving-follows": "a follower sees the log again",
    "haproxy": "an HAProxy follows a serving group, or can't",
    "front": "a front of a serving group listens, or answers",
    "replica-ended": "a replica process ended and is started again",
    "replica-drains": "a replica of a serving group leaves",
    "replica-failed": "a replica of a serving group can't begin",
    "request-failed": "a handler of a serving group's requests raised",
    "replica-promoted": "a replica of a serving group gets requests from now on",
    "group-empty": "no replica of a serving group can serve",
    "group-silent": "the records of a serving group can't be read or written",
    "group-unreadable": "a record of a serving group is broken and counts as missing",
    "group-well": "the records of a serving group can be read again",
    "on-swap-failed": "the user's on_swap raised",
    # ---- maintenance
    "gc": "snapshots that no policy keeps were dropped",
    "gc-failed": "dropping snapshots failed",
    "gc-rule": "a rule of what to keep could not be applied, so it drops nothing",
    "gc-fenced": "a newer epoch is open; this process drops nothing any more",
    "swept": "unreferenced objects of a store were deleted",
    "sweep-held": "a sweep kept objects, because a snapshot cannot be read",
    "sweep-stopped": "a sweep of a store ended early",
    "sync-damage": "an object could not be copied, because it is damaged",
    "scrub-damage": "a scrub found damage",
    "scrub-mended": "a scrub wrote a copy anew",
    "scrub-done": "a scrub ended",
}


@dataclass(frozen=True, slots=True)
class Event:
    """One occurrence. ``kind`` is a key of ``KINDS``; ``alarm`` marks what a person should see."""

    kind: str
    text: str
    facts: Mapping[str, Fact] = field(default_factory=dict)
    alarm: bool = False


Emit = Callable[[Event], None]
"""Receives events. Must return quickly and must not raise."""


def emit_to_logging(rank: int) -> Emit:
    """An ``Emit`` that writes to the logger ``ckpt``, with facts as ``key=value``.

    Alarms are warnings, all others are info. Warnings are written as ``log_warning`` does.
    """

    def emit(event: Event) -> None:
        if not event.alarm and not _LOGGER.isEnabledFor(logging.INFO):
            return
        facts = " ".join(f"{key}={value}" for key, value in event.facts.items())
        text = f"[rank {rank}] {event.text}{f' ({facts})' if facts else ''}"
        if event.alarm:
            log_warning(text)
        else:
            _LOGGER.info("%s", text)

    return emit


_LOGGER = logging.getLogger("ckpt")


def log_warning(text: str) -> None:
    """Write a warning to the logger ``ckpt``, also if it is disabled.

    ``logging.config`` disables every logger that exists and that its configuration does not name,
    unless it is told not to: that must not silence alarms. Levels, handlers and
    ``logging.disable`` are the program's choice and hold.
    """
    level = logging.WARNING
    if not _LOGGER.disabled:
        _LOGGER.warning("%s", text)
    elif level > _LOGGER.manager.disable and level >= _LOGGER.getEffectiveLevel():
        record = _LOGGER.makeRecord(_LOGGER.name, level, "", 0, "%s", (text,), None)
        if _LOGGER.filter(record):
            _LOGGER.callHandlers(record)
