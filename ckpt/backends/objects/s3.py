"""Which client library speaks to S3: obstore where it is installed and does what was asked, else s3fs."""

from __future__ import annotations

import importlib.util
import logging
import os

from ckpt.backends.base import Backend
from ckpt.backends.objects.errors import public_url
from ckpt.backends.objects.fsspec_store import ObjectsBackend, StorageOptions
from ckpt.backends.objects.obstore_options import Differs, Found, Settings, translate
from ckpt.backends.objects.obstore_store import HereOrForked, ObstoreBackend, can_look_up, profile_settings
from ckpt.errors import UsageError

CHOICE = "CKPT_OBJECT_CLIENT"
"""Environment variable: ``obstore`` or ``s3fs`` instead of the choice made here."""


def open_s3(url: str, storage_options: StorageOptions | None) -> Backend:
    """The store at an ``s3://`` URL. Says on the logger ``ckpt``, at debug level, why obstore is not used.

    Raises UsageError where ``CKPT_OBJECT_CLIENT`` names a client that cannot do it.
    """
    asked = os.environ.get(CHOICE, "")
    if asked not in ("", "obstore", "s3fs"):
        raise UsageError(f"no such client for S3. {CHOICE}={asked}; set it to obstore or s3fs, or leave it out")
    if asked == "s3fs":
        return ObjectsBackend(url, storage_options)
    meant = _meant(url, storage_options or {})
    if isinstance(meant, Settings):
        return HereOrForked(ObstoreBackend(url, meant), lambda: ObjectsBackend(url, storage_options))
    if asked == "obstore":
        raise UsageError(
            f"obstore cannot do this. url={public_url(url)} why={meant.why!r}; leave {CHOICE} out, or set it to s3fs"
        )
    logging.getLogger("ckpt").debug("s3fs serves %s: %s", public_url(url), meant.why)
    return ObjectsBackend(url, storage_options)


def _meant(url: str, options: StorageOptions) -> Settings | Differs:
    if importlib.util.find_spec("obstore") is None:
        return Differs("obstore is not installed (pip install 'torch-ckpt[fast]')")
    named = options.get("profile")
    profile = profile_settings(named if isinstance(named, str) else None, os.environ)
    if profile is None:
        return Differs("the AWS configuration files cannot be read")
    meant = translate(url, options, env=os.environ, profile=profile)
    if isinstance(meant, Settings) and isinstance(meant.credentials, Found) and not can_look_up():
        return Differs("credentials must be looked up, and botocore is not installed")
    return meant
