"""``@ckpt.resilient``: makes a training function continue where its last run stopped."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Concatenate, Literal, ParamSpec, TypeVar

from ckpt.elastic.boundaries import Milestones
from ckpt.elastic.failure import ExitReporter, die, ends_process
from ckpt.elastic.processes.enter import enter
from ckpt.elastic.processes.trainer import trainer_of_process, watch_process_group
from ckpt.elastic.run import Run
from ckpt.elastic.schedule import (
    capture_rule,
    parse_duration,
    parse_every,
    parse_memory_every,
)
from ckpt.elastic.sigterm import InPlaceSigterm
from ckpt.elastic.verdict import fenced_verdict, give_verdict
from ckpt.errors import UsageError
from ckpt.ipc.messages import Policy
from ckpt.session.keeper.attachment import keeper_spec
from ckpt.session.options import (
    KeepArgument,
    SessionOptions,
    StorageOptions,
    StoreArgument,
    check_grace,
    check_keep,
    check_only,
    check_store,
)
from ckpt.session.session import Session

# ---- nested runs: allowed with different stores only
#
# Two runs of one store would each open an epoch, and the inner one would fence the outer one.

_OPEN: ContextVar[tuple[str, ...]] = ContextVar("ckpt_open_runs", default=())


@contextmanager
def claimed_store(url: str) -> Iterator[bool]:
    """Mark ``url`` as in use while the body runs; yields whether no other run is around this one.

    Raises UsageError if a run around this one uses the same store.
    """
    if url in _OPEN.get():
        raise UsageError(
            f"a run inside a run of the same store would fence it. store={url}; give the inner one "
            "a store of its own, or pass "
            "the outer Run to the inner function"
        )
    token = _OPEN.set((*_OPEN.get(), url))
    try:
        yield len(_OPEN.get()) == 1
    finally:
        _OPEN.reset(token)


# ---- the user's choices about failures

NEVER = "never"


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """When a job whose trainer failed is restarted, and when a trainer counts as hanging.

    ``same_error_max``: the same exception of the program at the same step, that often in a row,
    is a bug: the job ends with it (1: never restart after an exception); an outage counts only
    after a pause of 15 s. ``stuck_max``: that many failures in a row without a new step, with
    growing pauses between them, end the job. ``hang``: the least time without a completed
    step that counts as a hang, or ``"never"``; if the job's own steps are long, ten times the
    longest recent one. Pauses and debuggers are exempt. ``start``: as that, for the first step of
    an attempt, which may compile; once one was completed in this launch on the same nodes, ten
    times what it took, at least ``hang``. ``build``: as that, for each stretch of what precedes the
    first step: up to the function, to ``run.track``, of the restore, and from there on; not while
    the keeper waits for a store. ``grace``: how long a preempted
    job may take until it has ended; its trainers get four fifths of that. ``linger``: how long
    slots are kept for a program that was killed as a whole. ``end_wait``: how long the end of a
    finished training is tried again while the store does not take it (``"never"``: raise at once).
    Raises UsageError if a value cannot work.
    """

    same_error_max: int = 2
    stuck_max: int = 5
    hang: str = "10m"
    start: str = "30m"
    build: str = "2h"
    grace: str = "25s"
    linger: str = "60s"
    end_wait: str = "1h"

    def __post_init__(self) -> None:
        for name in ("same_error_max", "stuck_max"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name} counts from 1 on. {name}={value!r}")
        self.message()
        self.end_wait_s  # noqa: B018  raises for what is no duration

    @property
    def end_wait_s(self) -> float:
        """How long the end is tried again, in seconds; 0 for never."""
        return 0.0 if self.end_wait == NEVER else parse_duration(self.end_wait, name="end_wait")

    def message(self) -> Policy:
        """The policy as the keeper receives it."""
        return Policy(
            same_error_max=self.same_error_max,
            stuck_max=self.stuck_max,
            hang_s=0.0 if self.hang == NEVER else parse_duration(self.hang, name="hang"),
            start_s=0.0 if self.start == NEVER else parse_duration(self.start, name="start"),
            build_s=0.0 if self.build == NEVER else parse_duration(self.build, name="build"),
            grace_s=parse_duration(self.grace, name="grace"),
            linger_s=parse_duration(self.linger, name="linger"),
        )


P = ParamSpec("P")
R = TypeVar("R")


def resilient(  # noqa: PLR0913  one keyword for each choice of the user, all in one docstring
    *,
    store: StoreArgument,
    every: int | str = "auto",
    job: str | None = None,
    memory_every: int | Literal["auto"] = 1,
    slots: int | Literal["auto"] = 3,
    compression: Literal["off", "auto", "on"] = "auto",
    only: Sequence[str] | None = None,
    missing: Literal["error", "keep"] = "error",
    classes: Literal["same", "any"] = "same",
    max_stale: str | None = None,
    restart: RestartPolicy | None = None,
    prepared: bool = False,
    storage_options: StorageOptions = None,
    write_quorum: int | None = None,
    encryption_key: str | None = None,
    scrub_every: str | None = "24h",
    keep: KeepArgument = None,
    grace: str = "auto",
) -> Callable[[Callable[Concatenate[Run, P], R]], Callable[P, R]]:
    """Make a training function survive failures: what it tracks is saved, and training continues
    from there when a process dies.

    The process that calls the function becomes a supervisor. The function, and the rest of the
    program after it, run in a process forked from the supervisor, and again, from the last step
    in memory, when any rank's process dies. If that is impossible, the function runs in place
    with a warning that says why, and a restart by the launcher continues from the store.

    An exception that leaves the function, or ``SystemExit`` with a status other than 0, ends a
    supervised process at once, with its traceback: no ``except``, ``finally`` or ``with`` block
    around the call and no exit handler runs, because the next process starts inside them. Only
    errors that a restart would meet again leave the call: ``UsageError``, ``FencedError``,
    ``IntegrityError``, ``NotFoundError``, Ctrl-C, a preemption; and all with
    ``RestartPolicy(same_error_max=1)`` and in place.

    The decorated function receives a ``Run`` before its own arguments. Nothing is read or written
    before it tracks something, except that of several nodes each looks which log its stores hold.

    ``store`` is a path, an fsspec URL or a ``Backend``, or a list of paths and URLs that will all
    hold the same; a snapshot is durable when ``write_quorum`` of them have it (default: the
    majority). ``job`` names the run in its store (default: the store's last path component).
    ``storage_options`` go to fsspec: for all stores, or a list with one entry for each.
    ``encryption_key`` says where the key is with which everything is encrypted that leaves this
    machine: ``"file:PATH"``, ``"env:NAME"`` or ``"command:WORDS"``.

    ``every`` is a number of steps, a duration such as ``"30s"``, or ``"auto"``: these snapshots
    become durable. ``memory_every``: the number of boundaries from one snapshot in memory to the
    next (0: none); each costs one memcpy of this rank's share. ``"auto"``: as many as keep that
    within 1 to 2 % of the steps' time, measured while training runs. ``slots``: how many staged
    snapshots memory may hold, each as large as this rank's share of the state; fewer, with an
    alarm, if memory has no room for them. ``"auto"``: 3 or 2 (without a keeper also 1), so that a
    tenth of the memory stays free. ``compression``:
    chunks are compressed never, if it pays, or always. ``max_stale``: a duration after which
    training stops with UnavailableError if nothing became durable (default: never; a dead store
    only raises alarms).

    ``only``, ``missing`` and ``classes`` say what is restored if the program has changed since: see
    ``Checkpointer.restore``. ``restart``: when to restart, and what counts as a hang.
    ``prepared``: keep a second process at the point that ``run.ready()`` marks, so that a long
    start-up is done before it is needed; costs the memory that the program takes up to there.

    ``keep``: which snapshots stay, a policy such as ``keep_last(5) | keep_best("loss")`` or its
    text ``"last=5,best=loss:1"`` (default: all). The newest and tagged ones always stay. The
    others are dropped in the background after commits, and their bytes are deleted ``grace``
    later by the stores' clocks (default: a quarter of an hour, more if restores take longer, less
    while a store is full): longer than any restore that may have begun before.
    ``scrub_every``: a duration after the last scrub of the stores, by whatever process, after
    which the keeper reads everything in them at a low rate, compares and repairs it, and raises an
    alarm for what it cannot repair; None for never (`ckpt scrub` does it on request).

    Raises UsageError at once if an argument cannot work.
    """
    schedule = parse_every(every)
    copy_every = parse_memory_every(memory_every)
    restart = restart or RestartPolicy()
    policy, end_wait_s = restart.message(), restart.end_wait_s
    address = check_store(store, write_quorum=write_quorum)
    stale_s_max = parse_duration(max_stale, name="max_stale") if max_stale is not None else None
    options = SessionOptions(
        job=job,
        slots=slots,
        compression=compression,
        only=check_only(only),
        missing=missing,
        classes=classes,
        storage_options=storage_options,
        write_quorum=write_quorum,
        encryption_key=encryption_key,
        scrub_every_s=parse_duration(scrub_every, name="scrub_every")
        if scrub_every is not None
        else None,
        keep=check_keep(keep),
        grace_s=check_grace(grace),
    )

    def decorate(function: Callable[Concatenate[Run, P], R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            trainer = enter(
                keeper_spec(address, options),
                policy,
                capture_rule=capture_rule(schedule, copy_every),
                prepare=prepared,
            )
            milestones = Milestones()
            milestones.reach("entered")
            if trainer is not None:
                watch_process_group(lambda: milestones.reach("group"))
            session = Session(address, options)
            with claimed_store(session.url) as outermost:
                exit_reporter = ExitReporter(session, outermost=outermost)
                run = Run(
                    session,
                    schedule,
                    stale_s_max=stale_s_max,
                    memory_every=copy_every,
                    trainer=trainer,
                    milestones=milestones,
                    end_wait_s=end_wait_s,
                    exit_reporter=exit_reporter,
                )
                in_place = (
                    InPlaceSigterm(lambda: run.stop(policy.grace_s))
                    if trainer is None
                    else nullcontext()
                )
                try:
                    with in_place:
                        exit_reporter.entered(milestones)
                        result = function(run, *args, **kwargs)
                        run.finish()
                except BaseException as error:
                    if (verdict := fenced_verdict(error)) is not None and outermost:
                        give_verdict(verdict)
                    if ends_process(
                        error,
                        trainer_of_process(),
                        policy,
                        outermost=outermost,
                        returned=run.returned,
                    ):
                        die(error, last_words=functools.partial(end_after_failure, run, error))
                    end_after_failure(run, error)
                    raise
                return result

        return call

    return decorate


def end_after_failure(run: Run, error: BaseException) -> None:
    """Report the exception to the keeper, and leave staged snapshots to it."""
    run.failing(error)
    run.abandon()
