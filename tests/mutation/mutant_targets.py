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
    Target("ckpt/commit/judge.py", _LOG),
    Target("ckpt/commit/fold.py", _LOG),
    Target("ckpt/commit/working.py", _LOG),
    Target("ckpt/commit/state.py", _LOG),
    Target("ckpt/commit/select.py", _LOG),
    Target("ckpt/commit/claim.py", _LOG),
    Target("ckpt/commit/folds.py", _LOG),
    Target("ckpt/commit/quorum.py", _STORES),
    Target("ckpt/commit/gather.py", _STORES),
    Target("ckpt/commit/claims.py", _STORES),
    Target("ckpt/restore/plan.py", ("tests/restore/test_plan.py", "tests/restore/test_planned_reads.py")),
    Target("ckpt/persist/shares.py", ("tests/persist/test_shares.py", "tests/persist/test_shares_told.py")),
    Target("ckpt/replicate/quorum.py", ("tests/replicate/test_rules.py", "tests/replicate/test_quorums.py")),
)
