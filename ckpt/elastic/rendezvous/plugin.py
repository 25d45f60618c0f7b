"""The rendezvous handler of torchrun's agents, over ckpt's membership.

No agent is special: each may die.

torch's agent calls ``next_rendezvous`` to start its workers, and ``num_nodes_waiting`` ten times
a second to learn whether to restart them. Both are answered by pure decisions about what the
agent's thread saw last.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

from msgspec import structs
from torch.distributed import DistStoreError
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.utils.distributed import get_free_port

from ckpt.cluster.secret import missing_secret, read_secret
from ckpt.cluster.tls import check_tls
from ckpt.elastic.rendezvous.agent import RendezvousAgent
from ckpt.elastic.rendezvous.decide import (
    AgentsView,
    PlacedInRound,
    RendezvousRound,
    RendezvousShut,
    RoundPending,
    RunUnranked,
    StandBy,
    count_present,
    decide_for_agent,
    restart_request,
    round_problem,
)
from ckpt.elastic.rendezvous.options import BACKEND, RendezvousSettings, parse_settings
from ckpt.elastic.rendezvous.store import RoundStore, UnrankedStore
from ckpt.elastic.verdict import VERDICT_VARIABLE, VerdictFile
from ckpt.errors import CkptError, FencedError, StoreDeniedError, UsageError
from ckpt.events import Event, emit_to_logging
from ckpt.ipc.cluster_spec import host_towards, nodes_to_environment
from ckpt.ipc.runtime_dir import claim_instance, runtime_root
from ckpt.keyspace.address import ETCD_SCHEME

CONNECT_S = 60.0
"""How long an agent that has never seen the membership tries to reach it."""
PENDING_FIRST_S = 10.0
PENDING_NEXT_S = 60.0
"""When an agent says for what it waits: first, and again."""
LOOK_S = 1.0
KEEPERS_S = 1.0
"""How long keepers wait for more than the minimum, if all agents of a smaller round are there."""

NO_PORT = (
    "none: this node is a standby and has no rank; call init_process_group in a function decorated "
    "with @ckpt.resilient, "
    "or start the nodes with standby=wait"
)
"""The MASTER_PORT of workers without ranks: ``init_process_group`` rejects it, and quotes it."""


class StandbyReleased(SystemExit):
    """The job ended and this agent was not needed: its process exits with 0.

    torch has RendezvousGracefulExitError for this, but its launcher then fails on the missing
    result (torch 2.13).
    """


def handler_of(parameters: RendezvousParameters) -> Rendezvous:
    """The handler for torchrun's options. Raises UsageError, which is a ValueError."""
    settings = parse_settings(
        parameters.run_id,
        parameters.endpoint,
        agents_min=parameters.min_nodes,
        agents_max=parameters.max_nodes,
        config=parameters.config,
        local_addr=parameters.local_addr or "",
    )
    if not settings.host:
        settings = replace(settings, host=host_towards(settings.agents_spec.where))
    _check_secret(settings)
    # Whether nodes may go without TLS is checked by keepers: undecorated programs serve no memory.
    if settings.nodes is not None:
        check_tls(settings.nodes, settings.host)
    return Rendezvous(settings)


def _check_secret(settings: RendezvousSettings) -> None:
    """Raise UsageError where keepers would: before workers are started, and load their imports."""
    nodes = settings.nodes
    if nodes is None:
        return
    if nodes.secret:
        read_secret(Path(nodes.secret))
    elif settings.rules.warm and nodes.where.startswith(ETCD_SCHEME):
        raise missing_secret(nodes.where)


