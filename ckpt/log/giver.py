"""Who gives out a log's places where its stores can't: the etcd that this process was told of, or a file of this machine."""

from __future__ import annotations

from ckpt.log.etcd import EtcdSequencer, etcd_here
from ckpt.log.sequencers import ANYWHERE, SqliteSequencer, database_path


def giver_beside(log_id: str, *, start: int = ANYWHERE, renew: bool = False) -> str:
    """Its name, for the ``stores`` record that puts it in charge; a file is made where there is none.

    ``start``: the file's first place. ``renew``: whatever the file gave out before counts no more, for a take-over. Raises
    UsageError, and UnavailableError where etcd does not answer or the file can't be made.
    """
    if (etcd := etcd_here()) is not None:
        return EtcdSequencer(etcd, log_id).name
    file = SqliteSequencer(database_path(log_id), log_id)
    return file.renew() if renew else file.make(start)
