"""What is added to users' options for s3fs, so that it works with servers of one's own. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from ckpt.backends.objects.fsspec_io import S3_PROTOCOLS

_CHECKSUMS = "request_checksum_calculation"
_ENV = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


def tuned(protocol: str, options: Mapping[str, object], env: Mapping[str, str]) -> dict[str, object]:
    """``options``, for S3 over TLS at an endpoint of one's own with bodies of known length and a signed digest.

    By itself botocore since 1.36 sends bodies over TLS in chunks of unknown length with a checksum behind them; servers
    that descend from MinIO, and others, refuse that with 411. What the user says about it stands.
    """
    given = dict(options)
    boto = given.get("config_kwargs") or {}
    if (
        protocol not in S3_PROTOCOLS
        or not _endpoint(options, env).startswith("https://")
        or not isinstance(boto, Mapping)
    ):
        return given
    s3 = boto.get("s3") or {}
    if _CHECKSUMS in boto or f"AWS_{_CHECKSUMS.upper()}" in env or not isinstance(s3, Mapping):
        return given
    given["config_kwargs"] = {_CHECKSUMS: "when_required", **boto, "s3": {"payload_signing_enabled": True, **s3}}
    return given


def _endpoint(options: Mapping[str, object], env: Mapping[str, str]) -> str:
    client = options.get("client_kwargs")
    named = options.get("endpoint_url") or (client.get("endpoint_url") if isinstance(client, Mapping) else None)
    return str(named or next((env[name] for name in _ENV if env.get(name)), ""))
