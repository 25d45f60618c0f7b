"""A model that follows the snapshots of a training job, for any server.

    follower = ckpt.serve.Follower("s3://bucket/run", into=model, follow="tag:prod")
    follower.wait()
    ...
    with follower.generation() as g:      # in each request
        reply = g.model(x), g.id

One background thread looks at the log, fills a buffer that no request uses, checks it and swaps.
Requests wait for nothing of that: they pin a generation and compute with it.
"""

from __future__ import annotations

import contextlib
import copy
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType

import torch

from ckpt.capture.leaves import World
from ckpt.errors import (
    CkptError,
    FormatVersionError,
    IntegrityError,
    InternalError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from ckpt.events import Emit, Event, emit_to_logging
from ckpt.log.state import LogState
from ckpt.serve.choice import Followed, next_snapshot, parse_followed
from ckpt.serve.generations import Generation, Generations, ModelBuffer, PinnedGeneration
from ckpt.serve.source import FillReport, GenerationSource, SnapshotChecks, SwapReport
from ckpt.session.options import StorageOptions, StoreArgument, check_store
from ckpt.values import SnapshotId

POLL_S = 0.2
"""How often the log is looked at: one listing, of a folder or of the newest log keys."""
RETRY_S_MAX = 5.0
"""Longest pause between two looks while the store does not answer."""
CLOSE_WAIT_S = 10.0
NICENESS = 10
"""The thread that fills gives way to those that answer requests."""


@dataclass(frozen=True, slots=True)
class FollowerStatus:
    """What a follower serves and why. ``waits_for``: why it does not follow now, if so."""

    follow: str
    generation: str | None
    kept: tuple[str, ...]
    refused: Mapping[str, str]
    waits_for: str
    held: bool
    swaps: int
    read_bytes: int
    reused_bytes: int
    last_swap: SwapReport | None


@dataclass(slots=True)
class _FollowerState:
    """What a follower was told and has done. Changed under the follower's lock."""

    followed: Followed
    held: bool = False
    """Whether a rollback holds it where it is."""
    closed: bool = False
    refused: dict[SnapshotId, str] = field(default_factory=dict)
    waits_for: str = "the first look at the log"
    told_wait: str = ""
    swaps: int = 0
    read_bytes: int = 0
    reused_bytes: int = 0
    last_swap: SwapReport | None = None


class Follower:
    """A model in memory that is swapped, between requests, for the newest sound snapshot.

    ``store`` is what ``ckpt.Checkpointer`` takes: a path, an fsspec URL, a list of these, or a
    Backend. ``into`` is a module, which becomes the first buffer and is copied for the others, or a
    function that makes one. ``follow`` is ``"latest"``, ``"tag:NAME"`` or a step; ``only`` the name
    that the model was tracked by. Memory: ``keep_generations + 1`` models.

    A snapshot is refused, told once and not tried again if it is damaged, has another structure,
    shapes or dtypes, has a NaN (unless ``allow_nan``), or if ``check`` raises or returns False;
    ``check`` gets the candidate ``Generation``. ``on_swap`` gets each generation after it is
    served. Both run in the follower's thread.

    ``share_reads``: followers of this log in other processes of this machine read each byte from
    the store once for all of them, through shared memory. For more than one replica on a machine.

    While the store does not answer, the served generation goes on being served. A process that
    serves needs no permission to write. Raises UsageError for arguments that cannot work.
    """

    def __init__(  # noqa: PLR0913  each is a choice of the user's
        self,
        store: StoreArgument,
        *,
        into: torch.nn.Module | Callable[[], torch.nn.Module],
        follow: str | int = "latest",
        only: str = "model",
        check: Callable[[Generation], object] | None = None,
        on_swap: Callable[[Generation], object] | None = None,
        keep_generations: int = 2,
        allow_nan: bool = False,
        share_reads: bool = False,
        poll_s: float = POLL_S,
        storage_options: StorageOptions = None,
        write_quorum: int | None = None,
        encryption_key: str | None = None,
        emit: Emit | None = None,
    ) -> None:
        if keep_generations < 1:
            raise UsageError(
                "keep_generations counts from 1, the one that is served. "
                f"keep_generations={keep_generations}"
            )
        if not poll_s > 0:
            raise UsageError(f"poll_s is a time in seconds above 0. poll_s={poll_s}")
        self._state = _FollowerState(parse_followed(follow))
        self._checks = SnapshotChecks(allow_nan, check)
        self._on_swap = on_swap
        self._poll_s = poll_s
        self._emit = emit or emit_to_logging(0)
        models = _models(into, keep_generations + 1)
        self._generations = Generations(
            [ModelBuffer(model) for model in models], keep=keep_generations
        )
        self._source = GenerationSource(
            check_store(store, write_quorum=write_quorum),
            storage_options,
            item=only,
            share_reads=share_reads,
            write_quorum=write_quorum,
            encryption_key=encryption_key,
            emit=self._emit,
        )
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ckpt-follow", daemon=True)
        self._thread.start()

    # ---- for requests

    def generation(self, generation: str | None = None) -> PinnedGeneration:
        """Pin the served generation for one request: ``with follower.generation() as g``.

        ``generation`` is the id of another one that is kept, for requests that belong together. On
        entry raises UnavailableError if none is served yet, and NotFoundError if the named one is
        not in memory. Never waits for a swap.
        """
        return PinnedGeneration(self._generations, generation)

    # ---- for operators

    def wait(self, *, step: int = 0, timeout_s: float | None = None) -> Generation:
        """Wait until a generation of ``step`` or later is served, and return it.

        Raises UnavailableError after ``timeout_s``, with what the follower waits for.
        """
        try:
            return self._generations.wait(lambda served: served.step >= step, timeout_s)
        except UnavailableError as error:
            status = self.status()
            refused = f" refused={dict(status.refused)}" if status.refused else ""
            raise UnavailableError(f"{error} waits_for={status.waits_for!r}{refused}") from error

    def rollback(self, generation: str | None = None) -> Generation:
        """Serve a generation that is kept in memory, at once: the one named by its id, or the one
        before.

        The follower then stays there until ``follow`` is called. Raises NotFoundError that lists
        what is kept.
        """
        with self._lock:
            back = self._generations.serve_kept(generation)
            self._state.held = True
        text = f"serves {back.id} again, and stays there until told to follow"
        self._emit(Event("generation-back", text, {"generation": back.id}))
        return back

    def follow(self, follow: str | int) -> None:
        """From now on follow another tag or step, or the newest; ends a rollback."""
        followed = parse_followed(follow)
        with self._lock:
            self._state.followed = followed
            self._state.held = False
        self._wake.set()

    def look(self) -> None:
        """Look at the log now, not at the next poll: for a program that knows of a commit."""
        self._wake.set()

    def status(self) -> FollowerStatus:
        """What is served, kept and refused, what it cost, and what is waited for."""
        with self._lock:
            now, served = self._state, self._generations.served
            return FollowerStatus(
                follow=str(self._state.followed),
                generation=served.id if served is not None else None,
                kept=tuple(kept.id for kept in self._generations.kept),
                refused={f"{s.epoch}-{s.step}": why for s, why in now.refused.items()},
                waits_for=now.waits_for,
                held=self._state.held,
                swaps=now.swaps,
                read_bytes=now.read_bytes,
                reused_bytes=now.reused_bytes,
                last_swap=now.last_swap,
            )

    def close(self) -> None:
        """End following. Generations that are pinned stay usable. Idempotent.

        A store that hangs is waited for ten seconds; its thread ends with the process.
        """
        self._state.closed = True
        self._wake.set()
        self._generations.close()
        self._thread.join(CLOSE_WAIT_S)
        if not self._thread.is_alive():
            self._source.close()

    def __enter__(self) -> Follower:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ---- the follower's thread

    def _run(self) -> None:
        _give_way()
        pause_s = self._poll_s
        while not self._state.closed:
            try:
                self._look()
            except (UnavailableError, NotFoundError) as error:
                pause_s = min(RETRY_S_MAX, pause_s * 2)
                self._waits_for(error)
            except CkptError as error:
                # Of the log, or of the stores: no snapshot's fault, and perhaps mended by someone.
                pause_s = RETRY_S_MAX
                self._waits_for(error)
            except Exception as error:  # noqa: BLE001  a thread's border: it must not end in silence
                pause_s = RETRY_S_MAX
                self._waits_for(InternalError(f"a defect in following: {error!r}"))
            else:
                pause_s = self._poll_s
                self._waits_for(None)
            self._wake.wait(pause_s)
            self._wake.clear()

    def _waits_for(self, error: CkptError | None) -> None:
        """Keep why nothing new is served; say it when it begins and when it is over."""
        with self._lock:
            self._state.waits_for = str(error) if error is not None else ""
        kind = type(error).__name__ if error is not None else ""
        if kind == self._state.told_wait:
            return
        served = self._generations.served
        serves = f"serves {served.id} meanwhile" if served is not None else "serves nothing yet"
        if error is not None:
            absent = isinstance(error, NotFoundError) and served is None
            self._emit(Event("serving-waits", f"{serves}: {error}", alarm=not absent))
        elif self._state.told_wait:
            self._emit(Event("serving-follows", "the stores answer; follows again"))
        self._state.told_wait = kind

    def _look(self) -> None:
        """Serve what the log names now, if that is another snapshot than the served one."""
        while not self._state.closed:
            with self._lock:
                followed, held = self._state.followed, self._state.held
            if held:
                return
            begun = time.monotonic()
            state = self._source.state()
            served = self._generations.served
            target = next_snapshot(
                state,
                followed,
                served=served.info.id if served is not None else None,
                refused=self._state.refused,
            )
            if target is None:
                return
            self._try(state, target, followed, time.monotonic() - begun)

    def _try(
        self, state: LogState, target: SnapshotId, followed: Followed, looked_s: float
    ) -> None:
        """Serve ``target``, or refuse it."""
        buffer = self._generations.buffer_to_fill(on_wait=self._tell_pinned)
        if buffer is None:
            return
        try:
            candidate, report = self._source.fill(
                buffer,
                self._generations.donors(buffer),
                state,
                target,
                world=World(rank=0, size=1),
            )
            report.seconds["look"] = looked_s
            self._checks.require(candidate, report)
        except (IntegrityError, FormatVersionError, UsageError) as error:
            # Only what was served may be taken for looked at, if the next snapshot has it too.
            buffer.forget()
            if self._source.state().find(target) is None:
                return  # it was dropped meanwhile, which is no fault of it
            self._refuse(target, str(error))
            return
        at = time.monotonic()
        with self._lock:
            if self._state.held or self._state.followed != followed:
                return  # a rollback came first; its word holds
            self._generations.serve(buffer, candidate)
            report.seconds["swap"] = time.monotonic() - at
            report.seconds["since_commit"] = time.time() - candidate.info.created_unix_s
            self._note(candidate, report)
        text = f"serves {candidate.id}"
        read = report.read_bytes
        self._emit(Event("generation", text, {"generation": candidate.id, "read_bytes": read}))
        if self._on_swap is not None:
            self._call_on_swap(candidate)

    def _refuse(self, target: SnapshotId, reason: str) -> None:
        with self._lock:
            self._state.refused[target] = reason
        served = self._generations.served
        serves = f"goes on with {served.id}" if served is not None else "serves nothing yet"
        text = f"the snapshot of {target} is refused and not tried again, {serves}: {reason}"
        self._emit(Event("generation-refused", text, {"step": target.step}, alarm=True))

    def _note(self, candidate: Generation, report: FillReport) -> None:
        now = self._state
        now.waits_for = ""
        now.swaps += 1
        now.read_bytes += report.read_bytes
        now.reused_bytes += report.reused_bytes
        now.last_swap = SwapReport(
            candidate.id, report.read_bytes, report.reused_bytes, dict(report.seconds)
        )

    def _tell_pinned(self, oldest: Generation) -> None:
        text = f"waits for requests that still compute with {oldest.id} before it fills its memory"
        self._emit(Event("generation-pinned", text, {"generation": oldest.id}))

    def _call_on_swap(self, generation: Generation) -> None:
        assert self._on_swap is not None, "the caller asked"
        try:
            self._on_swap(generation)
        except Exception as error:  # noqa: BLE001  the user's own; it is served all the same
            text = f"on_swap raised, {generation.id} is served all the same: {error!r}"
            self._emit(Event("on-swap-failed", text, alarm=True))


def _models(
    into: torch.nn.Module | Callable[[], torch.nn.Module], number: int
) -> list[torch.nn.Module]:
    """``number`` models of one structure that share no memory."""
    if isinstance(into, torch.nn.Module):
        try:
            return [into, *(copy.deepcopy(into) for _ in range(number - 1))]
        except Exception as error:  # whatever a module's own __deepcopy__ raises
            raise UsageError(
                f"the model can't be copied; pass a function that makes one. cause={error!r}"
            ) from error
    if not callable(into):
        raise UsageError(f"into is a module, or a function that makes one. into={into!r}")
    models = [into() for _ in range(number)]
    if not all(isinstance(model, torch.nn.Module) for model in models):
        raise UsageError(f"into returned no module. type={type(models[0]).__name__}")
    if len({id(model) for model in models}) < number:
        raise UsageError("into returned one module twice; it must make a new one at each call")
    return models


def _give_way() -> None:
    """Lower this thread's priority, and that of the threads it starts. Linux keeps one a thread."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
