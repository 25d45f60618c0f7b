"""The choice of client library for S3: obstore if installed and equivalent, otherwise s3fs."""

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
"""Environment variable that overrides the choice: ``obstore`` or ``s3fs``."""


def open_s3(url: str, storage_options: StorageOptions | None) -> Backend:
    """The store at an ``s3://`` URL.

    Logs at debug level, on the logger ``ckpt``, why obstore is not used. Raises UsageError if
    ``CKPT_OBJECT_CLIENT`` names a client that cannot do what the options ask for.
    """
    client = os.environ.get(CLIENT_VARIABLE, "")
    if client not in ("", "obstore", "s3fs"):
        raise UsageError(
            f"no such client for S3. {CLIENT_VARIABLE}={client}; set it to obstore or s3fs, or "
            "leave it out"
        )
    if client == "s3fs":
        return FsspecBackend(url, storage_options)
    settings = _settings(url, storage_options or {})
    if isinstance(settings, ObstoreSettings):
        return ForkAwareBackend(
            ObstoreBackend(url, settings), lambda: FsspecBackend(url, storage_options)
        )
    if client == "obstore":
        raise UsageError(
            f"obstore cannot do this. url={public_url(url)} why={settings.reason!r}; "
            f"leave {CLIENT_VARIABLE} out, or set it to s3fs"
        )
    logging.getLogger("ckpt").debug("s3fs serves %s: %s", public_url(url), settings.reason)
    return FsspecBackend(url, storage_options)


def _settings(url: str, options: StorageOptions) -> ObstoreSettings | ObstoreDiffers:
    if importlib.util.find_spec("obstore") is None:
        return ObstoreDiffers("obstore is not installed (pip install 'torch-ckpt[fast]')")
    named_profile = options.get("profile")
    profile = profile_settings(
        named_profile if isinstance(named_profile, str) else None, os.environ
    )
    if profile is None:
        return ObstoreDiffers("the AWS configuration files cannot be read")
    settings = translate_options(url, options, env=os.environ, profile=profile)
    if (
        isinstance(settings, ObstoreSettings)
        and isinstance(settings.credentials, LookedUpCredentials)
        and not has_botocore()
    ):
        return ObstoreDiffers("credentials must be looked up, and botocore is not installed")
    return settings
