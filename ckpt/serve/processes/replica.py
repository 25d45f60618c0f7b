"""``python -m ckpt.serve.processes.replica OPTIONS``: one replica of a serving group.

It loads the program, follows the training job, answers requests over HTTP and holds its place in
the group. SIGTERM drains it: fronts send it nothing more, what it has begun is answered, then it
ends with 0.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import os
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from aiohttp import web
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ckpt.errors import CkptError, NotFoundError, UnavailableError, UsageError
from ckpt.events import Emit, Event
from ckpt.keyspace.base import Keyspace
from ckpt.serve import headers
from ckpt.serve.follower import Follower
from ckpt.serve.generations import Generation
from ckpt.serve.group.member import GroupMember, open_group, read_view
from ckpt.serve.group.records import (
    GroupView,
    OrderRecord,
    ReplicaRecord,
    ReplicaState,
    parse_generation,
)
from ckpt.serve.metrics import RequestMetrics
from ckpt.serve.processes.options import ReplicaOptions, decode_options, emit_to_stderr
from ckpt.serve.replica import ModelRequest, ModelRoute, Replica

RETRY_S = 0.5
KNOWN_S = 2.0
"""How long a replica that drains waits until the group has its record."""
GRACE_S = 0.5
"""How long after that it still answers: fronts hear of it a little later."""
DRAIN_S = 30.0
"""How long it waits for requests that it has begun."""
FAILED_STATUS = 70


class FollowedOrders:
    """A follower that does what an operator orders. Orders come in one thread."""

    def __init__(self, follower: Follower, done: int) -> None:
        self.follower = follower
        self.done = done
        """The serial of the last order that was carried out, or could not be."""
        self.problem = ""

    def see(self, order: OrderRecord | None) -> bool:
        """Carry out an order that is new; whether it was."""
        if order is None or order.serial <= self.done:
            return False
        self.problem = ""
        try:
            self._carry_out(order)
        except CkptError as error:
            self.problem = str(error)
        self.done = order.serial
        return True

    def _carry_out(self, order: OrderRecord) -> None:
        if not order.generation or self.follower.status().generation == order.generation:
            self.follower.follow(followed_by(order))
            return
        try:
            self.follower.rollback(order.generation)
        except NotFoundError:  # not in this one's memory: it reads it
            self.follower.follow(followed_by(order))


def followed_by(order: OrderRecord) -> str | int:
    """What a follower follows by an order: the step of a generation to stay at, or what it says.

    Raises UsageError.
    """
    if order.generation:
        return parse_generation(order.generation).step
    return int(order.follow) if order.follow.isascii() and order.follow.isdigit() else order.follow


class FollowerCollector(Collector):
    """A follower's counts, read when they are asked for."""

    def __init__(self, follower: Follower) -> None:
        self._follower = follower

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        status = self._follower.status()
        step = parse_generation(status.generation).step if status.generation else -1
        yield GaugeMetricFamily(
            "ckpt_replica_generation_step", "Step of the served generation; -1: none.", value=step
        )
        for name, text, value in (
            ("swaps", "Generations that came to be served.", status.swaps),
            ("read_bytes", "Bytes that came from the store.", status.read_bytes),
            ("reused_bytes", "Bytes that were in memory already.", status.reused_bytes),
            ("refused_snapshots", "Snapshots that are not served.", len(status.refused)),
        ):
            yield CounterMetricFamily(f"ckpt_replica_{name}", text, value=value)
        phases = GaugeMetricFamily(
            "ckpt_replica_swap_seconds", "What the last swap took, by phase.", labels=["phase"]
        )
        for phase, seconds in (status.last_swap.seconds if status.last_swap else {}).items():
            phases.add_metric([phase], seconds)
        yield phases