class Rendezvous(RendezvousHandler):
    """The handler of one agent. See ``RendezvousHandler`` for the methods."""

    def __init__(self, settings: RendezvousSettings) -> None:
        self._settings = settings
        self._emit = emit_to_logging(0)
        self._agent = RendezvousAgent(settings, self._emit)
        self._last = 0
        self._doomed = ""
        self._last_request = ""
        self._timed_out = False
        nodes = settings.nodes
        self._claim = claim_instance(f"{nodes.where}\0{nodes.job}") if nodes is not None else None
        self._verdict = VerdictFile(runtime_root() / f"{self._agent.name}.verdict")
        os.environ[VERDICT_VARIABLE] = str(self._verdict.path)
        atexit.register(self._verdict.remove)
        atexit.register(self._agent.leave)  # a launcher that is ended by a signal calls no shutdown
        if self._claim is not None:
            atexit.register(self._claim.release)

    def get_backend(self) -> str:
        return BACKEND

    def get_run_id(self) -> str:
        return self._settings.run_id

    @property
    def use_agent_store(self) -> bool:
        """False: the agents' store ends with its round."""
        return False

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for a round, or for leave to start workers without ranks.

        Ends the process with status 0, by ``StandbyReleased``, if the job ended without needing
        this agent.
        """
        agent, settings = self._agent, self._settings
        self._obey_verdict()
        self._export_nodes(settings.rules.last_call_s, None)
        agent.wait_for_round(self._last)
        agent.start()
        began_s = time.monotonic()
        until_s = began_s + settings.join_s
        stood_by = False
        told_s = began_s + PENDING_FIRST_S
        reason = "the membership was not seen"
        view: AgentsView | None = None
        while True:
            newest = agent.next_view(view, min(LOOK_S, max(0.0, until_s - time.monotonic())))
            self._give_up_early(began_s)
            if newest is not None:
                view = newest
                match decide_for_agent(view, agent.name, self._last, settings.rules):
                    case PlacedInRound(round_):
                        if (info := self._begin_round(round_)) is not None:
                            return info
                        stood_by = False
                    case RunUnranked(reason):
                        return self._run_unranked(reason, view.round)
                    case StandBy():
                        stood_by = True
                        until_s = time.monotonic() + settings.join_s
                    case RoundPending(reason):
                        told_s = self._tell_pending(reason, began_s, told_s)
                    case RendezvousShut(reason) if stood_by:
                        self._report(
                            "standby-released", f"the job ended without needing this node: {reason}"
                        )
                        raise StandbyReleased(0)
                    case RendezvousShut(reason):
                        raise RendezvousClosedError(f"the rendezvous is closed: {reason}")
            if time.monotonic() > until_s:
                self._timed_out = True
                agent.leave()
                raise RendezvousTimeoutError(f"no round within {settings.join_s:g} s: {reason}")

    def is_closed(self) -> bool:
        with _connecting():
            return self._agent.closed_reason() is not None

    def set_closed(self) -> None:
        with _connecting():
            self._agent.close(f"by the agent {self._agent.name}")

    def num_nodes_waiting(self) -> int:
        """How many agents wait for this one to stop its workers; see ``restart_request``."""
        agent, view = self._agent, self._agent.latest_view()
        if agent.own_round is None or view is None:
            return 0
        if self._doomed:
            count, reason = 1, self._doomed
        else:
            count, reason = restart_request(
                view, agent.own_round, self._settings.rules, agent.lost_for_s
            )
        if count and reason != self._last_request:
            self._report("asked-back", f"the workers of this node are restarted: {reason}")
        self._last_request = reason if count else ""
        return count

    def shutdown(self) -> bool:
        """Leave; closes the rendezvous only if this agent has a place in the round."""
        try:
            if self._closes():
                self._agent.close(f"the agent {self._agent.name} has ended")
            return True
        except CkptError as error:
            self._report("close-failed", f"the rendezvous could not be closed: {error}")
            return False
        finally:
            self._agent.leave()

    # ---- helpers

    def _obey_verdict(self) -> None:
        """Raise RendezvousClosedError if the last workers said that the same would come again.

        One that another program fenced would fence that in turn: the whole job is over. A node that
        was started wrongly is none of the job's, which goes on.
        """
        verdict = self._verdict.read()
        if verdict is None:
            return
        if verdict.status == FencedError.exit_code:
            with _connecting():
                self._agent.close(verdict.text)
        raise RendezvousClosedError(f"no restart follows: {verdict.text}")

    def _closes(self) -> bool:
        """Whether the end of this agent is the job's.

        It is if the agent has a place in the newest round, and did not merely wait for one.
        """
        agent, view = self._agent, self._agent.latest_view()
        if agent.own_round is not None:
            return True
        return (
            not self._timed_out
            and view is not None
            and view.round is not None
            and agent.name in view.round.agents
        )

    def _tell_pending(self, reason: str, began_s: float, due_s: float) -> float:
        """Say now and then that other agents are waited for; returns when to say it next."""
        now_s, settings = time.monotonic(), self._settings
        if now_s < due_s:
            return due_s
        where = settings.agents_spec.where
        place = where if where.startswith(ETCD_SCHEME) else f"the file {where} of this machine"
        text = (
            f"waiting for {now_s - began_s:.0f} s, {settings.join_s:.0f} s at most, for other "
            f"nodes of the job {settings.run_id!r}: {reason}; they meet in {place}, see "
            "--rdzv-endpoint"
        )
        self._report("nodes-awaited", text)
        return now_s + PENDING_NEXT_S

    def _give_up_early(self, began_s: float) -> None:
        agent = self._agent
        if agent.refusal:
            raise RendezvousClosedError(f"the rendezvous is closed: {agent.refusal}")
        problem = agent.problem
        if agent.latest_view() is not None or problem is None:
            return
        if isinstance(problem, UsageError):
            raise problem
        if isinstance(problem, StoreDeniedError) or time.monotonic() - began_s > CONNECT_S:
            raise RendezvousConnectionError(
                f"the membership is unreachable: {problem}"
            ) from problem

    def _begin_round(self, round_: RendezvousRound) -> RendezvousInfo | None:
        """Begin a round together with its other agents; None if one of them is gone.

        Then another round must follow.
        """
        agent = self._agent
        self._doomed = ""
        store = RoundStore(
            agent.keyspace,
            round_,
            round_problem=lambda: self._round_problem(round_),
            count_present=lambda: self._count_present(round_),
            on_doomed=self._mark_doomed,
        )
        rank = round_.agents.index(agent.name)
        address, port = RendezvousStoreInfo.MASTER_ADDR_KEY, RendezvousStoreInfo.MASTER_PORT_KEY
        with _connecting():
            if rank == 0:
                store.set(address, self._settings.host)
                store.set(port, str(get_free_port()))  # type: ignore[no-untyped-call]
            reason = store.wait_for_all((address, port))
        if reason:
            self._report("round-over", f"round {round_.number} ended before it began: {reason}")
            self._last = round_.number
            agent.wait_for_round(self._last)
            return None
        self._last = round_.number
        agent.run_round(round_)
        rules = self._settings.rules
        self._export_nodes(
            rules.last_call_s if len(round_.agents) == rules.agents_max else KEEPERS_S, round_
        )
        info = RendezvousStoreInfo(store.get(address).decode(), int(store.get(port)))
        return RendezvousInfo(store, rank, len(round_.agents), info)

    def _run_unranked(self, reason: str, round_: RendezvousRound | None) -> RendezvousInfo:
        """Start workers without ranks: their keeper gives them ranks, or they refuse to train."""
        self._export_nodes(self._settings.rules.last_call_s, round_)
        self._report("apart", f"this node starts its workers without ranks: {reason}")
        self._agent.run_unranked()
        # At least 2, so that a program which skips the process group in a world of one cannot
        # train.
        agents = max(2, self._settings.rules.agents_max)
        # torch writes the port into the environment as text, so it can be a sentence.
        info = RendezvousStoreInfo(self._settings.host, cast(int, NO_PORT))
        return RendezvousInfo(UnrankedStore(agents), agents, agents, info)

    def _export_nodes(self, last_call_s: float, round_: RendezvousRound | None) -> None:
        """Set the environment from which workers inherit how keepers find each other, and which
        end of the job is that of ``round_``."""
        nodes = self._settings.nodes
        if nodes is not None:
            agent = self._agent.name if self._settings.shares_service else ""
            spec = structs.replace(
                nodes,
                last_call_s=last_call_s,
                agent=agent,
                instance=0 if self._claim is None else self._claim.number,
                ends_after=-1 if round_ is None else round_.ends_after,
            )
            os.environ.update(nodes_to_environment(spec))

    def _round_problem(self, round_: RendezvousRound) -> str:
        view = self._agent.latest_view()
        return "" if view is None else round_problem(view, round_)

    def _count_present(self, round_: RendezvousRound) -> int:
        view = self._agent.latest_view()
        return len(round_.agents) if view is None else count_present(view, round_)

    def _mark_doomed(self, reason: str) -> None:
        self._doomed = f"round {self._last} ended before it began: {reason}"

    def _report(self, kind: str, text: str) -> None:
        self._emit(Event(kind, text, alarm=True))


@contextmanager
def _connecting() -> Iterator[None]:
    """Around calls to the membership in the main thread: translates errors for torch."""
    try:
        yield
    except (CkptError, DistStoreError) as error:
        raise RendezvousConnectionError(f"the membership is unreachable: {error}") from error
