"""What appears on the screen and in logs while a study runs."""

from __future__ import annotations

import io
import logging
import re
from threading import get_ident

import pytest
from rich.console import Console
from rich.live import Live

from autocompress.amounts import clean
from autocompress.progress import (
    STEP_INTERVAL,
    Display,
    LiveDisplay,
    NullDisplay,
    PlainDisplay,
    make_display,
)
from autocompress.scale import ACCURACY, Scale
from autocompress.screen import Panel
from autocompress.tally import Facts


class HandClock:
    """A clock that the test turns."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def pipe() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=80, _environ={"TERM": "xterm"})


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def play(display: Display, clock: HandClock) -> None:
    """A short study: three of four trials of one stage, ten seconds each."""
    display.stage("exploration", 4, delta=1.0)
    for number, (drop, ratio) in enumerate([(0.62, 4.31), (0.9, 5.02), (2.5, 9.0)]):
        display.trial_started(number)
        display.step("fine-tune", 0.5, 1.0)
        clock.now += 10
        display.trial_finished(number, drop, ratio, drop <= 1.0, "COMPLETE", None)


def test_plain_lines() -> None:
    console, clock = pipe(), HandClock()
    with PlainDisplay(console, clock) as display:
        play(display, clock)
    assert written(console).splitlines() == [
        "[exploration 0/4] start  allowed drop 1.00 points",
        "[exploration 1/4] trial 0  drop 0.62 <= 1.00  params 4.31x  best 4.31x  eta 30s",
        "[exploration 2/4] trial 1  drop 0.90 <= 1.00  params 5.02x  best 5.02x  eta 20s",
        "[exploration 3/4] trial 2  drop 2.50 > 1.00  params 9.00x  best 5.02x  eta 10s",
    ]


def test_plain_keeps_long_and_odd_text_on_one_clean_line() -> None:
    console, clock = pipe(), HandClock()
    display = PlainDisplay(console, clock)
    display.stage("annealing", 2, done=1, delta=0.5, best=(6.0, 0.4))
    reason = "out of memory:\n\x1b[31m[bold]tried[/bold] 3 GiB\x1b[0m\r " + "x" * 100
    display.trial_finished(1, None, None, False, "FAIL", reason)
    lines = written(console).splitlines()
    assert lines[0] == "[annealing 1/2] resume  allowed drop 0.50 points"
    assert lines[1].startswith(
        "[annealing 2/2] trial 1  failed: out of memory: [bold]tried[/bold] 3 GiB x"
    )
    assert lines[1].endswith("best 6.00x")
    assert len(lines) == 2
    assert "\x1b" not in written(console) and "\r" not in written(console)


def test_each_worker_has_a_line_of_its_own() -> None:
    console, clock = terminal(), HandClock()
    display = LiveDisplay(console, clock)
    display.stage("exploration", 9, delta=1.0)
    for number in range(3):
        display.trial_started(number, f"worker {number}")
        display.step("fine-tune", 0.1 * number, 1.0, "loss 0.5", f"worker {number}")
    display.trial_finished(1, 0.5, 4.0, True, "COMPLETE", None)
    display.step("fine-tune annealing/7 at length", 3.0, 10.0, worker="worker 1")
    lines = shown(display)
    rows = [line for line in lines if "of 1" in line]
    assert [row.split()[:2] for row in rows[::2]] == [["trial", "0"], ["trial", "2"]]
    assert "fine-tune annealing/7 at length 3 of 10" in rows[1]
    for worker in (1, 2):
        display.step("", 0, 0, worker=f"worker {worker}")
    assert sum("trial" in line and "fine-tune" in line for line in shown(display)) == 1
    for number in range(10, 30):
        display.trial_started(number, f"worker {number}")
    assert any("and 13 more" in line for line in shown(display))
    display.close()


def shown(display: LiveDisplay) -> list[str]:
    """The lines at the bottom, on 80 columns."""
    console = Console(file=io.StringIO(), width=80)
    console.print(Panel(display._tally))
    return written(console).splitlines()


def test_a_plain_log_names_the_worker() -> None:
    console, clock = pipe(), HandClock()
    display = PlainDisplay(console, clock)
    display.stage("exploration", 4)
    for number in range(2):
        display.trial_started(number, f"worker {number}")
    clock.now += STEP_INTERVAL
    for number in range(2):
        display.step("fine-tune", 0.5, 1.0, worker=f"worker {number}")
    lines = written(console).splitlines()[1:]
    assert lines[0].startswith("[exploration 0/4] worker 0  trial 0  fine-tune 0.5/1")
    assert lines[1].startswith("[exploration 0/4] worker 1  trial 1  fine-tune 0.5/1")


@pytest.mark.parametrize("make", [PlainDisplay, LiveDisplay])
def test_long_fits_count_where_they_are_the_stage(
    make: type[PlainDisplay] | type[LiveDisplay],
) -> None:
    """Else they are no trials of the stage that goes on meanwhile."""
    clock = HandClock()
    display = make(terminal(), clock)
    display.stage("annealing", 4, done=1, delta=1.0)
    display.long_fit_ended()
    assert display._tally.counter() == "annealing 1/4"
    display.stage("finals", 3, delta=1.0)
    for done, left in ((1, 20.0), (2, 10.0)):
        display.step("fine-tune annealing/7 at length", 3.0, 10.0)
        clock.now += 10
        display.long_fit_ended()
        assert display._tally.counter() == f"finals {done}/3"
        assert display._tally.eta() == pytest.approx(left)
        assert not display._tally.rows
    display.close()


def test_a_phase_of_unknown_length_has_no_figures() -> None:
    console, clock = pipe(), HandClock()
    display = PlainDisplay(console, clock)
    display.stage("exploration", 4)
    clock.now += STEP_INTERVAL
    display.step("evaluate", 0.0, 0.0)
    assert written(console).splitlines()[-1] == "[exploration 0/4] evaluate"


def test_the_log_has_more_than_the_screen(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="autocompress")
    facts = Facts(91.5, {"params": 2.0, "macs": 1.5}, 61.0, "1 layer: 1 svd", "host/7")
    for display in (PlainDisplay(pipe()), LiveDisplay(terminal()), NullDisplay()):
        caplog.clear()
        display.trial_finished(3, 0.5, 2.0, True, "COMPLETE", None, facts)
        for word in ("trial 3", "MACs 1.50x", "91.50 %", "1m01s", "1 layer: 1 svd", "by host/7"):
            assert word in caplog.text, type(display)


def test_plain_steps_are_throttled() -> None:
    console, clock = pipe(), HandClock()
    display = PlainDisplay(console, clock)
    display.stage("baseline", 1)
    for second in range(1, 65):
        clock.now = 100 + second
        display.step("train", second / 8, 16.0, note="loss 0.31")
    lines = written(console).splitlines()[1:]
    assert len(lines) == 64 // STEP_INTERVAL
    assert lines[0].startswith("[baseline] train 3.75/16  loss 0.31  eta 1m3")


def test_a_live_step_draws_nothing_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread draws a few times a second, however many steps a training makes."""
    display = LiveDisplay(terminal(), HandClock())
    display.stage("exploration", 2, delta=1.0)
    drawn: list[int] = []
    monkeypatch.setattr(Live, "refresh", lambda self: drawn.append(get_ident()))
    monkeypatch.setattr(Console, "print", lambda *_, **__: drawn.append(get_ident()))
    for i in range(2000):
        display.step("fine-tune", i / 2000, 1.0)
    assert get_ident() not in drawn
    monkeypatch.undo()
    assert any(re.search(r"fine-tune 1(\.0+)? of 1", line) for line in shown(display))
    display.close()