class ReplicaServer:
    """One replica: what it follows, how it answers, and its place in the group."""

    def __init__(
        self, replica: Replica, options: ReplicaOptions, *, listener: socket.socket, emit: Emit
    ) -> None:
        self._options = options
        self._listener = listener
        self._emit = emit
        self._routes = replica.routes
        self.metrics = RequestMetrics("replica")
        self._pool = ThreadPoolExecutor(options.threads, thread_name_prefix="ckpt-handler")
        self._failing: set[tuple[str, str]] = set()
        """Routes and the kinds of errors that they raised, to say each once."""
        self._refuses = False
        self._place = _Place(replica, options, listener, emit)
        self.metrics.registry.register(FollowerCollector(self._place.follower))

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until ``stop`` is set, then drain."""
        app = web.Application(client_max_size=self._options.body_bytes_max)
        app.router.add_get(headers.HEALTH, self._health)
        app.router.add_get(headers.STATUS, self._status)
        app.router.add_get(headers.METRICS, self._metrics)
        app.router.add_route("*", "/{path:.*}", self._request)
        runner = web.AppRunner(app, access_log=None, handle_signals=False)
        await runner.setup()
        await web.SockSite(runner, self._listener).start()
        await stop.wait()
        await self._drain()
        await runner.cleanup()
        await asyncio.get_running_loop().run_in_executor(None, self._place.close)
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _drain(self) -> None:
        self._emit(Event("replica-drains", "leaves: takes no new requests"))
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self._place.drain)
        await asyncio.sleep(GRACE_S)
        self._refuses = True
        until_s = loop.time() + DRAIN_S
        while self.metrics.outstanding and loop.time() < until_s:
            await asyncio.sleep(0.01)
        if self.metrics.outstanding:
            text = f"ends with {self.metrics.outstanding} requests unanswered after {DRAIN_S:g} s"
            self._emit(Event("replica-drains", text, alarm=True))

    # ---- its own pages

    async def _health(self, request: web.Request) -> web.Response:
        state, generation = self._place.state, self._place.follower.status().generation
        good = state == "ready" and not self._refuses
        body = {"state": state, "generation": generation}
        return web.json_response(body, status=200 if good else 503)

    async def _status(self, request: web.Request) -> web.Response:
        status = dataclasses.asdict(self._place.follower.status())
        status |= {"name": self._place.name, "state": self._place.state, "role": self._place.role}
        status["outstanding"] = self.metrics.outstanding
        return web.json_response(status)

    async def _metrics(self, request: web.Request) -> web.Response:
        body = self.metrics.text()
        return web.Response(body=body, headers={"Content-Type": headers.METRICS_TYPE})

    # ---- requests

    async def _request(self, request: web.Request) -> web.Response:
        route = self._routes.get((request.method, request.path))
        if route is None:
            known = sorted({path for _, path in self._routes})
            status = 405 if request.path in known else 404
            return self._named(
                web.json_response({"error": "no such path", "paths": known}, status=status)
            )
        begun_s = time.monotonic()
        if self._refuses or self.metrics.outstanding >= self._options.threads + self._options.queue:
            response = (
                self._not_handled("the replica leaves")
                if self._refuses
                else self._not_handled("the replica has too much to do", headers.BUSY)
            )
        else:
            with self.metrics.begun():
                response = await self._admitted(request, route, begun_s)
        self.metrics.answered(response.status, time.monotonic() - begun_s)
        return response

    async def _admitted(
        self, request: web.Request, route: ModelRoute, begun_s: float
    ) -> web.Response:
        try:
            deadline_s = begun_s + float(request.headers.get(headers.DEADLINE_MS, "inf")) / 1e3
        except ValueError:
            return web.json_response({"error": f"{headers.DEADLINE_MS} is a number"}, status=400)
        body = await request.read()
        compute = partial(
            self._compute,
            route,
            body,
            query=dict(request.query),
            given=dict(request.headers),
            deadline_s=deadline_s,
        )
        return await asyncio.get_running_loop().run_in_executor(self._pool, compute)

    def _compute(
        self,
        route: ModelRoute,
        body: bytes,
        *,
        query: Mapping[str, str],
        given: Mapping[str, str],
        deadline_s: float,
    ) -> web.Response:
        """In a thread of the pool: run the handler with one pinned generation."""
        if time.monotonic() > deadline_s:
            return self._not_handled("its deadline passed before a thread was free", headers.BUSY)
        asked = next((given[k] for k in given if k.lower() == headers.GENERATION.lower()), None)
        follower = self._place.follower
        pinned = follower.generation(asked)
        try:
            generation = pinned.__enter__()
        except UnavailableError as error:
            return self._not_handled(str(error))
        except NotFoundError as error:
            kept = list(follower.status().kept)
            return self._named(web.json_response({"error": str(error), "kept": kept}, status=409))
        try:
            request = ModelRequest(generation, route.method, route.path, query, given, body)
            return self._named(self._handled(route, request), generation)
        finally:
            pinned.__exit__(None, None, None)

    def _handled(self, route: ModelRoute, request: ModelRequest) -> web.Response:
        try:
            with torch.no_grad():
                return _response(route.handler(request))
        except UsageError as error:
            return web.json_response({"error": str(error)}, status=400)
        except Exception as error:  # noqa: BLE001  the user's own code
            kind = (route.path, type(error).__name__)
            if kind not in self._failing:
                self._failing.add(kind)
                text = f"the handler of {route.path} raised; said once:\n{traceback.format_exc()}"
                self._emit(Event("request-failed", text.rstrip(), alarm=True))
            return web.json_response({"error": f"{type(error).__name__}: {error}"}, status=500)

    def _not_handled(self, why: str, kind: str = headers.AWAY) -> web.Response:
        response = web.json_response({"error": f"not handled: {why}"}, status=503)
        response.headers[headers.NOT_HANDLED] = kind
        response.headers[headers.RETRY_AFTER] = "1"
        return self._named(response)

    def _named(self, response: web.Response, generation: Generation | None = None) -> web.Response:
        response.headers[headers.REPLICA] = self._place.name
        if generation is not None:
            response.headers[headers.GENERATION] = generation.id
        return response


def _response(value: object) -> web.Response:
    """A handler's answer over HTTP: bytes, text, or JSON. Raises TypeError for what has none."""
    match value:
        case bytes():
            return web.Response(body=value, content_type="application/octet-stream")
        case str():
            return web.Response(text=value)
        case _:
            return web.json_response(value)


