"""Orders and limits."""

from __future__ import annotations

import os
import signal
import time

import pytest

from autocompress.errors import TrialTimeout
from autocompress.watch import Orders, TrialTaken, Watch


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_trial_goes_on_where_nothing_is_ordered() -> None:
    watch = Watch()
    watch.step()
    with watch.over():
        watch.step()


def test_an_order_to_stop_ends_a_trial_at_its_next_step() -> None:
    watch = Watch()
    watch.orders.ask_to_drain()
    watch.step()
    watch.orders.ask_to_stop()
    assert watch.orders.drain
    with pytest.raises(KeyboardInterrupt):
        watch.step()


def test_a_trial_that_others_have_ends() -> None:
    watch = Watch()
    with watch.over(taken=lambda: True), pytest.raises(TrialTaken):
        watch.step()
    watch.step()


def test_a_trial_has_a_limit() -> None:
    clock = Clock()
    watch = Watch(limit=60.0, clock=clock)
    with watch.over():
        clock.now = 60.0
        watch.step()
        clock.now = 61.0
        with pytest.raises(TrialTimeout, match=r"more than 1 minutes \(run.trial_limit\)"):
            watch.step()
    watch.step()
    with watch.over():
        watch.step()


def test_what_is_not_limited_may_take_longer() -> None:
    clock = Clock()
    watch = Watch(limit=60.0, clock=clock)
    with watch.over(limited=False):
        clock.now = 1e6
        watch.step()
    with watch.over(), pytest.raises(TrialTimeout):
        clock.now += 61.0
        watch.step()


def test_a_trial_that_makes_no_step_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autocompress.watch.LOOK", 0.01)
    watch = Watch(stall=0.3)
    reasons: list[str] = []
    with watch.over(hung=reasons.append):
        end = time.monotonic() + 0.6
        while time.monotonic() < end:
            watch.step()
            time.sleep(0.01)
        assert not reasons
        end = time.monotonic() + 10
        while not reasons and time.monotonic() < end:
            time.sleep(0.01)
    assert len(reasons) == 1 and "run.stall_limit" in reasons[0]


def test_what_hangs_beyond_its_limit_is_seen_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autocompress.watch.LOOK", 0.01)
    clock = Clock()
    watch = Watch(limit=600.0, clock=clock)
    reasons: list[str] = []
    with watch.over(hung=reasons.append):
        # Its own next step may end it first.
        clock.now = 630.0
        time.sleep(0.1)
        assert not reasons
        clock.now = 661.0
        end = time.monotonic() + 10
        while not reasons and time.monotonic() < end:
            time.sleep(0.01)
    assert "10 minutes" in reasons[0]


def test_ctrl_c_once_drains_and_twice_stops_and_thrice_ends() -> None:
    orders, said = Orders(), []
    with orders.listening(said.append), orders.patient():
        os.kill(os.getpid(), signal.SIGINT)
        assert orders.drain and not orders.stop
        os.kill(os.getpid(), signal.SIGINT)
        assert orders.stop
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert len(said) == 2 and "Ctrl-C again" in said[0]


def test_sigterm_stops_a_trial_at_its_next_step() -> None:
    orders, said = Orders(), []
    with orders.listening(said.append), orders.patient():
        os.kill(os.getpid(), signal.SIGTERM)
    assert orders.stop and len(said) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_where_no_trial_runs_a_signal_ends_at_once(number: signal.Signals) -> None:
    orders = Orders()
    before = signal.getsignal(number)
    with orders.listening(lambda text: None), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
