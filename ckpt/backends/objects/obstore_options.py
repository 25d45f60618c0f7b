"""The translation of fsspec's storage options and the AWS environment for obstore. Pure.

Users write options for s3fs. obstore is used only if it will do exactly the same: any option,
variable or profile setting that is unknown here gives ``ObstoreDiffers``, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit


class UnsupportedOptionError(Exception):
    """Ends a translation. The text names what is not supported."""


class OptionReader:
    """Options that are read one by one.

    Options left at the end are not supported. ``what`` names the mapping in messages.
    """

    def __init__(self, options: Mapping[str, object], label: str) -> None:
        self._left = {name: value for name, value in options.items() if value is not None}
        self._label = label

    def ignore(self, names: Iterable[str]) -> None:
        """Skip options that change nothing."""
        for name in names:
            self._left.pop(name, None)

    def text(self, name: str) -> str | None:
        """A text; None if it is absent or empty."""
        value = self._left.pop(name, None)
        if value is not None and not isinstance(value, str):
            raise UnsupportedOptionError(f"{self._label} {name} is not a text")
        return value or None

    def flag(self, name: str, default: bool = False) -> bool:
        """True or False; ``default`` if it is absent."""
        value = self._left.pop(name, default)
        if not isinstance(value, bool):
            raise UnsupportedOptionError(f"{self._label} {name} is neither True nor False")
        return value

    def number(self, name: str, default: float) -> float:
        """A number that is not negative; ``default`` if it is absent."""
        value = self._left.pop(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise UnsupportedOptionError(f"{self._label} {name} is no number")
        return value

    def mapping(self, name: str) -> dict[str, object]:
        """Options nested in an option; empty if it is absent."""
        value = self._left.pop(name, {})
        if not isinstance(value, Mapping):
            raise UnsupportedOptionError(f"{self._label} {name} is no mapping")
        return {str(key): entry for key, entry in value.items()}

    def take(self, name: str) -> object:
        """The value as given, or None."""
        return self._left.pop(name, None)

    def require_empty(self) -> None:
        """Raise UnsupportedOptionError if options are left."""
        if self._left:
            raise UnsupportedOptionError(f"{self._label} {min(self._left)}")


CONNECT_TIMEOUT_S = 5.0
"""As s3fs's own."""

READ_TIMEOUT_S = 60.0
"""Longest wait for an answer. It includes sending the request's body, so 16 MiB may take as long.
"""

RETRIES = 4
"""Repetitions of a request after a transient failure; botocore's default."""

_IGNORED = frozenset(
    {
        "default_block_size",
        "default_fill_cache",
        "default_cache_type",
        "use_listings_cache",
        "listings_expiry_time",
    }
    | {"max_paths", "skip_instance_cache", "max_concurrency", "fixed_upload_size"}
)
"""Options of file objects and caches that stores do not use."""

_IGNORED_CONFIG = frozenset({"max_pool_connections", "tcp_keepalive"})

