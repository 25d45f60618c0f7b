"""What a peer's refusals mean for the caller of a store. Pure."""

from __future__ import annotations

from types import MappingProxyType

from ckpt.cluster.peermem.changed import BaseGoneError
from ckpt.cluster.peermem.client import CrowdedError
from ckpt.cluster.peermem.http import Answer
from ckpt.errors import (
    CkptError,
    FencedError,
    IntegrityError,
    KeyExistsError,
    NotFoundError,
    StoreDeniedError,
    StoreFullError,
    UnavailableError,
    UsageError,
)

_KINDS: MappingProxyType[int, tuple[type[CkptError], str]] = MappingProxyType(
    {
        400: (UnavailableError, "the peer doesn't understand; run one version on all nodes"),
        401: (StoreDeniedError, "the peer finds this request not genuine"),
        403: (UsageError, "the peer's own objects are only read"),
        404: (NotFoundError, "no such object"),
        409: (FencedError, "a newer epoch is open"),
        412: (KeyExistsError, "the key is taken; read it to learn whose bytes it holds"),
        413: (StoreFullError, "the object is larger than this peer takes"),
        416: (IntegrityError, "the object ends too early; read another copy"),
        421: (UnavailableError, "the peer was started anew, and what it held is gone"),
        424: (BaseGoneError, "the peer does not have the base any more; put the whole object"),
        503: (CrowdedError, "the peer serves as many others as it can"),
        507: (StoreFullError, "the peer's memory is used up; delete there or raise its budget"),
    }
)


def error_of(answer: Answer, *, key: str, url: str) -> CkptError | None:
    """The error to raise for ``answer``, or None where it is no refusal."""
    if answer.status < 300:
        return None
    kind, text = _KINDS.get(answer.status, (UnavailableError, "the peer refuses"))
    return kind(f"{text}. key={key} store={url} status={answer.status} epoch={answer.epoch} why={answer.why!r}")
