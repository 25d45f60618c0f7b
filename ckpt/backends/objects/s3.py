"""Which client library speaks to S3: obstore where it is installed and does what was asked, else
s3fs."""

from __future__ import annotations

import importlib.util
import logging
import os

from ckpt.backends.base import Backend
from ckpt.backends.objects.errors import public_url
from ckpt.backends.objects.fsspec_store import FsspecBackend, StorageOptions
from ckpt.backends.objects.obstore_options import (
    LookedUpCredentials,
    ObstoreDiffers,
    ObstoreSettings,
    translate_options,
)
from ckpt.backends.objects.obstore_store import (
    ForkAwareBackend,
    ObstoreBackend,
    has_botocore,
    profile_settings,
)
from ckpt.errors import UsageError

CLIENT_VARIABLE = "CKPT_OBJECT_CLIENT"
"""Environment variable: ``obstore`` or ``s3fs`` instead of the choice made here."""


def open_s3(url: str, storage_options: StorageOptions | None) -> Backend:
    """The store at an ``s3://`` URL. Says on the logger ``ckpt``, at debug level, why obstore is
    not used.

    Raises UsageError where ``CKPT_OBJECT_CLIENT`` names a client that cannot do it.
    """
    asked = os.environ.get(CLIENT_VARIABLE, "")
    if asked not in ("", "obstore", "s3fs"):
        raise UsageError(
            f"no such client for S3. {CLIENT_VARIABLE}={asked}; set it to obstore or s3fs, or "
            "leave it out"
        )
    if asked == "s3fs":
        return FsspecBackend(url, storage_options)
    meant = _meant(url, storage_options or {})
    if isinstance(meant, ObstoreSettings):
        return ForkAwareBackend(
            ObstoreBackend(url, meant), lambda: FsspecBackend(url, storage_options)
        )
    if asked == "obstore":
        raise UsageError(
            f"obstore cannot do this. url={public_url(url)} why={meant.reason!r}; leave "
            f"{CLIENT_VARIABLE} out, or set it to s3fs"
        )
    logging.getLogger("ckpt").debug("s3fs serves %s: %s", public_url(url), meant.reason)
    return FsspecBackend(url, storage_options)


def _meant(url: str, options: StorageOptions) -> ObstoreSettings | ObstoreDiffers:
    if importlib.util.find_spec("obstore") is None:
        return ObstoreDiffers("obstore is not installed (pip install 'torch-ckpt[fast]')")
    named = options.get("profile")
    profile = profile_settings(named if isinstance(named, str) else None, os.environ)
    if profile is None:
        return ObstoreDiffers("the AWS configuration files cannot be read")
    meant = translate_options(url, options, env=os.environ, profile=profile)
    if (
        isinstance(meant, ObstoreSettings)
        and isinstance(meant.credentials, LookedUpCredentials)
        and not has_botocore()
    ):
        return ObstoreDiffers("credentials must be looked up, and botocore is not installed")
    return meant
