"""Memory of several nodes: what all hold together, where it is, what this node lends, and what it keeps on others."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ckpt.errors import UsageError
from ckpt.fleet import words as said
from ckpt.fleet.ways import Epoch
from ckpt.fleet.words import Holding
from ckpt.keeper.gather import Gather
from ckpt.keeper.held import complete, lost
from ckpt.keeper.job import Job
from ckpt.keeper.lend import Lending
from ckpt.keeper.mirror import RETRY_S, Mirror, Task
from ckpt.keeper.mirror_rounds import Round, Word, retained
from ckpt.keeper.nodes_among import Among
from ckpt.link.nodes_spec import NodesSpec
from ckpt.link.seating import Source
from ckpt.membership.mirrors import Holder, place_mirrors
from ckpt.observe.events import Event, Tell
from ckpt.peer.auth import Secret
from ckpt.peer.endpoint import Endpoint
from ckpt.peer.store import PeerStore
from ckpt.values import SnapshotId


class NodesMemory:
    """See the module. In the loop; ``host``: where this node lends its memory."""

    def __init__(self, job: Job, among: Among, spec: NodesSpec, secret: bytes, *, host: str, tell: Tell) -> None:
        self._job = job
        self._among = among
        self._spec = spec
        self._secret = Secret.of(secret)
        self._gather = Gather(among.say)
        self._sources: dict[SnapshotId, tuple[tuple[str, ...], ...]] = {}
        self._lending = Lending(
            self._secret, Endpoint(host, 0, plaintext=spec.plaintext), tell=tell, budget_bytes=spec.mirror_bytes
        )
        self._mirror = Mirror(done=lambda task, came: job.post(lambda: self._done(task, came)), tell=tell)
        self._peers: dict[str, PeerStore] = {}
        self._keep_at_s = 0.0
        """When a pair may be sent next, where the last one did not come everywhere."""
        self._told_bad = ""
        self.round = Round()
        """Which pair all keep now, and which all have."""
        self.word = Word()
        """What this node has kept, and could not keep, since the epoch began."""
        self._before: frozenset[SnapshotId] = frozenset()

    @property
    def port(self) -> int:
        """Where it lends."""
        return self._lending.port

    def see(self, epoch: Epoch) -> None:
        """A new epoch: what was known of others' memory is known no more."""
        self._sources.clear()
        self.round, self.word = Round(), Word()
        self._before = self._lending.pairs()
        self._keep_at_s = 0.0
        self._lending.see_epoch(epoch.number)
        for address in self._peers.keys() - set(epoch.peers.values()):
            self._peers.pop(address).close()

    def tick(self, now_s: float, *, placed: bool) -> float:
        """Show what there is, keep the newest pair on others; returns seconds until the next look."""
        if self._job.slots is not None:
            self._lending.slots.show(self._job.slots)
        if placed and self._among.others:
            self._keep_named(now_s)
        return self._gather.tick(now_s)

    def close(self) -> None:
        """Lend no more, and keep nothing on others any more. Waits briefly for what is on its way."""
        self._mirror.close()
        for peer in self._peers.values():
            peer.close()
        self._lending.close()

    # ---- what can be restored

    def gather(self, answer: Callable[[dict[SnapshotId, str]], object]) -> None:
        """On the node of rank 0: have ``answer`` told the pairs, with origins, that all nodes together hold in memory."""
        epoch = self._among.epoch
        assert epoch is not None, "an epoch with ranks here"

        def have(held: Mapping[str, Sequence[Holding]]) -> None:
            if self._number() != epoch.number:
                return  # who asked is of an attempt that is over
            pairs = complete(held)
            for snapshot, ranks in lost(held).items():
                text = f"{snapshot} is not whole in memory: nobody has the share of {len(ranks)} ranks"
                self._job.tell(Event("memory-lost", text, {"ranks": ",".join(map(str, ranks[:16]))}))
            places = tuple((one.snapshot, one.world_size, one.sources) for one in pairs)
            word = said.Sources(attempt=epoch.number, pairs=places)
            self._see_sources(word)
            self._among.say_to_all(word)
            answer({one.snapshot: one.origin for one in reversed(pairs)})

        others = [node for node in epoch.addresses if node != self._among.me]
        self._gather.ask(others, (self._among.me, self._holdings()), time.monotonic(), have)

    def take(self, node: str, word: said.AskHeld | said.Held | said.Sources) -> None:
        """What another node says."""
        match word:
            case said.AskHeld(call=call):
                self._among.say(node, said.Held(call=call, holdings=tuple(self._holdings())))
            case said.Held():
                self._gather.heard(node, word, time.monotonic())
            case said.Sources():
                self._see_sources(word)

    def line_down(self, node: str) -> None:
        """A node answers nothing any more."""
        self._gather.lost(node, time.monotonic())

    def sources(self, snapshot: SnapshotId) -> tuple[Source, ...]:
        """For each rank of a pair's world, where its share is; nothing where the pair isn't known."""
        epoch, found = self._among.epoch, self._sources.get(snapshot)
        if epoch is None or found is None:
            return ()
        return tuple(self._source(epoch, snapshot, rank, nodes) for rank, nodes in enumerate(found))

    def go_round(self, now: Round) -> None:
        """The node of rank 0 says which pair is kept next, and which all have: of what is kept here the others go."""
        if now != self.round:
            self.round = now
            self._lending.retain(retained(now, self._before))

    def _source(self, epoch: Epoch, snapshot: SnapshotId, rank: int, nodes: Sequence[str]) -> Source:
        """Whether a node has it in a slot or as a mirror may change while it is asked for, so both are tried."""
        peers = tuple(peer for node in nodes if (peer := epoch.peers.get(node)))
        local = self._local(snapshot, rank)
        return Source(local=-1 if local is None else local, slots=peers, mirrors=peers)

    def _local(self, snapshot: SnapshotId, rank: int) -> int | None:
        """The local rank whose slot holds that share."""
        for slot in self._job.slots or ():
            brief = slot.brief()
            if brief is not None and (brief[0].snapshot, brief[0].rank) == (snapshot, rank):
                return slot.rank
        return None

    def _holdings(self) -> list[Holding]:
        found = self._lending.mirrored()
        for slot in self._job.slots or ():
            brief = slot.brief()
            if brief is not None:
                held = brief[0]
                found.append(
                    Holding(snapshot=held.snapshot, origin=held.origin, world_size=held.world_size, rank=held.rank)
                )
        return found

    def _see_sources(self, word: said.Sources) -> None:
        epoch = self._among.epoch
        if epoch is not None and word.attempt == epoch.number:
            # Of one number that was given out twice the first counts, as in what is offered to restore.
            self._sources = {snapshot: sources for snapshot, _, sources in reversed(word.pairs)}

    # ---- mirrors

    def _keep_named(self, now_s: float) -> None:
        """Keep the pair that was named, here and on other nodes, unless the last one is still on its way."""
        job, epoch, named = self._job, self._among.epoch, self.round.named
        if self._mirror.busy or not self._spec.mirrors or job.slots is None or epoch is None or named is None:
            return
        if named in (self.word.mirrored, self.word.missed) or now_s < self._keep_at_s:
            return
        peers = self._peers_of(epoch)
        sealed = [one for rank in range(job.ranks) if (one := job.slots.sealed_of(rank, named)) is not None]
        task = Task(named, epoch.number, sealed, peers, self._lending.keep)
        if peers and len(sealed) == job.ranks:
            self._mirror.send(task)
            return
        task.let_go()
        self.word = replace(self.word, missed=named)

    def _peers_of(self, epoch: Epoch) -> dict[str, PeerStore]:
        """The nodes that keep what this one stages."""
        holders = [Holder(node, epoch.domains.get(node, node)) for node in epoch.record.ranks]
        nodes = place_mirrors(holders, self._spec.mirrors).get(self._among.me, ())
        try:
            return {node: self._peer(epoch.peers[node]) for node in nodes if epoch.peers.get(node)}
        except UsageError as error:
            if str(error) != self._told_bad:
                self._told_bad = str(error)
                text = f"nothing is kept on other nodes, for one can't be spoken to: {error}"
                self._job.tell(Event("mirror-failed", text, {"code": error.code}, alarm=True))
            return {}

    def _peer(self, address: str) -> PeerStore:
        if address not in self._peers:
            endpoint = Endpoint.parse(address, plaintext=self._spec.plaintext)
            self._peers[address] = PeerStore(endpoint, self._secret, epoch=self._number)
        return self._peers[address]

    def _number(self) -> int:
        epoch = self._among.epoch
        return epoch.number if epoch is not None else 0

    def _done(self, task: Task, came: frozenset[str]) -> None:
        """A pair is kept, or could not be. By the placement of an earlier epoch it says nothing."""
        if task.epoch != self._number():
            return
        if came == task.peers.keys():
            self.word = replace(self.word, mirrored=task.snapshot)
            return
        self.word = replace(self.word, missed=task.snapshot)
        self._keep_at_s = time.monotonic() + RETRY_S  # what kept it from coming is not over in a moment
