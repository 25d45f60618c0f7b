"""AWS credentials and profile settings as botocore finds them: files, roles, containers, instances, single sign-on."""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, TypedDict, cast

from ckpt.errors import StoreDeniedError

_ASK_AGAIN = datetime.timedelta(minutes=5)
"""botocore renews credentials ten minutes before they expire, so what it gives is good for as long at least."""


class Credential(TypedDict):
    """What obstore asks a provider for."""

    access_key_id: str
    secret_access_key: str
    token: str | None
    expires_at: datetime.datetime | None


class _Frozen(Protocol):
    access_key: str
    secret_key: str
    token: str | None


class _Credentials(Protocol):
    def get_frozen_credentials(self) -> _Frozen: ...


class _Session(Protocol):
    def get_credentials(self) -> _Credentials | None: ...

    def get_scoped_config(self) -> Mapping[str, object]: ...


def profile_settings(profile: str | None, env: Mapping[str, str]) -> Mapping[str, object] | None:
    """What the AWS configuration files say for the profile in use; empty without files, None where they cannot be read.

    Imports botocore only where there are files or a profile is named.
    """
    named = profile or env.get("AWS_PROFILE") or env.get("AWS_DEFAULT_PROFILE")
    files = (env.get("AWS_CONFIG_FILE", "~/.aws/config"), env.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"))
    if not named and not any(Path(os.path.expanduser(file)).exists() for file in files):  # noqa: PTH111
        return {}
    try:
        return _session(profile).get_scoped_config()
    except Exception:  # noqa: BLE001  no botocore, no such profile, a broken file: s3fs will say which
        return None


def provider(profile: str | None) -> Callable[[], Credential]:
    """What gives obstore the current credentials. Raises ImportError without botocore, StoreDeniedError without any."""
    credentials = _session(profile).get_credentials()
    if credentials is None:
        raise StoreDeniedError(
            "no AWS credentials are found. set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or pass key and secret as "
            "storage options, or anon=True for a public bucket"
        )

    def current() -> Credential:
        frozen = credentials.get_frozen_credentials()
        return Credential(
            access_key_id=frozen.access_key,
            secret_access_key=frozen.secret_key,
            token=frozen.token,
            expires_at=datetime.datetime.now(datetime.timezone.utc) + _ASK_AGAIN,
        )

    return current


def can_look_up() -> bool:
    """Whether botocore is installed."""
    return importlib.util.find_spec("botocore") is not None


def _session(profile: str | None) -> _Session:
    return cast(_Session, importlib.import_module("botocore.session").Session(profile=profile))
