"""``ckpt serve``: replicas of a model behind one address, and what an operator asks of them."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

import click

from ckpt.cli.echo import JsonValue, emit_json
from ckpt.cli.jobs import job_command
from ckpt.cli.output import table
from ckpt.errors import ConflictError, NotFoundError, UnavailableError, UsageError
from ckpt.events import Event
from ckpt.keyspace.base import Keyspace
from ckpt.serve.front.haproxy import render_config
from ckpt.serve.front.policies import POLICIES
from ckpt.serve.group.decide import (
    drained,
    follow_order,
    promoted,
    rollback_order,
    scaled,
    stay_order,
)
from ckpt.serve.group.member import (
    await_view,
    open_group,
    parse_group,
    read_view,
    write_decision,
)
from ckpt.serve.group.records import GroupView, OrderRecord, ReplicaRecord, RolesRecord
from ckpt.serve.processes.options import (
    FrontOptions,
    ReplicaOptions,
    emit_to_stderr,
)

SUPERVISOR = "ckpt.serve.processes.supervisor"
GROUP = "default"
GROUP_VARIABLE = "CKPT_SERVE_GROUP"

_GROUP_EPILOG = """\b
Examples:
  ckpt serve app:replica --replicas 3 --standby 1 --port 8080
  ckpt serve status
  ckpt serve rollback              back to the generation before, from memory
  ckpt serve follow tag:prod       ends a rollback too

\b
`app:replica` names a ckpt.serve.Replica of the module app, in the working folder or installed.
A group is named by --group NAME on one machine, or etcd://host:port,.../NAME for several: then
start `ckpt serve replica` on each machine, and `ckpt serve front` where requests arrive.
"""

_STATUS_EPILOG = """\b
JSON, also of promote, drain, scale, rollback, pin and follow: {"group", "wanted", "order": null |
{"serial", "follow", "generation"}, "replicas": [{"name", "role", "state", "generation", "kept",
"order", "problem", "address", "host", "pid"}, ...]}. A role is serving, standby, draining or
drained.

\b
Exit codes: 0 as many serve as are wanted; 2 the command line cannot work; 10 no such group,
replica or generation; 11 fewer serve, or the group's records can't be read; 12 the replica is not
ready, or nobody else could serve.
"""


class ServeGroup(click.Group):
    """``ckpt serve app:replica`` means ``ckpt serve run app:replica``."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and ":" in args[0] and args[0] not in self.commands:
            args = ["run", *args]
        return super().resolve_command(ctx, args)


@click.group(name="serve", cls=ServeGroup, epilog=_GROUP_EPILOG)
def command() -> None:
    """Serve replicas of a model that follow its training, behind one address."""


F = TypeVar("F", bound=Callable[..., object])


def _options(*options: Callable[[F], F]) -> Callable[[F], F]:
    def add(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return add


_group = click.option(
    "--group",
    metavar="NAME",
    envvar=GROUP_VARIABLE,
    default=GROUP,
    show_default=True,
    help=f"NAME on this machine, or etcd://host:port,.../NAME. Also from ${GROUP_VARIABLE}.",
)
_replicas = click.option(
    "--replicas",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How many serve, for a group that is new.",
)
_replica_options = _options(
    click.option(
        "--threads",
        type=click.IntRange(min=1),
        default=2,
        show_default=True,
        help="Requests that one replica computes at a time.",
    ),
    click.option(
        "--replica-queue",
        type=click.IntRange(min=0),
        default=64,
        show_default=True,
        help="Requests that may wait in one replica; more are refused, and go to another one.",
    ),
)
_front_options = _options(
    click.option("--host", default="127.0.0.1", show_default=True, help="Where clients connect."),
    click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True),
    click.option(
        "--policy",
        type=click.Choice(list(POLICIES)),
        default=next(iter(POLICIES)),
        show_default=True,
        help="Which replica gets the next request.",
    ),
    click.option(
        "--queue",
        type=click.IntRange(min=1),
        default=1024,
        show_default=True,
        help="Requests that the front holds at a time; more get 503 at once.",
    ),
    click.option(
        "--deadline",
        metavar="SECONDS",
        type=click.FloatRange(min=0, min_open=True),
        default=30.0,
        show_default=True,
        help="For requests without X-Ckpt-Deadline-Ms.",
    ),
    click.option(
        "--hedge",
        metavar="SECONDS",
        type=click.FloatRange(min=0),
        default=0.0,
        show_default=True,
        help="Send a repeatable request to a second replica too after so long; 0: never.",
    ),
)


