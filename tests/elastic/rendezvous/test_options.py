"""What torchrun's options ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt.elastic.rendezvous.options import SETTINGS_HELP, RendezvousSettings, parse_settings
from ckpt.errors import UsageError
from ckpt.ipc.cluster_spec import nodes_from_environment, nodes_to_environment


def settings(
    run_id: str = "job", endpoint: str = "", nodes: tuple[int, int] = (2, 3), **config: object
) -> RendezvousSettings:
    return parse_settings(run_id, endpoint, agents_min=nodes[0], agents_max=nodes[1], config=config)


@pytest.fixture(autouse=True)
def _state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CKPT_STATE_DIR", str(tmp_path))


def test_endpoints_are_etcds() -> None:
    found = settings(endpoint="h1:2379,h2:2380,h3")
    assert found.nodes is not None
    assert found.nodes.where == found.agents_spec.where == "etcd://h1:2379,h2:2380,h3:2379"
    assert (found.nodes.job, found.agents_spec.job) == ("job", "job.agents")


def test_without_an_endpoint_a_file_named_by_the_job(tmp_path: Path) -> None:
    found = settings("a/b")
    assert found.nodes is not None
    assert found.nodes.where == str(tmp_path / "nodes-a%2Fb.sqlite3")
    assert found.agents_spec.where == found.nodes.where + ".agents"
    assert settings("b", endpoint="/there").agents_spec.where == "/there/nodes-b.sqlite3.agents"
    with pytest.raises(UsageError, match="too long"):
        settings("x" * 150)


def test_one_node_alone_needs_no_name_and_meets_nobody() -> None:
    found = settings("none", nodes=(1, 1))
    assert found.nodes is None
    assert found.run_id == "none"
    assert found.agents_spec.where != settings("none", nodes=(1, 1)).agents_spec.where


@pytest.mark.parametrize(("endpoint", "nodes"), [("", (2, 2)), ("h1:2379", (1, 1))])
def test_nodes_that_meet_need_a_name(endpoint: str, nodes: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="--rdzv-id=NAME"):
        settings("none", endpoint, nodes)


def test_unknown_settings_are_refused_and_the_known_ones_named() -> None:
    with pytest.raises(UsageError) as error:
        settings(lastcall=3)
    assert "key=lastcall" in str(error.value)
    assert all(key in str(error.value) for key in SETTINGS_HELP)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"standby": "hot"}, "warm or wait"),
        ({"grow": "maybe"}, "neither yes nor no"),
        ({"ttl": "x"}, "seconds"),
        ({"ttl": "0.1"}, "too short"),
        ({"mirrors": "-1"}, "number from 0"),
        ({"mirror_rate": "x"}, "50MiB"),
        ({"mirror_rate": "5KiB"}, "stalls"),
        ({"join_timeout": "-1"}, "seconds"),
    ],
)
def test_values_that_cannot_work_are_refused(config: dict, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        settings(**config)


def test_etcd_grants_no_less_than_two_seconds() -> None:
    with pytest.raises(UsageError, match="2 seconds"):
        settings(endpoint="h1:2379", ttl="1")


def test_patience() -> None:
    assert settings(timeout=900).join_s == 900.0
    assert settings(timeout=900, join_timeout="5").join_s == 5.0
    usual = settings(secret="s")
    assert usual.nodes is not None and (usual.rules.shrink_wait_s, usual.nodes.shrink_wait_s) == (
        5.0,
        0.0,
    )
    found = settings(
        last_call_timeout="7",
        shrink_timeout="3",
        standby="warm",
        grow="yes",
        secret="s",
        domain="d",
    )
    assert (
        found.rules.last_call_s,
        found.rules.shrink_wait_s,
        found.rules.warm,
        found.rules.grow,
    ) == (
        7.0,
        3.0,
        True,
        True,
    )
    assert found.nodes is not None
    assert (found.nodes.last_call_s, found.nodes.shrink_wait_s, found.nodes.domain) == (
        7.0,
        3.0,
        "d",
    )
    assert Path(found.nodes.secret).is_absolute()


def test_rate_of_mirrors_is_bytes_a_second_and_has_a_default() -> None:
    rates = [
        found.mirror_rate
        for text in ("", "0", "500MiB", "1.5 GB/s")
        if (found := settings(mirror_rate=text).nodes)
    ]
    assert rates == [float(1 << 30), 0.0, 500.0 * 2**20, 1.5 * 2**30]


def test_certificates_reach_keepers_and_trainers() -> None:
    found = settings(tls_cert="c.pem", tls_key="~/c.key", tls_ca="/ca.pem")
    assert found.nodes is not None
    inherited = nodes_from_environment(nodes_to_environment(found.nodes))
    assert inherited == found.nodes
    files = (found.nodes.tls_cert, found.nodes.tls_key, found.nodes.tls_ca)
    assert files == (str(Path("c.pem").absolute()), str(Path("~/c.key").expanduser()), "/ca.pem")
    assert not found.nodes.plaintext
    assert settings(plaintext="1").agents_spec.plaintext
