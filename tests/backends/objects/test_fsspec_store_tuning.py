from __future__ import annotations

import pytest

from ckpt.backends.objects.fsspec_store import with_s3_defaults

TUNED = {"request_checksum_calculation": "when_required", "s3": {"payload_signing_enabled": True}}


@pytest.mark.parametrize(
    ("options", "env"),
    [
        ({"endpoint_url": "https://h"}, {}),
        ({"client_kwargs": {"endpoint_url": "https://h"}}, {}),
        ({}, {"AWS_ENDPOINT_URL": "https://h"}),
        ({}, {"AWS_ENDPOINT_URL_S3": "https://h", "AWS_ENDPOINT_URL": "http://i"}),
    ],
)
def test_own_endpoint_over_tls_gets_bodies_of_known_length(
    options: dict[str, object], env: dict[str, str]
) -> None:
    assert with_s3_defaults("s3", options, env) == {**options, "config_kwargs": TUNED}


@pytest.mark.parametrize(
    ("protocol", "options", "env"),
    [
        ("s3", {}, {}),
        ("s3", {"endpoint_url": "http://h"}, {}),
        ("gs", {"endpoint_url": "https://h"}, {}),
        (
            "s3",
            {
                "endpoint_url": "https://h",
                "config_kwargs": {"request_checksum_calculation": "when_supported"},
            },
            {},
        ),
        (
            "s3",
            {"endpoint_url": "https://h"},
            {"AWS_REQUEST_CHECKSUM_CALCULATION": "when_supported"},
        ),
    ],
)
def test_other_options_stay_as_they_are(
    protocol: str, options: dict[str, object], env: dict[str, str]
) -> None:
    assert with_s3_defaults(protocol, options, env) == options


def test_what_the_user_says_stands_beside_it() -> None:
    given = {
        "endpoint_url": "https://h",
        "config_kwargs": {"read_timeout": 9, "s3": {"addressing_style": "path"}},
    }
    config = with_s3_defaults("s3", given, {})["config_kwargs"]
    assert config == {
        **TUNED,
        "read_timeout": 9,
        "s3": {"payload_signing_enabled": True, "addressing_style": "path"},
    }
