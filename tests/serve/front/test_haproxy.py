"""HAProxy's slots become what a group's records say, whatever they were, by few commands."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.etcd import require

from ckpt.errors import IntegrityError, UsageError
from ckpt.serve.front.haproxy import (
    BACKEND,
    NOWHERE,
    HaproxySlot,
    SlotState,
    haproxy_suspects,
    parse_slots,
    render_config,
    slot_commands,
)

STATES: list[SlotState] = ["ready", "drain", "maint"]
ADDRESSES = [f"127.0.0.1:{port}" for port in range(2, 9)]


def carried_out(slots: list[HaproxySlot], commands: list[str]) -> list[HaproxySlot]:
    """What HAProxy does at these commands."""
    found = {slot.name: slot for slot in slots}
    for command in commands:
        words = command.split()
        assert words[:2] == ["set", "server"]
        backend, name = words[2].split("/")
        assert backend == BACKEND
        slot = found[name]
        match words[3:]:
            case ["state", state]:
                assert state in STATES
                found[name] = HaproxySlot(name, slot.address, state, slot.up)  # type: ignore[arg-type]
            case ["addr", host, "port", port]:
                assert slot.state == "maint", "no request goes to one under the other's state"
                found[name] = HaproxySlot(name, f"{host}:{port}", slot.state, slot.up)
            case _:
                raise AssertionError(command)
    return list(found.values())


SLOT = st.tuples(st.sampled_from([NOWHERE, *ADDRESSES]), st.sampled_from(STATES), st.booleans())
REPLICAS = st.dictionaries(
    st.sampled_from("abcdefg"), st.sampled_from(ADDRESSES), max_size=6
).filter(lambda replicas: len({*replicas.values()}) == len(replicas))


@given(st.lists(SLOT, min_size=1, max_size=6), REPLICAS, st.sets(st.sampled_from("abcdefg")))
def test_slots_become_what_the_records_say(
    drawn: list[tuple[str, SlotState, bool]], replicas: dict[str, str], serving: set[str]
) -> None:
    slots = [HaproxySlot(f"r{number}", *each) for number, each in enumerate(drawn)]
    commands, left = slot_commands(slots, replicas, serving)
    after = carried_out(slots, commands)
    ready = sorted(slot.address for slot in after if slot.state == "ready")
    drain = sorted(slot.address for slot in after if slot.state == "drain")
    placed = {name: address for name, address in replicas.items() if name not in left}
    assert ready == sorted(address for name, address in placed.items() if name in serving)
    assert drain == sorted(address for name, address in placed.items() if name not in serving)
    assert len(left) == max(0, len(replicas) - len(slots)), "as many have one as there are"
    assert slot_commands(after, replicas, serving) == ([], left), "once is enough"


def test_who_does_not_answer_is_suspected_unless_nobody_does() -> None:
    replicas = {"a": ADDRESSES[0], "b": ADDRESSES[1], "c": ADDRESSES[2]}
    up = [
        HaproxySlot("r1", ADDRESSES[0], "ready", False),
        HaproxySlot("r2", ADDRESSES[1], "drain", True),
        HaproxySlot("r3", ADDRESSES[2], "maint", False),
    ]
    assert haproxy_suspects(up, replicas) == {"a"}
    down = [HaproxySlot(slot.name, slot.address, slot.state, False) for slot in up]
    assert haproxy_suspects(down, replicas) == frozenset()
    assert haproxy_suspects([], {}) == frozenset()


STATE = """1
# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight srv_port
3 replicas 1 r1 127.0.0.1 2 4 1 34593
3 replicas 2 r2 127.0.0.1 2 12 1 43415
3 replicas 3 r3 127.0.0.1 0 5 1 1
4 other 1 r3 127.0.0.1 0 5 1 1
"""


def test_answer_of_haproxy_is_read() -> None:
    assert parse_slots(STATE) == [
        HaproxySlot("r1", "127.0.0.1:34593", "ready", True),
        HaproxySlot("r2", "127.0.0.1:43415", "drain", True),
        HaproxySlot("r3", "127.0.0.1:1", "maint", False),
    ]


@pytest.mark.parametrize("text", ["", "1\n", "Unknown command", STATE.replace(" 34593", " x")])
def test_answer_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(IntegrityError, match="HAProxy"):
        parse_slots(text)


def config(**given: object) -> str:
    defaults = {
        "bind": "127.0.0.1:8080",
        "socket": "/tmp/ha.sock",
        "policy": "two-choices",
        "queue": 100,
        "deadline_s": 1.5,
        "repeatable": ("/predict", "/embed"),
    }
    return render_config(**{**defaults, **given})  # type: ignore[arg-type]


@pytest.mark.parametrize("repeatable", [(), ("/predict", "/embed")])
@pytest.mark.parametrize("policy", ["two-choices", "least-loaded", "round-robin"])
def test_haproxy_takes_the_configuration(
    policy: str, repeatable: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "haproxy.cfg"
    path.write_text(config(policy=policy, repeatable=repeatable))
    done = subprocess.run(
        [require("haproxy"), "-c", "-V", "-f", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr


def test_what_haproxy_cannot_do_is_refused() -> None:
    with pytest.raises(UsageError, match="HAProxy has no such policy"):
        config(policy="expected-wait")
    for path in ("/a b", "/a\nbind *:1"):
        with pytest.raises(UsageError, match="blank or a control"):
            config(repeatable=(path,))