def test_live_shows_stage_phase_best_and_time_left_on_80_columns() -> None:
    console, clock = terminal(), HandClock()
    display = LiveDisplay(console, clock)
    with display:
        play(display, clock)
        display.trial_started(3)
        clock.now += 4
        display.step("fine-tune", 0.4, 1.0, note="loss 0.31")
        view = Console(file=io.StringIO(), width=80)
        view.print(Panel(display._tally))
    lines = written(view).splitlines()
    assert len(lines) == 3 and max(map(len, lines)) <= 80
    assert "exploration" in lines[0]
    assert "3 of 4 trials, 34s elapsed, about 6s left" in lines[0]
    assert "trial 3" in lines[1] and "fine-tune 0.4 of 1, loss 0.31" in lines[1]
    assert lines[2].startswith("best")
    assert "params 5.02x, drop 0.90 of 1.00 allowed (exploration 1)" in lines[2]
    assert "best so far" in written(console)
    display.close()  # a second time


def test_best_survives_the_next_stage_and_not_another_delta() -> None:
    console, clock = pipe(), HandClock()
    display = PlainDisplay(console, clock)
    play(display, clock)
    display.stage("annealing", 3, delta=1.0)
    display.trial_finished(0, 0.8, 4.0, True, "COMPLETE", None)
    assert "best 5.02x" in written(console).splitlines()[-1]
    display.stage("annealing", 3, delta=0.5)
    display.trial_finished(0, 0.4, 3.0, True, "COMPLETE", None)
    assert "best 3.00x" in written(console).splitlines()[-1]


