"""Nodes of which each has only its lines, and authorities that sign their certificates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from kit.mesh_nodes import Node
from kit.servers.certificates import Authority


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that stands still for seconds is no silent node, where a test says nothing else."""
    monkeypatch.setattr("ckpt.cluster.mesh.connections.SILENCE_S_MAX", 60.0)


@pytest.fixture
def node() -> Iterator[Callable[..., Node]]:
    """Makes nodes, and ends them."""
    with ExitStack() as ending:

        def make(name: str, **more: object) -> Node:
            made = Node(name, **more)  # type: ignore[arg-type]
            ending.callback(made.lines.close)
            return made

        yield make


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The job's own."""
    return Authority(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Somebody else's."""
    return Authority(tmp_path_factory.mktemp("tls") / "theirs")
