"""Errors of object stores' client libraries, translated to those of a store's caller."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator
from urllib.parse import urlsplit, urlunsplit

from ckpt.backends.file.syscalls import error_from_os
from ckpt.errors import (
    CkptError,
    KeyExistsError,
    NotFoundError,
    StoreDeniedError,
    StoreFullError,
    UnavailableError,
    UsageError,
)

_USER_IS_ADDRESS = frozenset({"abfs", "abfss", "az", "adl", "sftp", "ssh", "hdfs"})
"""Schemes in which the part before ``@`` is a container or a login name, and so part of the
address.
"""

_DENIED_NAMES = frozenset(
    {
        "NoCredentialsError",
        "PartialCredentialsError",
        "CredentialRetrievalError",
        "ClientAuthenticationError",
    }
    | {
        "DefaultCredentialsError",
        "RefreshError",
        "ProfileNotFound",
        "TokenRetrievalError",
        "UnauthorizedSSOTokenError",
    }
)
_USAGE_NAMES = frozenset(
    {"ParamValidationError", "InvalidRegionError", "UnknownEndpointError", "NoRegionError"}
    | {"InvalidPathError", "UnknownConfigurationKeyError"}
)
_FULL_CODES = frozenset(
    {
        "QuotaExceeded",
        "XMinioStorageFull",
        "StorageFull",
        "InsufficientStorage",
        "ServiceQuotaExceededException",
    }
)
_CAUSES_MAX = 8
_OBSTORE_STATUS = re.compile(r"returned non-2xx status code: (\d{3})")
_OBSTORE_REDIRECT = "redirect without LOCATION"
_OBSTORE_CODE = re.compile(r"<Code>(\w+)</Code>")


def public_url(url: str) -> str:
    """``url`` without credentials, query and fragment, for messages."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    keep = at and ":" not in user and parts.scheme in _USER_IS_ADDRESS
    text = urlunsplit((parts.scheme, parts.netloc if keep else host, parts.path, "", ""))
    # urlunsplit drops the slashes of an unknown scheme if there is no host.
    return (
        text if "://" in text or not parts.scheme else f"{parts.scheme}://{parts.path.lstrip('/')}"
    )


def error_from_client(error: Exception, *, doing: str, where: str) -> CkptError:
    """The error to raise for an error of a client library.

    ``where`` is a URL without credentials.
    """
    status, code = _reply(error)
    facts = (
        f"operation={doing} url={where} error={code or type(error).__name__} status={status or '-'}"
    )
    names = {kind.__name__ for link in _links(error) for kind in type(link).__mro__}
    # Most specific first: a full or denying store must not count as unavailable, which is retried.
    if code in _FULL_CODES or status == 507:
        return StoreFullError(
            f"the store is full. {facts}; free space or raise the quota, then repeat"
        )
    if isinstance(error, PermissionError) or status in (401, 403) or names & _DENIED_NAMES:
        return StoreDeniedError(
            f"the store refuses. {facts}; check credentials and permissions, then repeat"
        )
    if (
        isinstance(error, FileExistsError)
        or status == 412
        or (status is None and "AlreadyExistsError" in names)
    ):
        return KeyExistsError(f"the key is taken. {facts}; read it to learn whose bytes it holds")
    if (
        isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)
        or status == 404
    ):
        return NotFoundError(
            f"no such object or bucket. {facts}; check the URL, list the store's keys"
        )
    if _OBSTORE_REDIRECT in str(error):
        return UsageError(
            f"the bucket is in another region. {facts}; name it: "
            f"client_kwargs={{'region_name': ...}}"
        )
    if names & _USAGE_NAMES:
        return UsageError(
            f"the client refuses the request. {facts}; check the URL and the storage options"
        )
    if isinstance(error, OSError) and not status and error.errno not in (None, errno.EINVAL):
        return error_from_os(error, doing=doing, where=where)
    return UnavailableError(
        f"the store failed or did not answer. {facts}; check network and endpoint, then repeat"
    )


@contextlib.contextmanager
def translate_client_errors(doing: str, where: str) -> Iterator[None]:
    """Raise every error of a client library in the block as a CkptError with the cause chained."""
    try:
        yield
    except CkptError:
        raise
    except Exception as error:
        # A broad except: the client libraries share no error class.
        raise error_from_client(error, doing=doing, where=where) from error


def _links(error: BaseException) -> list[BaseException]:
    """The error and its causes, nearest first."""
    links: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and len(links) < _CAUSES_MAX:
        links.append(link)
        link = link.__cause__ or link.__context__
    return links


def _reply(error: BaseException) -> tuple[int | None, str | None]:
    """HTTP status and error code of the reply behind an error, if it shows them."""
    for link in _links(error):
        # obstore has both only in the error's text.
        if (match := _OBSTORE_STATUS.search(str(link))) is not None:
            named_code = _OBSTORE_CODE.search(str(link))
            return int(match[1]), named_code[1] if named_code else None
        response: object = getattr(link, "response", None)
        if isinstance(response, dict):
            status: object = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            code: object = response.get("Error", {}).get("Code")
            return (status if isinstance(status, int) else None, str(code) if code else None)
        for name in ("status_code", "status", "code"):
            value: object = getattr(link, name, None)
            if isinstance(value, int) and 100 <= value < 600:
                named: object = getattr(link, "error_code", None)
                return value, str(named) if named else None
    return None, None
