"""What must be true of a log after what its only writer was told. Its own rules, a few lines,
beside those of ``ckpt.commit``.

An operation whose outcome is not known makes two worlds of one. Which of them is true shows once a
later record counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ckpt.values import SnapshotId
from kit.store_chaos.content import Content

Pair = SnapshotId


@dataclass(frozen=True)
class LogTruth:
    """One history: epochs with the pair that each went on from, what each pair holds, and what was
    dropped."""

    opens: tuple[tuple[int, Pair | None], ...] = ()
    commits: tuple[tuple[Pair, Content], ...] = ()
    dropped: frozenset[Pair] = frozenset()

    @property
    def epoch(self) -> int:
        """The newest."""
        return self.opens[-1][0] if self.opens else 0

    def existing(self) -> dict[Pair, Content]:
        """What was committed and not dropped."""
        return {pair: content for pair, content in self.commits if pair not in self.dropped}

    def line(self) -> list[Pair]:
        """The existing snapshots that training came through, newest first."""
        origins = dict(self.opens)
        epoch, last = self.epoch, None
        found: list[Pair] = []
        while epoch:
            steps = sorted(
                (pair.step for pair in self.existing() if pair.epoch == epoch), reverse=True
            )
            found += [Pair(epoch, step) for step in steps if last is None or step <= last]
            origin = origins.get(epoch)
            epoch, last = (origin.epoch, origin.step) if origin is not None else (0, None)
        return found


class Truth:
    """The worlds that are possible. ``settled``: the last that was asked for succeeded, so what was
    in doubt is decided."""

    def __init__(self) -> None:
        self.worlds: frozenset[LogTruth] = frozenset({LogTruth()})
        self.settled = True
        self.ever: set[tuple[Pair, Content]] = set()
        """All that may ever have been committed."""

    def opened(self, epoch: int, origin: Pair | None) -> None:
        """An epoch is open."""
        self._turn(lambda world: _open(world, origin) if world.epoch + 1 == epoch else None)
        self.settled = True

    def maybe_opened(self, origin: Pair | None) -> None:
        """Nobody knows whether the next epoch was opened."""
        self._doubt(lambda world: _open(world, origin))

    def committed(self, pair: Pair, content: Content) -> None:
        """The snapshot exists."""
        self.ever.add((pair, content))
        self._turn(lambda world: _commit(world, pair, content))
        self.settled = True

    def maybe_committed(self, pair: Pair, content: Content) -> None:
        """Nobody knows whether it does."""
        self.ever.add((pair, content))
        self._doubt(lambda world: _commit(world, pair, content))

    def dropped(self, pairs: Iterable[Pair]) -> None:
        """These do not exist any more."""
        gone = frozenset(pairs)
        self._turn(lambda world: replace(world, dropped=world.dropped | gone))
        self.settled = True

    def maybe_dropped(self, pairs: Iterable[Pair]) -> None:
        """Nobody knows whether they do."""
        gone = frozenset(pairs)
        self._doubt(lambda world: replace(world, dropped=world.dropped | gone))

    def newest(self) -> set[Pair | None]:
        """What may be the newest snapshot."""
        return {next(iter(world.line()), None) for world in self.worlds}

    def of_step(self, step: int) -> set[Pair | None]:
        """Which snapshot may be meant by a step."""
        return {
            next((pair for pair in world.line() if pair.step == step), None)
            for world in self.worlds
        }

    def steps(self) -> list[int]:
        """Those of all snapshots that may be on the line."""
        return sorted({pair.step for world in self.worlds for pair in world.line()})

    def contents(self, pair: Pair) -> list[Content]:
        """What a snapshot that may exist may hold."""
        return sorted(
            {
                content
                for world in self.worlds
                if (content := world.existing().get(pair)) is not None
            }
        )

    def fitting(self, found: frozenset[Pair], newest: Pair | None) -> frozenset[LogTruth]:
        """The worlds in which these are all snapshots, and that one the newest."""
        return frozenset(
            world
            for world in self.worlds
            if world.existing().keys() == found and next(iter(world.line()), None) == newest
        )

    def see(self, found: frozenset[Pair], newest: Pair | None) -> str:
        """All snapshots were found where enough stores answer. What contradicts the truth, in
        words; empty for nothing."""
        fitting = self.fitting(found, newest)
        if not fitting:
            known = [
                (sorted(world.existing()), next(iter(world.line()), None)) for world in self.worlds
            ]
            return f"no world fits. found={sorted(found)} newest={newest} worlds={known}"
        if self.settled:
            self.worlds = fitting
        return ""

    def known(self) -> LogTruth:
        """What is true, once nothing is in doubt: one of the worlds, which then differ in nothing
        that can be seen."""
        known = {
            (frozenset(world.existing().items()), tuple(world.line())[:1]) for world in self.worlds
        }
        assert len(known) == 1, f"still in doubt. worlds={known}"
        return next(iter(self.worlds))

    def _turn(self, turn: Callable[[LogTruth], LogTruth | None]) -> None:
        self.worlds = frozenset(new for world in self.worlds if (new := turn(world)) is not None)
        assert self.worlds, "what the writer was told contradicts what it was told before"

    def _doubt(self, turn: Callable[[LogTruth], LogTruth | None]) -> None:
        self.worlds |= {new for world in self.worlds if (new := turn(world)) is not None}
        self.settled = False


def _open(world: LogTruth, origin: Pair | None) -> LogTruth:
    return replace(world, opens=(*world.opens, (world.epoch + 1, origin)))


def _commit(world: LogTruth, pair: Pair, content: Content) -> LogTruth | None:
    return (
        replace(world, commits=(*world.commits, (pair, content)))
        if world.epoch == pair.epoch
        else None
    )
