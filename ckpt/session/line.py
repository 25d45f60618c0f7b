"""What a session may go on from, and the epochs that go on from it: by its keeper, or, without one, by this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ckpt.errors import CkptError, NotFoundError, UnavailableError
from ckpt.ipc.message import RemoteError
from ckpt.ipc.remote import from_error, to_error
from ckpt.log.catalog import candidates
from ckpt.log.select import Chosen
from ckpt.session.keeper.connection import KeeperLink
from ckpt.session.log import Log
from ckpt.session.options import Options, retention_of
from ckpt.session.restoring import Candidate
from ckpt.values import SnapshotId


class Line:
    """Used by the training thread. ``link``: the keeper, where there is one by now."""

    def __init__(self, log: Log, options: Options, *, link: Callable[[], KeeperLink | None]) -> None:
        self._log = log
        self._options = options
        self._link = link
        self._chosen: Chosen | None = None
        """What the log's newest snapshot was when it was last read here."""

    def newest_first(self) -> Sequence[Candidate]:
        """The snapshots on the line, best first, staged ones too; none where there is no store yet."""
        link = self._link()
        if link is not None and link.lost is None:
            return [Candidate(one.snapshot, one.tier == "staged") for one in link.choices()]
        self._chosen = Chosen(None)
        try:
            state = self._log.state()
        except NotFoundError:
            return ()
        self._chosen = Chosen(state.newest())
        found = [Candidate(snapshot) for snapshot in candidates(state)]
        if not found and state.short:
            # Beginning afresh would leave behind what the silent stores hold.
            raise UnavailableError(
                f"no snapshot can be seen, and there may be some: {state.short} repeat when more answer"
            )
        return found

    def open_next(self, resume: SnapshotId | None, *, newest: bool = False) -> tuple[int, str]:
        """Rank 0: open the next epoch, going on from ``resume``; its number and what its staged indexes carry.

        ``newest``: that was the best of what ``newest_first`` gave last; raises NewerSnapshotError where it is that no more.
        """
        link = self._link()
        if link is not None:
            return link.open_epoch(resume, retention=retention_of(self._options), newest=newest)
        return self._log.open_epoch(resume, chosen=self._chosen if newest else None), ""

    def open_word(self, resume: SnapshotId | None, *, newest: bool) -> str:
        """As ``open_next``; what the other ranks are to hear of it, an error too. See ``read_word``."""
        try:
            epoch, origin = self.open_next(resume, newest=newest)
            return f"{epoch} {origin}"
        except CkptError as error:
            message = from_error(error, rank=0)
            return f"{message.code} {message.text}"


def read_word(word: str) -> tuple[int, str]:
    """The epoch and origin of rank 0's word about it. Raises the error that it met."""
    code, _, text = word.partition(" ")
    if not code.isdigit():
        raise to_error(RemoteError(code, text, 0))
    return int(code), text
