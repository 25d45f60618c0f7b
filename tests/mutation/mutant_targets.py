"""Which modules are mutated, and which tests ought to notice: those of the module's own room."""

from __future__ import annotations

from mutant_runs import Target

COPIED = ("ckpt", "tests", "docs", "pyproject.toml")
"""What of the tree the tests need."""

_LOG = (
    "tests/log/test_fold.py",
    "tests/log/test_fold_refusals.py",
    "tests/log/test_fold_lineage.py",
    "tests/log/test_stored_fold.py",
    "tests/log/test_catalog.py",
    "tests/log/test_select.py",
    "tests/log/test_state.py",
)
_STORES = (
    "tests/log/test_quorum.py",
    "tests/log/test_quorum_gathered.py",
    "tests/log/test_replicated_claims.py",
)

TARGETS = (
    Target("ckpt/log/fold.py", _LOG),
    Target("ckpt/log/state.py", _LOG),
    Target("ckpt/log/select.py", _LOG),
    Target("ckpt/log/stored_fold.py", _LOG),
    Target("ckpt/log/quorum.py", _STORES),
    Target(
        "ckpt/log/replicated.py",
        _STORES,
        only=(
            "QuorumSequencer",
            "CopyingSequencer",
            "settle_anyway",
            "silent_stores",
            "_digest",
        ),
    ),
    Target(
        "ckpt/restore/plan.py",
        ("tests/restore/test_plan.py", "tests/restore/test_planned_reads.py"),
    ),
    Target(
        "ckpt/save/receipts.py",
        ("tests/save/test_receipts_shares.py", "tests/save/test_persister_shares.py"),
        only=("shares_problem",),
    ),
    Target(
        "ckpt/backends/replicated/policy.py",
        (
            "tests/backends/replicated/test_policy.py",
            "tests/backends/replicated/test_policy_quorums.py",
        ),
        only=("Quorum", "quorum_of", "with_counting", "most_common_error"),
    ),
)
