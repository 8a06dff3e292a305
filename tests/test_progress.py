"""Progress: plain lines on stderr where there is no terminal, and stdout stays free for results."""

from __future__ import annotations

import pytest

from distill import progress
from distill.progress import Meter, console, say


def test_a_line_comes_at_the_end_and_counts_what_was_done_before(capsys: pytest.CaptureFixture[str]) -> None:
    with Meter("generate", 10, done=4) as meter:
        for _ in range(6):
            meter.advance("5 tokens/s")
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("generate: 10/10, ")
    assert line.endswith(", 0 s left, 5 tokens/s")


def test_lines_come_at_intervals(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Meter("train", 8) as meter:
        for _ in range(4):
            now[0] += progress.LINE_SECONDS / 2
            meter.advance()
    first, second, last = capsys.readouterr().err.splitlines()
    assert first == "train: 2/8, 0.2/s, 30 s left"
    assert second == "train: 4/8, 0.2/s, 20 s left"
    assert last == second


def test_nothing_done_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Meter("eval", 3, done=3):
        pass
    assert capsys.readouterr().err == ""


def test_what_is_said_stays_text(capsys: pytest.CaptureFixture[str]) -> None:
    say("model [bold]name[/bold] [/]")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "model [bold]name[/bold] [/]\n")
    console().print("x")
    assert capsys.readouterr().err == "x\n"
