"""Which modules are mutated, and which tests ought to notice: those of the module's own room."""

from __future__ import annotations

from mutant_runs import Target

COPIED = ("ckpt", "tests", "docs", "pyproject.toml")
"""What of the tree the tests need."""

_LOG = (
    "tests/commit/test_fold.py",
    "tests/commit/test_refusals.py",
    "tests/commit/test_lines.py",
    "tests/commit/test_stored_folds.py",
    "tests/commit/test_catalog.py",
)
_STORES = ("tests/commit/test_votes.py", "tests/commit/test_gathered.py", "tests/commit/test_claims.py")

TARGETS = (
    Target("ckpt/log/fold.py", _LOG),
    Target("ckpt/log/state.py", _LOG),
    Target("ckpt/log/select.py", _LOG),
    Target("ckpt/log/stored_fold.py", _LOG),
    Target("ckpt/log/quorum.py", _STORES),
    Target("ckpt/log/replicated.py", _STORES, only=("StoresSequencer", "FiledSequencer", "silent", "_digest")),
    Target("ckpt/restore/plan.py", ("tests/restore/test_plan.py", "tests/restore/test_planned_reads.py")),
    Target(
        "ckpt/save/receipts.py",
        ("tests/persist/test_shares.py", "tests/persist/test_shares_told.py"),
        only=("shares_problem",),
    ),
    Target(
        "ckpt/backends/replicated/policy.py",
        ("tests/replicate/test_rules.py", "tests/replicate/test_quorums.py"),
        only=("Quorum", "quorum_of", "counting_only", "commonest"),
    ),
)
