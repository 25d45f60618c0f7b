"""Whether a history is one that may be: no split brain, no wrong state, nothing lost. Pure.

Each rule returns what is wrong, in words that name it; a run is right where all of them return
nothing. The log's rules have a file of their own (``nemesis_log``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

from kit.nemesis.history import History, Pause, Step, Trainer
from kit.nemesis.log import LOG_RULES, Log, read_log
from kit.nemesis.members import Members, read_members

MARGIN_PART = 0.1
"""How much of the TTL a node that lost touch has for stopping, before its lease can run out."""

WAKE_NS = 1_500_000_000
"""Within this time after it went on, or its time was called off, a process is killed; on a busy
machine too."""

SHOWN_MAX = 12


def check(history: History) -> list[str]:
    """All that is wrong with a run; empty where nothing is."""
    members, log = read_members(history.changes), read_log(history.log)
    wrong = list(members.wrong)
    for rule in RULES:
        wrong += rule(history, members)[:SHOWN_MAX]
    for log_rule in LOG_RULES:
        wrong += log_rule(history, log)[:SHOWN_MAX]
    return [*wrong, *attempts_and_epochs(history, log)]


def seats(history: History, members: Members) -> list[str]:
    """Each trainer sat where the membership's epoch placed its rank, and nobody else sat there in
    that epoch."""
    wrong = []
    seen: dict[tuple[int, int], Trainer] = {}
    for who in dict.fromkeys(one.who for one in history.entered):
        published = members.epoch(who.attempt)
        if published is None:
            wrong.append(f"trained in an epoch that was never published. {who}")
        elif (
            published.machines[who.rank : who.rank + 1] != (who.machine,)
            or len(published.machines) != who.world
        ):
            wrong.append(
                f"trained where its epoch places somebody else. {who} places={published.machines}"
            )
        other = seen.setdefault((who.attempt, who.rank), who)
        if other is not who:
            wrong.append(f"one rank of one epoch was trained by two. {other} and {who}")
    return wrong


def states(history: History, members: Members) -> list[str]:
    """Every state that a trainer ever had is the undisturbed one after so many steps; steps follow
    each other."""
    wrong = []
    reference = history.reference
    for one in history.entered:
        if one.value != reference[one.step] or not one.clean or len(one.trail) != one.step:
            wrong.append(
                f"restored a wrong state. {one.who} step={one.step} pair={one.pair} "
                f"clean={one.clean}"
            )
        if one.pair is not None and one.pair[1] != one.step:
            wrong.append(
                f"restored another step than it says. {one.who} step={one.step} pair={one.pair}"
            )
    wrong += [
        f"a step differs from the undisturbed run. {one.who} step={one.step}"
        for one in history.steps
        if one.value != reference[one.step + 1]
    ]
    begins = {one.who: one.step for one in history.entered}
    for who, steps in _by_trainer(history.steps).items():
        numbers = [one.step for one in steps]
        if numbers != list(range(begins.get(who, -1), begins.get(who, -1) + len(numbers))):
            wrong.append(
                f"steps do not follow each other. {who} begin={begins.get(who)} "
                f"steps={numbers[:5]}…"
            )
    return wrong


def one_epoch_at_a_time(history: History, members: Members) -> list[str]:
    """Once an epoch has taken a step, no older one takes any: it needs all its ranks, and one of
    them is gone.

    A trainer that was stopped inside a step may end it when it is let go on. What it began is what
    counts.
    """
    firsts: dict[int, int] = {}
    lasts: dict[int, Step] = {}
    for one in history.steps:
        attempt = one.who.attempt
        firsts[attempt] = min(firsts.get(attempt, one.began_ns), one.began_ns)
        if attempt not in lasts or lasts[attempt].began_ns < one.began_ns:
            lasts[attempt] = one
    wrong = []
    for older, last in lasts.items():
        later = [
            (first, attempt)
            for attempt, first in firsts.items()
            if attempt > older and last.began_ns > first
        ]
        wrong += [
            f"two epochs trained at once. epoch={older} took step {last.step} on "
            f"{last.who.machine} "
            f"{(last.began_ns - first) / 1e9:.3f} s after epoch {attempt} had begun"
            for first, attempt in later
        ]
    return wrong


def whole_steps(history: History, members: Members) -> list[str]:
    """What one rank of an epoch completed, all ranks of it began: a step needs all of them."""
    reached: dict[int, dict[int, int]] = {}
    for one in history.entered:
        reached.setdefault(one.who.attempt, {})[one.who.rank] = one.step - 1
    for step in history.steps:
        ranks = reached.setdefault(step.who.attempt, {})
        ranks[step.who.rank] = max(ranks.get(step.who.rank, -1), step.step)
    return [
        f"a rank went on without another. epoch={attempt} last steps={ranks}"
        for attempt, ranks in reached.items()
        if max(ranks.values()) - min(ranks.values()) > 1
    ]


def within_lease(history: History, members: Members) -> list[str]:
    """No trainer lives on after its node's time is over, but for one that slept and is killed when
    it wakes.

    That time is the lease's, or, while etcd answers nobody, that of the last roll that all nodes of
    the epoch answered.
    """
    margin_ns = int(history.ttl_s * MARGIN_PART * 1e9)
    return [
        f"a trainer lived {over_ns / 1e9:.3f} s after its node's time was over. {who}"
        for who, over_ns in _overtime_ns(history).items()
        if over_ns > margin_ns
    ]


def silent_nodes_stop(history: History, members: Members) -> list[str]:
    """Whoever was cut off for a TTL does not train: what it knew of its lease and of others was
    older than that by then."""
    wrong = []
    for silence in history.silences:
        over_ns = silence.from_ns + int(history.ttl_s * 1e9)
        late = [
            one
            for one in history.beats
            if one.who.machine == silence.machine
            and over_ns < one.at_ns <= silence.to_ns
            and not _woke(one.who, one.at_ns, history.pauses)
        ]
        if late:
            lived_s = (max(one.at_ns for one in late) - over_ns) / 1e9
            wrong.append(
                f"a trainer lived {lived_s:.3f} s longer than a TTL after its node was cut off. "
                f"{late[0].who}"
            )
    return wrong


def ends(history: History, members: Members) -> list[str]:
    """All programs that nobody killed ended well, and all ranks with the wanted state."""
    wrong = [
        f"a program ended badly. machine={name} status={code}"
        for name, code in history.ends.items()
        if code != 0
    ]
    if not history.finals:
        wrong.append("no rank came to its end")
    for rank, final in history.finals.items():
        if final.step != history.finish or final.value != history.reference[history.finish]:
            wrong.append(
                f"the final state is not that of an undisturbed run. rank={rank} step={final.step}"
            )
    return wrong


def attempts_and_epochs(history: History, log: Log) -> list[str]:
    """Epochs of the log come in the order of the membership's, and each belongs to one of them."""
    of_epoch: dict[int, set[int]] = {}
    for one in (*history.entered, *history.steps):
        of_epoch.setdefault(one.epoch, set()).add(one.who.attempt)
    wrong = [
        f"two attempts in one epoch of the log. epoch={e} attempts={a}"
        for e, a in of_epoch.items()
        if len(a) > 1
    ]
    order = [min(attempts) for _, attempts in sorted(of_epoch.items())]
    wrong += [
        f"an older attempt opened a later epoch. {before} after {after}"
        for before, after in pairwise(order)
        if before > after
    ]
    return wrong


