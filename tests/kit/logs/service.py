"""An etcd of the simulated world: requests and replies are lost, processes die beside it, and its
data may be wiped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckpt.errors import UnavailableError
from ckpt.keyspace.address import EtcdOptions
from ckpt.keyspace.base import Transaction, TransactionResult
from kit.membership.memory_keyspace import MemoryServer

if TYPE_CHECKING:
    from kit.logs.simulation import LogSimulation

ANY_ETCD = EtcdOptions(endpoints=("simulated:1",))


class Service:
    """What all processes of a world share."""

    def __init__(self) -> None:
        self._server = MemoryServer()

    def wipe(self) -> None:
        """All its data is gone; it goes on, under the same name."""
        self._server = MemoryServer()

    def transact(self, transaction: Transaction) -> TransactionResult:
        """See Keyspace."""
        return self._server.transact(transaction)


class ServiceWay:
    """One call's way to it. See Keyspace; of its calls only this one is used."""

    def __init__(self, world: LogSimulation) -> None:
        self._world = world

    def transact(self, transaction: Transaction) -> TransactionResult:
        """See Keyspace."""
        world, process = self._world, self._world.acting
        assert world.service is not None and process is not None
        world.tick(voting=bool(transaction.then))
        fault = world.fault()
        if fault in ("lost_request", "late"):
            raise UnavailableError("no route to etcd")
        done = world.service.transact(transaction)
        if fault == "twice":
            done = world.service.transact(transaction)
        if fault == "death":
            process.die()
        if fault == "lost_reply":
            raise UnavailableError("etcd's reply is lost")
        return done

    def close(self) -> None:
        """See Keyspace."""