@command.command(name="run")
@click.argument("app")
@_replicas
@click.option(
    "--standby",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="How many more follow and wait to take a lost one's place.",
)
@_group
@_replica_options
@_front_options
def run_command(  # noqa: PLR0913  each is an option of the command line
    *,
    app: str,
    replicas: int,
    standby: int,
    group: str,
    threads: int,
    replica_queue: int,
    host: str,
    port: int,
    policy: str,
    queue: int,
    deadline: float,
    hedge: float,
) -> int:
    """Start replicas of APP and a front, and keep them running until Ctrl-C.

    A replica that ends is started again; meanwhile a standby has its place.
    """
    _require_http()
    emit = emit_to_stderr("front")
    front = FrontOptions(
        group=group,
        wanted=replicas,
        host=host,
        port=port,
        policy=policy,
        queue=queue,
        deadline_s=deadline,
        hedge_s=hedge,
    )
    options = ReplicaOptions(
        app=app, group=group, wanted=replicas, threads=threads, queue=replica_queue
    )
    text = _fit_group(group, replicas)
    if text:
        emit(Event("front", text))
    number = replicas + standby
    children = importlib.import_module(SUPERVISOR).ReplicaChildren(
        options,
        number=number,
        threads_each=max(1, (os.cpu_count() or 1) // number),
        emit=emit,
    )
    _run_front(front, beside=children.run)
    return 0


def _fit_group(group: str, wanted: int) -> str:
    """Have a group that exists already want so many. What is to be said about it."""
    keyspace = open_group(group)
    try:
        view, _ = read_view(keyspace)
        if view.roles is None or view.roles.wanted == wanted:
            return ""
        if view.replicas:
            return (
                f"the group has replicas already and wants {view.roles.wanted} of them to serve, "
                f"not {wanted}: `ckpt serve scale {wanted}` changes that"
            )
        write_decision(keyspace, lambda now: scaled(now, wanted))
        return ""
    finally:
        keyspace.close()


@command.command(name="replica")
@click.argument("app")
@_replicas
@_group
@click.option("--name", default="", help="Its name in the group; by default a new one each time.")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="The address of this machine at which fronts reach it.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="By default any.")
@_replica_options
def replica_command(
    *,
    app: str,
    replicas: int,
    group: str,
    name: str,
    host: str,
    port: int,
    threads: int,
    replica_queue: int,
) -> None:
    """Be one more replica of a group. SIGTERM drains it."""
    _require_http()
    options = ReplicaOptions(
        app=app,
        group=group,
        wanted=replicas,
        name=name,
        host=host,
        port=port,
        threads=threads,
        queue=replica_queue,
    )
    # Another program: this one never imports torch.
    words = importlib.import_module(SUPERVISOR).replica_words(options)
    os.execv(words[0], words)


@command.command(name="front")
@_replicas
@_group
@_front_options
def front_command(
    *,
    replicas: int,
    group: str,
    host: str,
    port: int,
    policy: str,
    queue: int,
    deadline: float,
    hedge: float,
) -> int:
    """Be a front of a group; there may be several."""
    _require_http()
    options = FrontOptions(
        group=group,
        wanted=replicas,
        host=host,
        port=port,
        policy=policy,
        queue=queue,
        deadline_s=deadline,
        hedge_s=hedge,
    )
    _run_front(options)
    return 0


@command.command(name="haproxy")
@_replicas
@_group
@click.option(
    "--socket",
    "socket_path",
    metavar="PATH",
    type=click.Path(path_type=Path),
    required=True,
    help="HAProxy's runtime socket.",
)
@click.option("--config", "prints", is_flag=True, help="Print HAProxy's configuration, and end.")
@click.option(
    "--repeatable",
    metavar="PATH",
    multiple=True,
    help="With --config: a path whose requests may be sent again; by default those that the "
    "group's replicas declare.",
)
@_front_options
def haproxy_command(  # noqa: PLR0913  each is an option of the command line
    *,
    replicas: int,
    group: str,
    socket_path: Path,
    prints: bool,
    repeatable: tuple[str, ...],
    host: str,
    port: int,
    policy: str,
    queue: int,
    deadline: float,
    hedge: float,
) -> int:
    """Keep an HAProxy up to date with a group, instead of `ckpt serve front`.

    First print its configuration (--config) and start it with that; this command then tells it
    through its runtime socket who serves. HAProxy goes on alone while this is restarted.
    """
    if hedge:
        raise UsageError("HAProxy sends no request twice; leave out --hedge")
    if not prints:
        controller = importlib.import_module("ckpt.serve.processes.haproxy")
        emit = emit_to_stderr("haproxy")
        controller.run_haproxy_controller(group, socket_path, wanted=replicas, emit=emit)
        return 0
    click.echo(
        render_config(
            bind=f"{host}:{port}",
            socket=str(socket_path.absolute()),
            policy=policy,
            queue=queue,
            deadline_s=deadline,
            repeatable=repeatable or _declared_paths(group),
        ),
        nl=False,
    )
    return 0


def _declared_paths(group: str) -> tuple[str, ...]:
    """The paths that all replicas of a group declare repeatable."""
    keyspace = open_group(group)
    try:
        declared = [set(one.repeatable) for one in read_view(keyspace)[0].replicas.values()]
        return tuple(sorted(set.intersection(*declared))) if declared else ()
    finally:
        keyspace.close()


def _run_front(
    options: FrontOptions, beside: Callable[[asyncio.Event], Awaitable[object]] | None = None
) -> None:
    # Imported here: commands that only look need no HTTP.
    front = importlib.import_module("ckpt.serve.processes.front")
    asyncio.run(front.run_front(options, emit=emit_to_stderr("front"), beside=beside))


def _require_http() -> None:
    missing = [
        name for name in ("aiohttp", "prometheus_client") if not importlib.util.find_spec(name)
    ]
    if missing:
        raise UsageError(
            f"serving needs packages that are not installed. missing={missing} pip install "
            "'torch-ckpt[serve]'"
        )


# ---- what an operator asks


@command.command(name="status", epilog=_STATUS_EPILOG)
@_group
@click.option(
    "--wait",
    "wait_s",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Wait up to so long until as many serve as are wanted.",
)
@job_command
def status_command(*, group: str, wait_s: float, as_json: bool) -> int:
    """Show a group: who serves which generation, and who stands by."""

    def complete(view: GroupView) -> bool:
        return view.roles is not None and len(view.serving) >= view.roles.wanted

    with _OpenedGroup(group) as keyspace:
        if wait_s:
            await_view(keyspace, complete, timeout_s=wait_s)
        return _show(group, _existing(group, keyspace), as_json=as_json)


@command.command(name="promote", epilog=_STATUS_EPILOG)
@click.argument("name")
@_group
@job_command
def promote_command(*, name: str, group: str, as_json: bool) -> int:
    """Have the standby NAME serve, in the place of the last that serves. Ends a drain."""
    return _change_roles(group, lambda view: promoted(view, name), as_json=as_json)


@command.command(name="drain", epilog=_STATUS_EPILOG)
@click.argument("name")
@_group
@job_command
def drain_command(*, name: str, group: str, as_json: bool) -> int:
    """Send NAME nothing more; a standby takes its place. It stays until its process is ended."""
    return _change_roles(group, lambda view: drained(view, name), as_json=as_json)


@command.command(name="scale", epilog=_STATUS_EPILOG)
@click.argument("replicas", type=click.IntRange(min=1))
@_group
@job_command
def scale_command(*, replicas: int, group: str, as_json: bool) -> int:
    """Have REPLICAS of the group serve, as far as there are so many; the others stand by."""
    return _change_roles(group, lambda view: scaled(view, replicas), as_json=as_json)


@command.command(name="rollback", epilog=_STATUS_EPILOG)
@click.argument("generation", required=False)
@_group
@job_command
def rollback_command(*, generation: str | None, group: str, as_json: bool) -> int:
    """Serve GENERATION (EPOCH-STEP), by default the newest before the served one that all have in
    memory, and stay there until `ckpt serve follow`."""

    def decide(view: GroupView) -> OrderRecord:
        return stay_order(view, generation) if generation else rollback_order(view)

    return _order(group, decide, as_json=as_json)


@command.command(name="pin", epilog=_STATUS_EPILOG)
@click.argument("generation", required=False)
@_group
@job_command
def pin_command(*, generation: str | None, group: str, as_json: bool) -> int:
    """Stay at GENERATION (EPOCH-STEP), by default the newest that is served."""
    return _order(group, lambda view: stay_order(view, generation), as_json=as_json)


@command.command(name="follow", epilog=_STATUS_EPILOG)
@click.argument("follow", default="latest")
@_group
@job_command
def follow_command(*, follow: str, group: str, as_json: bool) -> int:
    """Follow `latest` (the default), `tag:NAME`, or stay at a step. Ends a rollback."""
    if follow != "latest" and not follow.startswith("tag:") and not follow.isdigit():
        raise UsageError(f"follow is latest, tag:NAME or a step. follow={follow!r}")
    return _order(group, lambda view: follow_order(view, follow), as_json=as_json)


ORDER_S = 30.0
"""How long a command waits until all that serve have done what it asks."""


def _change_roles(group: str, decide: Callable[[GroupView], RolesRecord], *, as_json: bool) -> int:
    with _OpenedGroup(group) as keyspace:
        _existing(group, keyspace)
        write_decision(keyspace, decide)
        return _show(group, read_view(keyspace)[0], as_json=as_json)


def _order(group: str, decide: Callable[[GroupView], OrderRecord], *, as_json: bool) -> int:
    with _OpenedGroup(group) as keyspace:
        _existing(group, keyspace)
        order = write_decision(keyspace, decide)

        def carried_out(view: GroupView) -> bool:
            return all(
                replica.order >= order.serial
                and (replica.problem or order.generation in ("", replica.generation))
                for replica in view.serving
            )

        view, done = await_view(keyspace, carried_out, timeout_s=ORDER_S)
        _show(group, view, as_json=as_json)
        problems = {one.name: one.problem for one in view.serving if one.problem}
        if problems:
            raise ConflictError(f"not all could do it. serial={order.serial} problems={problems}")
        if not done:
            late = [one.name for one in view.serving if one.order < order.serial]
            raise UnavailableError(
                "not all have done it yet; the order holds, and `ckpt serve status` shows when. "
                f"serial={order.serial} not_heard={late} waited_s={ORDER_S:g}"
            )
        return 0


class _OpenedGroup:
    """The records of a group that exists, closed again."""

    def __init__(self, group: str) -> None:
        location, name = parse_group(group)
        if isinstance(location, Path) and not location.exists():
            others = sorted(path.stem for path in location.parent.glob("*.db"))
            raise NotFoundError(
                f"no such group on this machine. group={name} groups={others}; start it with "
                "`ckpt serve run`"
            )
        self._group = group

    def __enter__(self) -> Keyspace:
        self._keyspace = open_group(self._group)
        return self._keyspace

    def __exit__(self, *error: object) -> None:
        self._keyspace.close()


def _existing(group: str, keyspace: Keyspace) -> GroupView:
    view, _ = read_view(keyspace)
    if view.roles is None and not view.replicas:
        raise NotFoundError(f"the group has no records. group={group}; start a replica")
    return view


def _show(group: str, view: GroupView, *, as_json: bool) -> int:
    replicas = sorted(
        view.replicas.values(), key=lambda one: (view.role(one.name) != "serving", one.name)
    )
    wanted = view.roles.wanted if view.roles is not None else 0
    if as_json:
        order = view.order
        emit_json(
            {
                "group": group,
                "wanted": wanted,
                "order": None
                if order is None
                else {
                    "serial": order.serial,
                    "follow": order.follow,
                    "generation": order.generation,
                },
                "replicas": [_json(view, replica) for replica in replicas],
            }
        )
    else:
        _print(group, view, replicas, wanted)
    return 0 if len(view.serving) >= wanted else UnavailableError.exit_code


def _print(group: str, view: GroupView, replicas: Sequence[ReplicaRecord], wanted: int) -> None:
    order = view.order or OrderRecord(serial=0)
    does = (
        f"stays at {order.generation}"
        if order.generation
        else f"follows {order.follow}"
        if order.serial
        else "follows what its program says"
    )
    click.echo(f"{group}: {len(view.serving)} of {wanted} serve; {does}")
    rows = [
        (
            one.name,
            _role(view, one),
            one.state,
            one.generation or "-",
            " ".join(one.kept) or "-",
            f"{one.host} {one.address}",
            str(one.pid),
            one.problem or "-",
        )
        for one in replicas
    ]
    if rows:
        columns = ("replica", "role", "state", "serves", "in memory", "where", "pid", "problem")
        table(columns, rows, right=frozenset({"pid"}))


def _role(view: GroupView, replica: ReplicaRecord) -> str:
    if view.roles is not None and replica.name in view.roles.drained:
        return "drained"
    return view.role(replica.name)


def _json(view: GroupView, replica: ReplicaRecord) -> JsonValue:
    return {
        "name": replica.name,
        "role": _role(view, replica),
        "state": replica.state,
        "generation": replica.generation or None,
        "kept": list(replica.kept),
        "order": replica.order,
        "problem": replica.problem,
        "address": replica.address,
        "host": replica.host,
        "pid": replica.pid,
    }
