"""Every error of ckpt, grouped by what its handler does. Pure.

    CkptError                        code, retry, exit_code
     ├─ UsageError (ValueError)      the call cannot work: fix the call                   exit 2
     │   └─ FormatVersionError       written by a newer ckpt: upgrade                     exit 2
     ├─ NotFoundError (LookupError)  no such store, snapshot, tag, leaf or object         exit 10
     ├─ UnavailableError             a store or peer does not answer: repeat later        exit 11
     │   ├─ StoreFullError           no space or quota is left
     │   ├─ StoreDeniedError         permissions or credentials are missing
     │   ├─ OverloadedError          replicas have too much to do: ask again later
     │   └─ DeadlineError            no replica answered in time
     ├─ ConflictError                another write came first: read, then decide          exit 12
     │   ├─ KeyExistsError           a create-once key already holds other bytes
     │   ├─ NewerSnapshotError       a newer snapshot became durable: choose again
     │   ├─ FencedError              a newer epoch is open: this writer must stop
     │   └─ SupersededError          the job's nodes have another writer now: look who is who
     ├─ CommitUnknownError           the reply was lost: repeat the same bytes, same key  exit 13
     ├─ AnswerLostError              a replica was lost while it computed                 exit 13
     ├─ IntegrityError               bytes differ from their digest, or are inconsistent  exit 20
     └─ InternalError                a bug in ckpt                                        exit 70

A message is a lower-case fact, then ``key=value`` pairs, then what to do.
"""

from __future__ import annotations

from typing import ClassVar


class CkptError(Exception):
    """Base of every error that ckpt raises.

    ``code`` is a stable kebab-case word for programs. ``retry`` says whether repeating the same
    call can help. ``exit_code`` is the exit status of the command line.
    """

    code: ClassVar[str] = "error"
    retry: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1


class UsageError(CkptError, ValueError):
    """The call cannot work; the message names the remedy."""

    code = "usage"
    exit_code = 2


class FormatVersionError(UsageError):
    """A record was written in a format version that this release does not read."""

    code = "format-version"


class NotFoundError(CkptError, LookupError):
    """No such store, snapshot, tag, leaf or object."""

    code = "not-found"
    exit_code = 10


class UnavailableError(CkptError):
    """A store or peer did not answer, or cannot take the bytes now."""

    code = "unavailable"
    retry = True
    exit_code = 11


class StoreFullError(UnavailableError):
    """No space, inode or quota is left in the store."""

    code = "store-full"


class StoreDeniedError(UnavailableError):
    """The store refuses: permissions, credentials or a read-only mount."""

    code = "store-denied"


class OverloadedError(UnavailableError):
    """No replica took the request: nothing of it was begun."""

    code = "overloaded"


class DeadlineError(UnavailableError):
    """A request's deadline passed while a replica computed."""

    code = "deadline"


class ConflictError(CkptError):
    """Another writer's bytes came first."""

    code = "conflict"
    exit_code = 12


class KeyExistsError(ConflictError):
    """A create-once key is already taken."""

    code = "key-exists"


class NewerSnapshotError(ConflictError):
    """A snapshot became durable that is newer than the one chosen for training to resume."""

    code = "newer-snapshot"


class FencedError(ConflictError):
    """A newer epoch is open, so records of this writer are void."""

    code = "fenced"


class SupersededError(ConflictError):
    """A later membership epoch of the same job has its own writer: this node's attempt is over, the
    program is not."""

    code = "superseded"


class CommitUnknownError(CkptError):
    """A write's reply was lost. Whether it was written is unknown until the same bytes are
    repeated."""

    code = "commit-unknown"
    retry = True
    exit_code = 13


class AnswerLostError(CkptError):
    """A request that must not be repeated by itself was sent, and its answer was lost."""

    code = "answer-lost"
    exit_code = 13


class IntegrityError(CkptError):
    """Stored bytes differ from their digest, or a record contradicts itself."""

    code = "integrity"
    exit_code = 20


class InternalError(CkptError):
    """A bug in ckpt."""

    code = "internal"
    exit_code = 70
