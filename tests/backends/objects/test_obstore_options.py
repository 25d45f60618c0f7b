"""What users' options mean for obstore, and which of them are left to s3fs."""

from __future__ import annotations

import pytest

from ckpt.backends.objects.obstore_options import (
    AnonymousAccess,
    LookedUpCredentials,
    ObstoreDiffers,
    ObstoreSettings,
    S3Credentials,
    translate_options,
)

PLACE = {"endpoint_url": "http://host:9000", "key": "k", "secret": "s"}
URL = "s3://bucket/some/run"


def meant(
    options: dict[str, object], url: str = URL, env: dict[str, str] | None = None, **profile: str
) -> ObstoreSettings:
    settings = translate_options(url, options, env=env or {}, profile=profile)
    assert isinstance(settings, ObstoreSettings), settings
    return settings


def test_endpoint_and_keys() -> None:
    settings = meant(PLACE)
    assert (settings.bucket, settings.folder) == ("bucket", "some/run")
    assert settings.credentials == S3Credentials("k", "s", None)
    assert settings.config["endpoint"] == "http://host:9000"
    assert settings.config["region"] == "us-east-1"
    assert settings.config["disable_bulk_delete"] is True
    assert settings.client["allow_http"] is True


def test_secure_endpoint_is_not_reached_without_encryption() -> None:
    assert meant({**PLACE, "endpoint_url": "https://host/"}).client["allow_http"] is False


def test_amazon_needs_no_endpoint_but_a_region() -> None:
    settings = meant({"key": "k", "secret": "s", "client_kwargs": {"region_name": "eu-west-1"}})
    assert "endpoint" not in settings.config
    assert settings.config["virtual_hosted_style_request"] is True
    dotted = meant(
        {"key": "k", "secret": "s"}, "s3://my.bucket", {"AWS_DEFAULT_REGION": "eu-west-1"}
    )
    assert dotted.config["virtual_hosted_style_request"] is False


