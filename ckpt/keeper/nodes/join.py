"""How a keeper joins the nodes of its job: puts membership, mesh and the decision about failures
together."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from datetime import datetime, timezone
from importlib import import_module

from msgspec import structs

from ckpt.cluster.endpoint import Endpoint
from ckpt.cluster.membership.admission import NO_LOG, SharedFacts, shared_facts
from ckpt.cluster.membership.decide import MembershipOptions
from ckpt.cluster.membership.open import open_membership
from ckpt.cluster.membership.records import NodeInfo
from ckpt.cluster.membership.transactions import agent_fact
from ckpt.cluster.mesh import messages as mesh
from ckpt.cluster.mesh.connections import Mesh, MeshObserver
from ckpt.cluster.node.epochs import NodeDeps, NodeObserver
from ckpt.cluster.node.leading import (
    FLOOR_CAPABILITY,
    LINE_CAPABILITY,
    PEER_CAPABILITY,
    EpochNote,
    FailureDecision,
)
from ckpt.cluster.node.node import Node
from ckpt.cluster.secret import missing_secret
from ckpt.cluster.tls import check_network, check_tls, job_tls
from ckpt.events import Emit, Event
from ckpt.ipc.client import KeeperSpec
from ckpt.ipc.cluster_spec import NodesSpec, host_towards
from ckpt.ipc.messages import Policy
from ckpt.keeper.attempts.events import Failure
from ckpt.keeper.attempts.failures import (
    EndJob,
    EpochFailures,
    FailureHistory,
    StartNextEpoch,
    WaitForCause,
    decide,
)
from ckpt.keeper.cluster_view import free_port
from ckpt.keeper.job_state import JobState
from ckpt.keyspace.address import ETCD_SCHEME, keyspace_location
from ckpt.values import MembershipEpoch

VALID_S_WANTED = 86_400.0
"""A certificate that ends sooner is an alarm: connections that are made after its end fail."""


def check_spec(spec: NodesSpec) -> None:
    """Raise UsageError if the nodes could not authenticate each other, or their traffic would be
    readable by others."""
    if spec.agent:
        agent_fact(spec.agent)
    if not spec.secret and spec.where.startswith(ETCD_SCHEME):
        raise missing_secret(spec.where)
    host = spec.host or host_towards(spec.where)
    check_network(spec, host)
    check_tls(spec, host)


def join(
    spec: NodesSpec,
    secret: bytes,
    *,
    host: str,
    state: JobState,
    seen: Callable[[], MembershipEpoch],
    peer_port: int,
    observer: NodeObserver,
    emit: Emit,
) -> Node:
    """Join as a node that serves its memory at ``peer_port``. Returns at once; threads do the
    rest.

    ``seen`` returns the greatest attempt that this keeper knows of, and the line of the membership
    epochs that it has seen. The threads call it, look which log the stores hold, and read policy
    and progress from ``state``, whenever they need them.
    """
    witnesses = _witnesses_min(spec)
    tls = job_tls(spec)
    _report_validity(check_tls(spec, host), emit)

    def open_mesh(node: str, mesh_observer: MeshObserver) -> Mesh:
        return Mesh(
            secret,
            job=spec.job,
            node=node,
            listen=f"{host}:0",
            observer=mesh_observer,
            emit=emit,
            tls=tls,
            ttl_s=spec.ttl_s,
        )

    def info() -> NodeInfo:
        log_id = import_module("ckpt.keeper.uploads.store_log").log_id_of(state.spec, emit)
        facts = said_by(state.spec, spec, log_id, capture_rule=state.launch.capture_rule)
        name, known = socket.gethostname(), seen()
        return NodeInfo(
            # A new id for each join, which tells a node from its earlier self that was lost.
            node=f"{_printable(name)}-{os.urandom(6).hex()}",
            host=name,
            slots=state.memory.ranks,
            domain=spec.domain,
            address=host,
            capabilities=(
                f"{PEER_CAPABILITY}{memory_address(host, peer_port)}",
                f"{FLOOR_CAPABILITY}{known.number}",
                f"{LINE_CAPABILITY}{known.line}",
                *facts.capabilities(),
            ),
        )

    def decide_failures(
        note: EpochNote,
        failures: Mapping[str, mesh.NodeFailed],
        lost: Mapping[str, float],
        ended: AbstractSet[str],
        received_s: Mapping[str, float],
        now_s: float,
    ) -> FailureDecision:
        known = EpochFailures({}, lost, ended, state.memory.completed())
        return _decided(note, failures, known, received_s, now_s, state.launch.policy)

    return Node(
        open_membership(
            keyspace_location(spec),
            spec.job,
            ttl_s=spec.ttl_s,
            witnesses_min=witnesses,
            on_act_until=observer.on_act_until,
        ),
        info,
        MembershipOptions(
            nodes_min=spec.nodes_min,
            nodes_max=spec.nodes_max,
            last_call_s=spec.last_call_s,
            shrink_wait_s=spec.shrink_wait_s,
            witnesses_min=witnesses,
        ),
        decide_failures=decide_failures,
        observer=observer,
        emit=emit,
        deps=NodeDeps(
            open_mesh, lambda: (host, free_port(host)), spec.agent, spec.ttl_s, spec.ends_after
        ),
        grow_wait_s=spec.grow_wait_s,
    )


def said_by(
    job: KeeperSpec, nodes: NodesSpec, log_id: str | None, *, capture_rule: str = ""
) -> SharedFacts:
    """What this node says that all nodes must share. ``log_id``: see ``log_id_of``.
    ``capture_rule``: see ``Hello.capture_rule``."""
    options: dict[str, object] = {"nodes": f"{nodes.nodes_min}:{nodes.nodes_max}"}
    options["stores"] = len(job.stores)
    if job.write_quorum is not None:
        options["write_quorum"] = job.write_quorum
    if job.encryption_key is not None:
        options["encrypted"] = "yes"
    if job.named:
        options["job"] = job.job
    log_id = NO_LOG if log_id is None else log_id
    return shared_facts(job.stores, log_id=log_id, options=options, capture_rule=capture_rule)


def memory_address(host: str, port: int) -> str:
    """Where this node serves its memory, as other nodes parse it."""
    return str(Endpoint(host, port, plaintext=True))


def _failure(failed: mesh.NodeFailed, received_s: float) -> Failure:
    """A node's report; its time is the leader's own, since clocks of different nodes are not
    compared."""
    return Failure(
        failed.rank,
        failed.kind,
        failed.text,
        failed.status,
        received_s,
        failed.fingerprint,
        failed.step,
        failed.final,
        failed.passing,
    )


def _decided(
    note: EpochNote,
    failures: Mapping[str, mesh.NodeFailed],
    known: EpochFailures,
    received_s: Mapping[str, float],
    now_s: float,
    policy: Policy,
) -> FailureDecision:
    """The decision, in the form that the membership's leader publishes.

    ``known`` is completed with the ``failures`` that nodes reported, received at ``received_s``.
    """
    reported = {node: _failure(failed, received_s[node]) for node, failed in failures.items()}
    calls, completed = max(
        [(known.calls, known.completed)]
        + [(failed.calls, failed.completed) for failed in failures.values()]
    )
    known = replace(
        known,
        failures=reported,
        completed=completed,
        calls=calls,
        moved=any(failed.moved for failed in failures.values()),
    )
    history = FailureHistory(
        note.fingerprint,
        note.step,
        note.same,
        note.stuck,
        note.completed,
        note.overdue,
        note.calls,
        note.restarts,
    )
    match decide(known, history, policy, now_s, clock_s=time.time()):
        case StartNextEpoch(after, text, stopped):
            return FailureDecision(_note(after, text), stopped=stopped)
        case EndJob(status, text, futile):
            return FailureDecision(structs.replace(_note(history, text), end=status, futile=futile))
        case WaitForCause(until_s):
            return FailureDecision(until_s=until_s)
        case _:
            return FailureDecision()


def _note(history: FailureHistory, text: str) -> EpochNote:
    return EpochNote(
        why=text,
        fingerprint=history.fingerprint,
        step=history.step,
        same=history.same,
        stuck=history.stuck,
        completed=history.completed,
        overdue=history.overdue,
        calls=history.calls,
        restarts=history.restarts,
    )


def _report_validity(ends_s: float | None, emit: Emit) -> None:
    if ends_s is not None:
        until = datetime.fromtimestamp(ends_s, timezone.utc).isoformat()
        text = (
            f"nodes use TLS; this node's certificate is valid until {until}, and is read when a "
            "launch begins"
        )
        emit(Event("tls", text, alarm=ends_s - time.time() < VALID_S_WANTED))


def _witnesses_min(spec: NodesSpec) -> int:
    """With two nodes only one is left to see the other's end."""
    return 2 if spec.nodes_max > 2 else 1


def _printable(host: str) -> str:
    return (
        "".join(letter if letter.isalnum() or letter in "_-" else "-" for letter in host)[:40]
        or "node"
    )