_ENV_KNOWN = frozenset(
    {
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_SECURITY_TOKEN",
        "AWS_REGION",
    }
    | {
        "AWS_DEFAULT_REGION",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_CA_BUNDLE",
        "AWS_DEFAULT_OUTPUT",
    }
    | {"AWS_PAGER", "AWS_EXECUTION_ENV"}
    # Credential lookup, which botocore does for both clients.
    | {
        "AWS_PROFILE",
        "AWS_DEFAULT_PROFILE",
        "AWS_CONFIG_FILE",
        "AWS_SHARED_CREDENTIALS_FILE",
        "AWS_ROLE_ARN",
    }
    | {
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_ROLE_SESSION_NAME",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    }
    | {
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN",
        "AWS_STS_REGIONAL_ENDPOINTS",
    }
    | {
        "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
        "AWS_EC2_METADATA_DISABLED",
        "AWS_METADATA_SERVICE_TIMEOUT",
    }
    | {"AWS_METADATA_SERVICE_NUM_ATTEMPTS", "AWS_CREDENTIAL_EXPIRATION"}
)

_PROFILE_KNOWN = frozenset(
    {
        "region",
        "output",
        "aws_access_key_id",
        "aws_secret_access_key",
        "aws_session_token",
        "role_arn",
        "source_profile",
    }
    | {
        "credential_source",
        "credential_process",
        "external_id",
        "mfa_serial",
        "role_session_name",
        "duration_seconds",
    }
    | {
        "web_identity_token_file",
        "sso_session",
        "sso_start_url",
        "sso_region",
        "sso_account_id",
        "sso_role_name",
    }
)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


@dataclass(frozen=True, slots=True)
class S3Credentials:
    """Credentials given as options or variables."""

    key: str
    secret: str
    token: str | None


@dataclass(frozen=True, slots=True)
class LookedUpCredentials:
    """Credentials that botocore looks up, for a profile or the default one."""

    profile: str | None


@dataclass(frozen=True, slots=True)
class AnonymousAccess:
    """Requests without signature."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObstoreSettings:
    """The settings passed to obstore. ``config`` and ``client`` use obstore's own names."""

    bucket: str
    folder: str
    credentials: S3Credentials | LookedUpCredentials | AnonymousAccess
    config: Mapping[str, str | bool]
    client: Mapping[str, str | bool]
    retries: int = RETRIES


@dataclass(frozen=True, slots=True)
class ObstoreDiffers:
    """obstore would do something else than asked; ``reason`` names the first difference."""

    reason: str


def translate_options(
    url: str,
    options: Mapping[str, object],
    *,
    env: Mapping[str, str],
    profile: Mapping[str, object],
) -> ObstoreSettings | ObstoreDiffers:
    """Settings that make obstore do at ``url`` what s3fs does with ``options``.

    ``env`` is the environment, ``profile`` holds the AWS configuration files' settings for the
    profile in use.
    """
    try:
        return _translated(url, options, env, profile)
    except UnsupportedOptionError as error:
        return ObstoreDiffers(str(error))


def _translated(
    url: str, options: Mapping[str, object], env: Mapping[str, str], profile: Mapping[str, object]
) -> ObstoreSettings:
    bucket, folder = _bucket_and_folder(url)
    _only({name for name in env if name.startswith("AWS_")}, _ENV_KNOWN, "the environment has")
    _only(profile, _PROFILE_KNOWN, "the AWS profile has")
    reader = OptionReader(options, "option")
    reader.ignore(_IGNORED)
    client = OptionReader(reader.mapping("client_kwargs"), "client_kwargs")
    boto = OptionReader(reader.mapping("config_kwargs"), "config_kwargs")
    boto.ignore(_IGNORED_CONFIG)
    extra = OptionReader(reader.mapping("s3_additional_kwargs"), "s3_additional_kwargs")

    endpoint = _endpoint(reader, client, env)
    secure = endpoint is None or endpoint.startswith("https://")
    credentials = _credentials(reader, client, env)
    region = (
        client.text("region_name")
        or boto.text("region_name")
        or env.get("AWS_DEFAULT_REGION")
        or profile.get("region")
    )
    if region is None and endpoint is None:
        raise UnsupportedOptionError("no region is named, and s3fs finds the bucket's")
    config: dict[str, str | bool] = {
        "region": str(region or "us-east-1"),
        "virtual_hosted_style_request": endpoint is None and "." not in bucket,
        # Several servers answer batch deletions with an error or with an invalid reply.
        "disable_bulk_delete": True,
        "skip_signature": isinstance(credentials, AnonymousAccess),
        "request_payer": reader.flag("requester_pays"),
    }
    if endpoint is not None:
        config["endpoint"] = endpoint
    config.update(_encryption(extra))
    _addressing(boto, endpoint)
    if (
        client.flag("use_ssl", True) and reader.flag("use_ssl", True)
    ) is False and endpoint is None:
        raise UnsupportedOptionError("option use_ssl without an endpoint")
    settings = ObstoreSettings(
        bucket=bucket,
        folder=folder,
        credentials=credentials,
        config=config,
        client={
            **_timeouts(boto),
            **_trust(client, env, secure),
            **_proxy(boto, secure),
            "allow_http": not secure,
        },
        retries=_retries(boto),
    )
    for rest in (reader, client, boto, extra):
        rest.require_empty()
    return settings


def _only(names: Mapping[str, object] | set[str], supported: frozenset[str], where: str) -> None:
    if unknown := set(names) - supported:
        raise UnsupportedOptionError(f"{where} {min(unknown)}")


def _bucket_and_folder(url: str) -> tuple[str, str]:
    if "?" in url or "#" in url:
        raise UnsupportedOptionError("a URL with a query")
    bucket, _, folder = url.partition("://")[2].partition("/")
    folder = folder.rstrip("/")
    if not _BUCKET.fullmatch(bucket):
        raise UnsupportedOptionError("the URL does not begin with a bucket's plain name")
    if folder and any(part in ("", ".", "..") for part in folder.split("/")):
        raise UnsupportedOptionError("the URL's path has an empty part or dots")
    return bucket, folder


def _endpoint(reader: OptionReader, client: OptionReader, env: Mapping[str, str]) -> str | None:
    named = [reader.text("endpoint_url"), client.text("endpoint_url")]
    if all(named) and named[0] != named[1]:
        raise UnsupportedOptionError("two endpoints are named")
    endpoint = (
        named[0]
        or named[1]
        or env.get("AWS_ENDPOINT_URL_S3")
        or env.get("AWS_ENDPOINT_URL")
        or None
    )
    if endpoint is None:
        return None
    parts = urlsplit(endpoint)
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or parts.path not in ("", "/")
        or parts.query
    ):
        raise UnsupportedOptionError("the endpoint is more than scheme, host and port")
    return f"{parts.scheme}://{parts.netloc}"


