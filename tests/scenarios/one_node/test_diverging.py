"""Replicas that differ in mid-training: told by name, and marked in the store."""

from __future__ import annotations

import pytest
from kit.jobs import Fleet, ranks

import ckpt
from ckpt.save.persister import SUSPECT_KEY


@pytest.mark.slow
def test_replicas_that_diverge_in_training_are_told_and_their_snapshots_are_marked(
    fleet: Fleet,
) -> None:
    job = fleet.start(ranks("diverging.py", "{folder}"))
    assert job.wait_end() == 0, f"{job.output()}\n{fleet.describe()}"
    found = ckpt.Checkpointer(str(job.folder / "store")).snapshots()
    marked = {info.step: info.metadata.get(SUSPECT_KEY) for info in found}
    assert all(marked[step] is None for step in marked if step <= 3), marked
    texts = [str(text) for step, text in marked.items() if step > 3 and text is not None]
    assert texts and all("model/weight" in text for text in texts), marked
    assert all("(ranks 0 and 1)" in text for text in texts), marked
    assert "replicas have diverged" in job.output()
    fleet.wait_gone()
