"""What users choose about failures, and how an exception looks to whoever judges it."""

from __future__ import annotations

import pytest

from ckpt.elastic.decorator import RestartPolicy
from ckpt.elastic.failure import Preempted, describe_failure
from ckpt.errors import FencedError, UsageError


def test_policy_becomes_seconds() -> None:
    policy = RestartPolicy(
        hang="90s", grace="1m", linger="500ms", same_error_max=1, stuck_max=3
    ).message()
    assert (policy.hang_s, policy.grace_s, policy.linger_s) == (90.0, 60.0, 0.5)
    assert (policy.same_error_max, policy.stuck_max) == (1, 3)
    assert RestartPolicy(hang="never").message().hang_s == 0.0


@pytest.mark.parametrize(
    "wrong",
    [{"hang": "soon"}, {"grace": "0s"}, {"linger": ""}, {"same_error_max": 0}, {"stuck_max": True}],
)
def test_policy_that_cannot_work_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        RestartPolicy(**wrong)  # type: ignore[arg-type]


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:  # noqa: BLE001
        return caught


def test_equal_errors_at_equal_places_have_equal_fingerprints_whatever_they_say() -> None:
    first, second = (describe_failure(raised(ValueError(f"at {text}"))) for text in ("0x1", "0x2"))
    assert first["fingerprint"] == second["fingerprint"]
    assert describe_failure(raised(KeyError("at")))["fingerprint"] != first["fingerprint"]
    try:
        raise ValueError("elsewhere")
    except ValueError as error:
        assert describe_failure(error)["fingerprint"] != first["fingerprint"]


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (ValueError("x"), False),
        (RuntimeError("NCCL"), False),
        (SystemExit(3), False),
        (SystemExit(0), True),
        (SystemExit(), True),
        (KeyboardInterrupt(), True),
        (UsageError("x"), True),
        (FencedError("x"), True),
        (Preempted(4), True),
    ],
)
def test_what_a_restart_would_meet_again_is_final(error: BaseException, final: bool) -> None:
    assert describe_failure(raised(error))["final"] is final


def test_a_long_text_is_cut() -> None:
    assert len(describe_failure(raised(ValueError("x" * 10_000)))["text"]) == 500