def test_live_before_anything_is_known() -> None:
    display = LiveDisplay(terminal(), HandClock())
    view = Console(file=io.StringIO(), width=80)
    view.print(Panel(display._tally))
    display._tally.stage("exploration", 5, 0, 1.0, "macs", None, 0.0, ACCURACY)
    view.print(Panel(display._tally))
    assert "none yet within the allowed drop of 1.00 points" in written(view)


def test_live_keeps_a_finished_trial_on_one_line() -> None:
    console = terminal()
    display = LiveDisplay(console, HandClock())
    display.stage("exploration", 4, delta=1.0)
    display.close()
    display.trial_finished(0, 31.0, 9.0, False, "PRUNED", "over the gate " * 10)
    last = clean(written(console), lines=True).splitlines()[-1].strip()
    assert last.startswith("exploration 0   drop 31.00 > 1.00 ")
    assert "params 9.00x  stopped: over the gate" in last
    assert len(last) == 80 and last.endswith("…")


def test_display_follows_the_console() -> None:
    assert isinstance(make_display(pipe(), {}), PlainDisplay)
    assert isinstance(make_display(terminal(), {}), LiveDisplay)
    dumb = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    assert isinstance(make_display(dumb, {}), PlainDisplay)


@pytest.mark.parametrize("environ", [{"CI": "true"}, {"GITHUB_ACTIONS": "true"}, {"CI": "1"}])
def test_ci_keeps_lines_so_none_is_redrawn(environ: dict[str, str]) -> None:
    assert isinstance(make_display(terminal(), environ), PlainDisplay)
    assert isinstance(make_display(terminal(), {"CI": "false"}), LiveDisplay)


def test_colours_that_are_forced_make_no_terminal_of_a_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = Console(file=io.StringIO(), width=80)
    assert console.is_terminal
    assert isinstance(make_display(console), PlainDisplay)


def test_no_colour_is_respected() -> None:
    environ = {"TERM": "xterm-256color", "NO_COLOR": "1"}
    console = Console(file=io.StringIO(), force_terminal=True, width=80, _environ=environ)
    console.print(Panel(LiveDisplay(console)._tally))
    display = LiveDisplay(console, HandClock())
    display._tally.stage("exploration", 4, 2, 1.0, "params", (4.0, 0.5), 0.0, ACCURACY)
    console.print(Panel(display._tally))
    assert "exploration" in written(console)
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", written(console))


@pytest.mark.parametrize("make", [LiveDisplay, PlainDisplay, NullDisplay])
def test_messages_reach_the_logger(
    make: type[LiveDisplay | PlainDisplay | NullDisplay], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="autocompress")
    display = make() if make is NullDisplay else make(pipe())  # type: ignore[call-arg]
    with display:
        display.say("kept 3 trials in [runs/x]")
        display.stage("exploration", 4, delta=1.0, scale=Scale("R2", ""))
        display.trial_started(0)
        display.trial_finished(0, 0.0125, 2.0, True, "COMPLETE", None)
    assert "drop 0.0125" in caplog.text, "in the metric's digits"
    assert "kept 3 trials in [runs/x]" in caplog.text
    assert "exploration" in caplog.text and "2.00x" in caplog.text


def test_time_left_counts_what_comes_after_the_stage() -> None:
    clock = HandClock()
    display = PlainDisplay(Console(file=io.StringIO()), clock)
    display.stage("exploration", 4, delta=1.0, later=10)
    display.trial_started(0)
    clock.now += 10
    display.trial_finished(0, 0.5, 2.0, True, "COMPLETE", None)
    assert display._tally.eta() == pytest.approx(130.0)
