"""The roll: nodes act only while all of them answered, whatever is lost on the way."""

from __future__ import annotations

import random

import pytest

from ckpt.keeper.nodes.liveness import KEPT, LivenessRound, answer_call, answers_received, next_call

TTL_S, MARGIN_S = 2.0, 0.2


def answer_received(roll: LivenessRound, attempt: int, number: int, node: str) -> LivenessRound:
    return answers_received(roll, attempt, {node: number})


def until(roll: LivenessRound) -> float:
    return roll.until_s(ttl_s=TTL_S, margin_s=MARGIN_S)


def test_all_answer_and_act_a_lease_longer_from_an_answer_of_their_own_on() -> None:
    root = next_call(LivenessRound(), 3, ["a", "b"], now_s=10.0)
    a = answer_call(LivenessRound(), 3, root.number, root.answered, now_s=500.0)
    b = answer_call(LivenessRound(), 3, root.number, root.answered, now_s=7.5)
    assert [until(one) for one in (root, a, b)] == [0, 0, 0], "nobody knows of the others yet"
    root = answer_received(answer_received(root, 3, 1, "a"), 3, 1, "b")
    assert until(root) == 10.0 + TTL_S - MARGIN_S
    for call_s, answer_s in ((10.4, 500.4), (10.8, 500.8)):
        root = next_call(root, 3, ["a", "b"], now_s=call_s)
        a = answer_call(a, 3, root.number, root.answered, now_s=answer_s)
        root = answer_received(answer_received(root, 3, root.number, "a"), 3, root.number, "b")
    assert until(root) == 10.8 + TTL_S - MARGIN_S
    a = answer_call(a, 3, 4, 3, now_s=501.2)
    assert until(a) == 500.4 + TTL_S - MARGIN_S, (
        "all answered the third call, made after its answer to the second"
    )


def test_one_that_does_not_answer_ends_it_for_all() -> None:
    root = next_call(LivenessRound(), 3, ["a", "b"], now_s=1.0)
    root = answer_received(answer_received(root, 3, 1, "a"), 3, 1, "b")
    for number in range(2, 3 * KEPT):
        root = next_call(root, 3, ["a", "b"], now_s=float(number))
        root = answer_received(root, 3, number, "a")
        assert until(root) == 1.0 + TTL_S - MARGIN_S
    assert len(root.since_s) <= KEPT + 1


@pytest.mark.parametrize("wrong", [(2, 2, "a"), (3, 3, "a"), (3, 2, "x"), (3, 2, "b")])
def test_early_foreign_and_doubled_answers_count_nothing(wrong: tuple[int, int, str]) -> None:
    root = next_call(next_call(LivenessRound(), 3, ["a", "b"], now_s=1.0), 3, ["a", "b"], now_s=2.0)
    root = answer_received(root, 3, 2, "b")
    assert answer_received(root, *wrong) == root


def test_answers_that_come_late_prove_what_they_prove() -> None:
    root = next_call(next_call(LivenessRound(), 3, ["a", "b"], now_s=1.0), 3, ["a", "b"], now_s=2.0)
    root = answer_received(answer_received(root, 3, 2, "b"), 3, 1, "a")
    assert until(root) == 1.0 + TTL_S - MARGIN_S, (
        "both were there after the first call, one of them after the second"
    )
    assert until(answer_received(root, 3, 2, "a")) == 2.0 + TTL_S - MARGIN_S
    assert answer_received(answer_received(root, 3, 2, "a"), 3, 1, "b").answered == 2


def test_calls_that_come_late_or_twice_change_nothing_and_another_epoch_begins_anew() -> None:
    node = answer_call(LivenessRound(), 3, 5, 4, now_s=1.0)
    assert (
        answer_call(node, 3, 5, 4, now_s=9.0) == node
        and answer_call(node, 3, 2, 1, now_s=9.0) == node
    )
    assert until(node) == 0.0, "it never answered the fourth"
    assert until(answer_call(answer_call(node, 3, 6, 5, now_s=1.5), 4, 1, 0, now_s=2.0)) == 0.0


@pytest.mark.parametrize("seed", range(200))
def test_nobody_acts_a_lease_after_one_of_them_has_gone(seed: int) -> None:
    """Clocks of nodes are apart, words are lost and late; one node goes over to another epoch at
    some time."""
    dice = random.Random(seed)
    names = ["root", "a", "b", "c"]
    skew = {name: dice.uniform(0, 100) for name in names}
    rolls = dict.fromkeys(names, LivenessRound())
    gone, gone_at = dice.choice(names[1:]), dice.uniform(2, 20)
    on_way: list[tuple[float, str, tuple[int, int, int]]] = []
    acted = 0
    for tick in range(300):
        now = tick * 0.1
        if tick % 4 == 0:
            rolls["root"] = next_call(rolls["root"], 3, names[1:], now + skew["root"])
            for name in names[1:]:
                if dice.random() < 0.95:
                    on_way.append(
                        (
                            now + dice.expovariate(3),
                            name,
                            (0, rolls["root"].number, rolls["root"].answered),
                        )
                    )
        for word in sorted(one for one in on_way if one[0] <= now):
            on_way.remove(word)
            _, name, (kind, number, answered) = word
            if kind == 1:
                rolls["root"] = answer_received(rolls["root"], 3, number, name)
            elif name != gone or now < gone_at:
                rolls[name] = answer_call(rolls[name], 3, number, answered, now + skew[name])
                if dice.random() < 0.95:
                    on_way.append((now + dice.expovariate(10), name, (1, number, 0)))
        for name in names:
            if until(rolls[name]) > now + skew[name]:
                acted += 1
                assert now < gone_at + TTL_S - MARGIN_S, (
                    f"{name} acts though {gone} went to another epoch long ago"
                )
    assert acted, "there is something to see"