class _Place:
    """A replica's place in its group: its follower, its record, and the orders it was given."""

    def __init__(
        self, replica: Replica, options: ReplicaOptions, listener: socket.socket, emit: Emit
    ) -> None:
        host, port = listener.getsockname()[:2]
        self.name = options.name or f"r{secrets.token_hex(3)}"
        self.state: ReplicaState = "warming"
        self.role = "standby"
        self._known = threading.Event()
        """Set when the group has the record of a replica that drains."""
        self._member: GroupMember | None = None
        keyspace = open_group(options.group)
        order = _first_order(keyspace, emit)
        self.follower = replica.start(
            emit=emit,
            on_swap=lambda generation: self._report(),
            follow=followed_by(order) if order is not None else None,
        )
        self._orders = FollowedOrders(self.follower, order.serial if order is not None else 0)
        record = ReplicaRecord(
            name=self.name,
            address=f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
            host=socket.gethostname(),
            pid=os.getpid(),
            repeatable=tuple(
                sorted({route.path for route in replica.routes.values() if route.repeatable})
            ),
            order=self._orders.done,
        )
        self._member = GroupMember(
            keyspace, wanted=options.wanted, emit=emit, replica=record, on_view=self._see
        )
        self._report()

    def _see(self, view: GroupView) -> None:
        if self._orders.see(view.order):
            self._report()
        self.role = view.role(self.name)
        own = view.replicas.get(self.name)
        if own is not None and own.state == "draining":
            self._known.set()

    def _report(self) -> None:
        """Bring the record up to date: after a swap, an order, or a change of state."""
        if self._member is None:
            return  # it reports when it is there
        status = self.follower.status()
        if self.state == "warming" and status.generation is not None:
            self.state = "ready"
        self._member.update(
            state=self.state,
            generation=status.generation or "",
            kept=status.kept,
            order=self._orders.done,
            problem=self._orders.problem,
        )

    def drain(self) -> None:
        """Tell the group, and wait until it knows; at most ``KNOWN_S``, as it may not answer."""
        self.state = "draining"
        self._report()
        self._known.wait(KNOWN_S)

    def close(self) -> None:
        """Leave the group and end following."""
        if self._member is not None:
            self._member.close()
        self.follower.close()


def _first_order(keyspace: Keyspace, emit: Emit) -> OrderRecord | None:
    """The order that holds when this replica begins; waits until the group answers.

    One that began with another generation would answer with what an operator took back.
    """
    told = False
    while True:
        try:
            return read_view(keyspace)[0].order
        except UnavailableError as error:
            if not told:
                emit(Event("group-silent", f"waits for the group's records: {error}", alarm=True))
            told = True
            time.sleep(RETRY_S)


def load_replica(app: str) -> Replica:
    """The Replica that ``MODULE:NAME`` names, from the working folder. Raises UsageError."""
    module_name, _, name = app.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # of the program's own imports: its traceback says which
        raise UsageError(
            f"no such module in the working folder or the environment. module={module_name} "
            f"folder={folder}"
        ) from error
    found = getattr(found, name, None)
    if not isinstance(found, Replica):
        raise UsageError(
            f"the app names no ckpt.serve.Replica. app={app} found={type(found).__name__}"
        )
    return found


async def _serve(server: ReplicaServer, *, leave_at_eof: bool) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if leave_at_eof:
        loop.add_reader(0, lambda: None if os.read(0, 1024) else _at_eof(loop, stop))
    await server.run(stop)


def _at_eof(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    loop.remove_reader(0)
    stop.set()


def main() -> int:
    """Run one replica; returns the exit status."""
    options = decode_options(sys.argv[1], ReplicaOptions)
    emit = emit_to_stderr(options.name or "replica")
    try:
        replica = load_replica(options.app)
        listener = socket.create_server((options.host, options.port), backlog=1024)
        server = ReplicaServer(replica, options, listener=listener, emit=emit)
        asyncio.run(_serve(server, leave_at_eof=options.leave_at_eof))
    except CkptError as error:
        emit(Event("replica-failed", f"error: {error}", alarm=True))
        return error.exit_code
    except OSError as error:
        text = f"error: can't listen. address={options.host}:{options.port} why={error.strerror}"
        emit(Event("replica-failed", text, alarm=True))
        return UnavailableError.exit_code
    return 0


if __name__ == "__main__":
    status = main()
    # A thread that a store hangs must not hold the process.
    sys.stderr.flush()
    os._exit(status)
