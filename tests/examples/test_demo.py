from __future__ import annotations

from pathlib import Path

from demo import STEPS, Losses, Outcome, differences


def losses(path: Path, lines: list[tuple[int, str]]) -> Losses:
    path.write_text("".join(f"{step} {loss}\n" for step, loss in lines))
    result = Losses(path)
    result.poll()
    return result


def outcome(path: Path, lines: list[tuple[int, str]], *, weights: str = "aa") -> Outcome:
    return Outcome(losses(path, lines), f"weights sha256={weights}\n", 1.0)


RUN = [(step, float(step).hex()) for step in range(STEPS)]


def test_losses_poll_leaves_a_torn_line_for_later(tmp_path: Path) -> None:
    path = tmp_path / "losses.txt"
    path.write_text("0 0x1p0\n1 0x1")
    seen = Losses(path)
    seen.poll()
    assert seen.of_step == {0: ["0x1p0"]}
    with path.open("a") as file:
        file.write("p1\n")
    seen.poll()
    assert seen.of_step == {0: ["0x1p0"], 1: ["0x1p1"]}


def test_losses_of_a_missing_file_are_empty(tmp_path: Path) -> None:
    seen = Losses(tmp_path / "none")
    seen.poll()
    assert seen.last_step == -1


def test_losses_redone_steps_are_counted(tmp_path: Path) -> None:
    assert losses(tmp_path / "a", [(0, "x"), (1, "y"), (0, "x"), (1, "y"), (2, "z")]).redone == 2


def test_runs_equal_but_for_redone_steps_have_no_difference(tmp_path: Path) -> None:
    calm = outcome(tmp_path / "a", RUN)
    killed = outcome(tmp_path / "b", [*RUN[:70], *RUN[60:]])
    assert differences(calm, killed) == []


def test_runs_whose_redone_step_strays_differ(tmp_path: Path) -> None:
    calm = outcome(tmp_path / "a", RUN)
    killed = outcome(tmp_path / "b", [*RUN[:70], (60, "0x1p9"), *RUN[60:]])
    assert len(differences(calm, killed)) == 1


def test_runs_with_a_missing_step_differ(tmp_path: Path) -> None:
    assert differences(outcome(tmp_path / "a", RUN), outcome(tmp_path / "b", RUN[:-1])) == [
        f"step {STEPS - 1} was computed 1 and 0 times"
    ]


def test_runs_with_other_weights_differ(tmp_path: Path) -> None:
    calm, killed = outcome(tmp_path / "a", RUN), outcome(tmp_path / "b", RUN, weights="bb")
    assert len(differences(calm, killed)) == 1
