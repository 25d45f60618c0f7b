"""The process of a front: it watches the group, passes requests on, and replaces lost replicas."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
from collections.abc import Awaitable, Callable

from aiohttp import web

from ckpt.errors import UnavailableError, UsageError
from ckpt.events import Emit, Event
from ckpt.serve.front.dispatch import Dispatcher
from ckpt.serve.front.policies import POLICIES
from ckpt.serve.front.proxy import FrontProxy
from ckpt.serve.front.targets import ReplicaTargets
from ckpt.serve.group.member import GroupMember, open_group
from ckpt.serve.group.records import GroupView
from ckpt.serve.processes.options import FrontOptions

KEEPALIVE_S = 75.0
"""How long a client's idle connection is kept."""
SHUTDOWN_S = 30.0
"""How long a front that ends waits for answers."""


async def run_front(
    options: FrontOptions,
    *,
    emit: Emit,
    beside: Callable[[asyncio.Event], Awaitable[object]] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; then answer what was begun, and return.

    ``beside`` runs meanwhile and gets an event that is set when the front has answered all; it is
    waited for. If it ends or raises, so does the front. Raises UsageError, UnavailableError if the
    address is taken, and what ``beside`` raises.
    """
    policy = POLICIES.get(options.policy)
    if policy is None:
        raise UsageError(f"no such policy. policy={options.policy} policies={sorted(POLICIES)}")
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    listener = listen(options.host, options.port)
    targets = ReplicaTargets(policy, clock=loop.time, draw=random.random)
    async with Dispatcher(targets, queue=options.queue, hedge_s=options.hedge_s) as dispatcher:
        announce = _Announcement(options, listener, emit)

        def see(view: GroupView) -> None:
            targets.see(view)
            announce.see(view)

        def see_in_loop(view: GroupView) -> None:
            loop.call_soon_threadsafe(see, view)

        member = GroupMember(
            open_group(options.group),
            wanted=options.wanted,
            emit=emit,
            on_view=see_in_loop,
            suspects=lambda: targets.suspects,
        )
        proxy = FrontProxy(
            dispatcher, deadline_s=options.deadline_s, body_bytes_max=options.body_bytes_max
        )
        runner = web.AppRunner(
            proxy.application(),
            access_log=None,
            handle_signals=False,
            keepalive_timeout=KEEPALIVE_S,
            shutdown_timeout=SHUTDOWN_S,
        )
        end = asyncio.Event()
        others = asyncio.ensure_future((beside or asyncio.Event.wait)(end))
        stopped = asyncio.ensure_future(stop.wait())
        try:
            await runner.setup()
            site = web.SockSite(runner, listener)
            await site.start()
            await asyncio.wait({others, stopped}, return_when=asyncio.FIRST_COMPLETED)
            # First what was begun is answered; only then those go who answer.
            proxy.leaves = True
            await site.stop()
            await _until_answered(dispatcher)
        finally:
            end.set()
            stopped.cancel()
            try:
                await others
            finally:
                await runner.cleanup()
                await loop.run_in_executor(None, member.close)


async def _until_answered(dispatcher: Dispatcher) -> None:
    loop = asyncio.get_running_loop()
    until_s = loop.time() + SHUTDOWN_S
    while dispatcher.counts.held and loop.time() < until_s:
        await asyncio.sleep(0.01)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UnavailableError that names the address."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise UnavailableError(
            f"can't listen. address={host}:{port} why={error.strerror}; choose another port"
        ) from error


class _Announcement:
    """Says once where the front answers, when somebody does."""

    def __init__(self, options: FrontOptions, listener: socket.socket, emit: Emit) -> None:
        host, port = listener.getsockname()[:2]
        self._url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._group = options.group
        self._emit = emit
        self._told = False
        emit(Event("front", f"listens at {self._url}; waits until a replica serves"))

    def see(self, view: GroupView) -> None:
        if view.serving and not self._told:
            self._told = True
            wanted = view.roles.wanted if view.roles is not None else 0
            text = f"answers at {self._url}: {len(view.serving)} of {wanted} replicas serve"
            self._emit(Event("front", text, {"group": self._group}))