RULES: tuple[Callable[[History, Members], list[str]], ...] = (
    seats,
    states,
    one_epoch_at_a_time,
    whole_steps,
    within_lease,
    silent_nodes_stop,
    ends,
)


def lateness_s(history: History) -> float:
    """How long after its node's time was over a trainer lived at most, of those that had not slept;
    negative: before."""
    return max(_overtime_ns(history).values(), default=0) / 1e9


def _overtime_ns(history: History) -> dict[Trainer, int]:
    """How long each trainer lived after its node's time.

    A node that went on by the roll alone and is then told that its lease is gone has its time
    called off: then its trainers are killed as fast as a supervisor hears of it, which no margin
    covers.
    """
    longest: dict[Trainer, int] = {}
    fine: dict[Trainer, int] = {}
    """When each was last seen to live within it."""
    for one in history.beats:
        who = one.who
        if not one.until_ns or _woke(who, one.at_ns, history.pauses):
            continue
        if one.at_ns <= one.until_ns:
            fine[who] = one.at_ns
            longest[who] = max(longest.get(who, one.at_ns - one.until_ns), one.at_ns - one.until_ns)
            continue
        called_off_ns = fine.get(who, 0)
        over_ns = one.at_ns - (
            one.until_ns if called_off_ns <= one.until_ns else called_off_ns + WAKE_NS
        )
        longest[who] = max(longest.get(who, over_ns), over_ns)
    return longest


def _woke(who: Trainer, at_ns: int, pauses: tuple[Pause, ...]) -> bool:
    """Whether a trainer had been stopped itself shortly before; where its keeper alone was, it has
    no excuse."""
    return any(
        one.machine == who.machine
        and one.what != "keeper"
        and one.from_ns <= at_ns <= one.to_ns + WAKE_NS
        for one in pauses
    )


def _by_trainer(steps: tuple[Step, ...]) -> Mapping[Trainer, list[Step]]:
    found: dict[Trainer, list[Step]] = {}
    for one in steps:
        found.setdefault(one.who, []).append(one)
    return found
