"""Compression is used where it makes writing faster, and nowhere else."""

from __future__ import annotations

import pytest

from ckpt.errors import UsageError
from ckpt.save.chunks import (
    NO_COMPRESSION,
    Compression,
    CompressionSample,
    decide_compression,
    may_compress,
)

MIB = 1 << 20
SHRINKS = CompressionSample(raw_bytes=100 * MIB, stored_bytes=80 * MIB, encode_s=0.1)
NOISE = CompressionSample(raw_bytes=100 * MIB, stored_bytes=100 * MIB, encode_s=0.1)


@pytest.mark.parametrize(
    ("compression", "sample", "link", "expected"),
    [
        (NO_COMPRESSION, SHRINKS, 1.0, False),
        (Compression("on"), SHRINKS, None, True),
        (Compression("on"), NOISE, 1.0, False),
        (Compression("auto"), SHRINKS, None, False),
        (Compression("auto"), SHRINKS, 100 * MIB, True),
        (Compression("auto"), SHRINKS, 950 * MIB, False),
        (Compression("auto"), NOISE, 1.0, False),
        (
            Compression("auto"),
            CompressionSample(raw_bytes=100, stored_bytes=95, encode_s=0.0),
            10.0,
            False,
        ),
        (
            Compression("auto"),
            CompressionSample(raw_bytes=100, stored_bytes=10, encode_s=0.0),
            10.0,
            True,
        ),
    ],
)
def test_decision_follows_the_sample(
    compression: Compression, sample: CompressionSample, link: float | None, expected: bool
) -> None:
    decision = decide_compression(compression, sample, link_bytes_per_s=link)
    assert decision.compress is expected
    assert decision.reason


def test_local_disk_is_never_sampled_unless_asked() -> None:
    assert not may_compress(Compression("auto"), local=True)
    assert may_compress(Compression("auto"), local=False)
    assert may_compress(Compression("on"), local=True)
    assert not may_compress(NO_COMPRESSION, local=False)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="mode"):
        Compression("fast")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="level"):
        Compression("on", level=0)