def _credentials(
    reader: OptionReader, client: OptionReader, env: Mapping[str, str]
) -> S3Credentials | LookedUpCredentials | AnonymousAccess:
    profile = reader.text("profile")
    key = reader.text("key") or reader.text("username")
    secret = reader.text("secret") or reader.text("password")
    token = reader.text("token")
    key = client.text("aws_access_key_id") or key
    secret = client.text("aws_secret_access_key") or secret
    token = client.text("aws_session_token") or token
    if reader.flag("anon"):
        return AnonymousAccess()
    if (key is None) != (secret is None) or (token is not None and key is None):
        raise UnsupportedOptionError("only a part of the credentials is given")
    if key is not None and secret is not None:
        return S3Credentials(key, secret, token)
    key, secret = env.get("AWS_ACCESS_KEY_ID"), env.get("AWS_SECRET_ACCESS_KEY")
    if key and secret and profile is None:
        return S3Credentials(
            key, secret, env.get("AWS_SESSION_TOKEN") or env.get("AWS_SECURITY_TOKEN") or None
        )
    return LookedUpCredentials(profile)


def _encryption(extra: OptionReader) -> dict[str, str | bool]:
    config: dict[str, str | bool] = {}
    kind, key_id = extra.text("ServerSideEncryption"), extra.text("SSEKMSKeyId")
    bucket_key = extra.take("BucketKeyEnabled")
    if kind is None:
        if key_id is not None or bucket_key is not None:
            raise UnsupportedOptionError("a key for encryption without its kind")
        return config
    if kind not in ("AES256", "aws:kms", "aws:kms:dsse") or (kind == "AES256") != (key_id is None):
        raise UnsupportedOptionError(f"s3_additional_kwargs ServerSideEncryption={kind}")
    config["server_side_encryption"] = kind
    if key_id is not None:
        config["sse_kms_key_id"] = key_id
    if isinstance(bucket_key, bool):
        config["sse_bucket_key_enabled"] = bucket_key
    return config


def _addressing(boto: OptionReader, endpoint: str | None) -> None:
    s3 = OptionReader(boto.mapping("s3"), "config_kwargs s3")
    style = s3.text("addressing_style")
    # botocore puts the bucket into the path for custom endpoints, into the host name for Amazon's.
    if style not in (None, "auto") and (style == "path") == (endpoint is None):
        raise UnsupportedOptionError(f"config_kwargs s3 addressing_style={style}")
    s3.require_empty()
    if boto.text("signature_version") not in (None, "s3v4"):
        raise UnsupportedOptionError("config_kwargs signature_version")


def _timeouts(boto: OptionReader) -> dict[str, str | bool]:
    connect_s, read_s = (
        boto.number("connect_timeout", CONNECT_TIMEOUT_S),
        boto.number("read_timeout", READ_TIMEOUT_S),
    )
    # No limit for a whole request, as with s3fs: a large body over a slow link may take long.
    return {
        "connect_timeout": _duration(connect_s),
        "read_timeout": _duration(read_s),
        "timeout": "1day",
    }


def _duration(seconds: float) -> str:
    return f"{max(1, round(seconds * 1000))}ms"


def _trust(client: OptionReader, env: Mapping[str, str], secure: bool) -> dict[str, str | bool]:
    verify = client.take("verify")
    if verify is False:
        return {"allow_invalid_certificates": True} if secure else {}
    # obstore adds certificates to those it trusts; botocore trusts only the named ones.
    if secure and (verify not in (None, True) or (verify is None and env.get("AWS_CA_BUNDLE"))):
        raise UnsupportedOptionError(
            "an own certificate authority, beside which obstore trusts the public ones"
        )
    return {}


def _proxy(boto: OptionReader, secure: bool) -> dict[str, str | bool]:
    proxies = boto.mapping("proxies")
    chosen = proxies.get("https" if secure else "http")
    if chosen is None:
        if proxies:
            raise UnsupportedOptionError("config_kwargs proxies for another scheme")
        return {}
    if not isinstance(chosen, str):
        raise UnsupportedOptionError("config_kwargs proxies is no text")
    return {"proxy_url": chosen}


def _retries(boto: OptionReader) -> int:
    retries = OptionReader(boto.mapping("retries"), "config_kwargs retries")
    retries.take("mode")
    total = retries.take("total_max_attempts")
    if isinstance(total, int) and total > 0:
        retries.take("max_attempts")
        most = total - 1
    else:
        most = int(retries.number("max_attempts", RETRIES))
    retries.require_empty()
    return most