@pytest.mark.parametrize(
    ("options", "env", "expected"),
    [
        ({"key": "k", "secret": "s", "token": "t"}, {}, S3Credentials("k", "s", "t")),
        ({"username": "k", "password": "s"}, {}, S3Credentials("k", "s", None)),
        (
            {"client_kwargs": {"aws_access_key_id": "k", "aws_secret_access_key": "s"}},
            {},
            S3Credentials("k", "s", None),
        ),
        (
            {},
            {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"},
            S3Credentials("k", "s", None),
        ),
        (
            {},
            {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_SESSION_TOKEN": "t"},
            S3Credentials("k", "s", "t"),
        ),
        (
            {"key": "x", "secret": "y"},
            {"AWS_ACCESS_KEY_ID": "k", "AWS_SESSION_TOKEN": "t"},
            S3Credentials("x", "y", None),
        ),
        ({}, {}, LookedUpCredentials(None)),
        (
            {"profile": "p"},
            {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"},
            LookedUpCredentials("p"),
        ),
        (
            {"anon": True},
            {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"},
            AnonymousAccess(),
        ),
        ({"key": None, "secret": None, "anon": True}, {}, AnonymousAccess()),
    ],
)
def test_credentials(options: dict[str, object], env: dict[str, str], expected: object) -> None:
    settings = meant({"endpoint_url": "http://h", **options}, env=env)
    assert settings.credentials == expected
    assert settings.config["skip_signature"] is isinstance(expected, AnonymousAccess)


def test_environment_and_profile_name_region_and_endpoint() -> None:
    env = {
        "AWS_ENDPOINT_URL": "http://a",
        "AWS_ENDPOINT_URL_S3": "http://b",
        "AWS_DEFAULT_REGION": "r1",
    }
    settings = meant({}, env=env, region="r2")
    assert (settings.config["endpoint"], settings.config["region"]) == ("http://b", "r1")
    assert meant(PLACE, env=env).config["endpoint"] == "http://host:9000"
    assert meant(PLACE, region="r2").config["region"] == "r2"


def test_encryption_on_the_server() -> None:
    config = meant({**PLACE, "s3_additional_kwargs": {"ServerSideEncryption": "AES256"}}).config
    assert config["server_side_encryption"] == "AES256"
    extra = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "arn:x", "BucketKeyEnabled": True}
    config = meant({**PLACE, "s3_additional_kwargs": extra}).config
    assert config["sse_kms_key_id"] == "arn:x"
    assert config["sse_bucket_key_enabled"] is True


def test_patience_and_proxies() -> None:
    boto = {
        "connect_timeout": 1.5,
        "read_timeout": 7,
        "retries": {"max_attempts": 2, "mode": "standard"},
        "proxies": {"http": "http://proxy:1"},
        "s3": {"addressing_style": "path"},
        "max_pool_connections": 50,
    }
    settings = meant({**PLACE, "config_kwargs": boto})
    assert settings.retries == 2
    assert settings.client["connect_timeout"] == "1500ms"
    assert settings.client["read_timeout"] == "7000ms"
    assert settings.client["proxy_url"] == "http://proxy:1"
    assert meant({**PLACE, "config_kwargs": {"retries": {"total_max_attempts": 1}}}).retries == 0


def test_options_about_caches_and_verify_change_nothing() -> None:
    settings = meant(
        {
            **PLACE,
            "default_block_size": 1,
            "use_listings_cache": True,
            "client_kwargs": {"verify": True},
        }
    )
    assert settings == meant(PLACE)
    assert meant({**PLACE, "endpoint_url": "https://h", "client_kwargs": {"verify": False}}).client[
        "allow_invalid_certificates"
    ]


@pytest.mark.parametrize(
    ("options", "url", "env", "profile", "why"),
    [
        ({**PLACE, "something": 1}, URL, {}, {}, "option something"),
        ({**PLACE, "session": object()}, URL, {}, {}, "option session"),
        ({**PLACE, "version_aware": True}, URL, {}, {}, "option version_aware"),
        ({"key": "k"}, URL, {}, {}, "a part of the credentials"),
        ({"anon": "yes"}, URL, {}, {}, "neither True nor False"),
        ({"endpoint_url": "http://h/path"}, URL, {}, {}, "the endpoint"),
        (
            {"endpoint_url": "http://h", "client_kwargs": {"endpoint_url": "http://i"}},
            URL,
            {},
            {},
            "two endpoints",
        ),
        (
            {"client_kwargs": {"api_version": "x"}},
            URL,
            {"AWS_DEFAULT_REGION": "r"},
            {},
            "client_kwargs api_version",
        ),
        (
            {"config_kwargs": {"signature_version": "s3"}},
            URL,
            {"AWS_DEFAULT_REGION": "r"},
            {},
            "signature_version",
        ),
        (
            {"config_kwargs": {"s3": {"use_accelerate_endpoint": True}}},
            URL,
            {"AWS_DEFAULT_REGION": "r"},
            {},
            "use_acc",
        ),
        (
            {**PLACE, "config_kwargs": {"s3": {"addressing_style": "virtual"}}},
            URL,
            {},
            {},
            "addressing_style=virtual",
        ),
        ({**PLACE, "s3_additional_kwargs": {"SSECustomerKey": "x"}}, URL, {}, {}, "SSECustomerKey"),
        ({**PLACE, "s3_additional_kwargs": {"StorageClass": "IA"}}, URL, {}, {}, "StorageClass"),
        (
            {**PLACE, "s3_additional_kwargs": {"ServerSideEncryption": "aws:kms"}},
            URL,
            {},
            {},
            "aws:kms",
        ),
        (
            {"endpoint_url": "https://h", "client_kwargs": {"verify": "/ca.pem"}},
            URL,
            {},
            {},
            "certificate authority",
        ),
        (
            {"endpoint_url": "https://h"},
            URL,
            {"AWS_CA_BUNDLE": "/ca.pem"},
            {},
            "certificate authority",
        ),
        ({}, URL, {}, {}, "no region"),
        (PLACE, URL, {"AWS_SKIP_SIGNATURE": "true"}, {}, "AWS_SKIP_SIGNATURE"),
        (PLACE, URL, {"AWS_MAX_ATTEMPTS": "9"}, {}, "AWS_MAX_ATTEMPTS"),
        (PLACE, URL, {}, {"s3": "addressing_style = virtual"}, "the AWS profile has s3"),
        (PLACE, URL, {}, {"endpoint_url": "http://x"}, "the AWS profile has endpoint_url"),
        (PLACE, "s3://bucket/a//b", {}, {}, "an empty part"),
        (PLACE, "s3://bucket/a?versionId=1", {}, {}, "query"),
        (PLACE, "s3://arn:aws:s3:eu:1:accesspoint/x/y", {}, {}, "plain name"),
        (PLACE, "s3://k:s@bucket/x", {}, {}, "plain name"),
    ],
)
def test_what_obstore_would_do_otherwise_is_left_to_s3fs(
    options: dict[str, object], url: str, env: dict[str, str], profile: dict[str, object], why: str
) -> None:
    answer = translate_options(url, options, env=env, profile=profile)
    assert isinstance(answer, ObstoreDiffers)
    assert why in answer.reason
