"""Replica processes of one machine: started, kept at their number, and ended with their starter."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import sys

import msgspec

from ckpt.errors import UsageError
from ckpt.events import Emit, Event
from ckpt.serve.processes.options import ReplicaOptions, encode_options

PAUSE_S = 0.2
PAUSE_S_MAX = 5.0
LIVED_S = 10.0
"""A replica that lived so long is started again without a pause."""
STOP_S = 40.0
"""How long a replica that drains is waited for: longer than it waits itself."""


class ReplicaChildren:
    """The replicas that one process starts. ``threads_each``: what torch computes with in each."""

    def __init__(
        self, options: ReplicaOptions, *, number: int, threads_each: int, emit: Emit
    ) -> None:
        self._options = options
        self._number = number
        self._threads_each = threads_each
        self._emit = emit

    async def run(self, stop: asyncio.Event) -> None:
        """Keep the replicas running until ``stop`` is set, then drain them and wait.

        Raises UsageError if a replica says that its options can never work.
        """
        keeping = [asyncio.create_task(self._keep(index, stop)) for index in range(self._number)]
        try:
            await asyncio.gather(*keeping)
        finally:
            stop.set()
            await asyncio.gather(*keeping, return_exceptions=True)

    async def _keep(self, index: int, stop: asyncio.Event) -> None:
        """Start one replica again and again, each life under a name of its own."""
        loop = asyncio.get_running_loop()
        pause_s = 0.0
        while not stop.is_set():
            name = f"r{index}-{secrets.token_hex(2)}"
            begun_s = loop.time()
            status = await self._live(name, stop)
            if stop.is_set():
                return
            if status == UsageError.exit_code:
                raise UsageError("the replicas can't begin; see above what each says")
            lived_s = loop.time() - begun_s
            pause_s = 0.0 if lived_s > LIVED_S else min(PAUSE_S_MAX, max(PAUSE_S, 2 * pause_s))
            ended = f"by signal {-status}" if status < 0 else f"with {status}"
            text = f"{name} ended {ended} after {lived_s:.1f} s; another starts in its place"
            self._emit(Event("replica-ended", text, {"replica": name}, alarm=True))
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(stop.wait(), pause_s)

    async def _live(self, name: str, stop: asyncio.Event) -> int:
        """One life of a replica: its exit status; negative: the signal that ended it."""
        options = msgspec.structs.replace(self._options, name=name, leave_at_eof=True)
        process = await asyncio.create_subprocess_exec(
            *replica_words(options),
            # It ends with this process, however that ends: then the pipe is closed.
            stdin=asyncio.subprocess.PIPE,
            env=replica_environment(self._threads_each),
            # A Ctrl-C is this process's to pass on.
            start_new_session=True,
        )
        stopped = asyncio.ensure_future(stop.wait())
        ended = asyncio.ensure_future(process.wait())
        try:
            await asyncio.wait({stopped, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                await _end(process)
            return await ended
        finally:
            stopped.cancel()
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()


async def _end(process: asyncio.subprocess.Process) -> None:
    """SIGTERM, and SIGKILL if it does not end."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_S)
    except asyncio.TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()


def replica_words(options: ReplicaOptions) -> list[str]:
    """The command line of a replica process."""
    return [sys.executable, "-m", "ckpt.serve.processes.replica", encode_options(options)]


def replica_environment(threads_each: int) -> dict[str, str]:
    """This process's environment, with torch's threads limited unless the user did that."""
    return {"OMP_NUM_THREADS": str(threads_each), **os.environ}
