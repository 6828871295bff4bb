"""Stop requests are noted at once, answered at a step, never lost; a step that hangs is named, once, with the host."""

import logging
import signal
import socket
import threading

import pytest

from infimed_jax import signals
from infimed_jax.errors import Interrupted
from infimed_jax.runs.guard import Watchdog, stop_requests


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_that_no_step_answers_is_not_lost(number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="after the last step"), stop_requests() as asked:
        assert not asked(1)
        signal.raise_signal(number)
        assert asked(2)
    assert signal.getsignal(number) is before


def test_a_step_that_answers_says_it_in_its_own_words():
    with pytest.raises(Interrupted, match="mine"), stop_requests() as asked:
        signal.raise_signal(signal.SIGTERM)
        if asked(1):
            raise Interrupted("mine")


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once(first, second):
    with pytest.raises(KeyboardInterrupt), stop_requests():
        signal.raise_signal(first)
        signal.raise_signal(second)


def test_a_signal_whose_interrupt_was_lost_while_the_run_started_stops_it(monkeypatch):
    """As where it comes inside one of JAX's callbacks, which ignores exceptions."""
    monkeypatch.setattr(signals, "early", [])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signals.listen()
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted, match="mine"), stop_requests() as asked:
            if asked(1):
                raise Interrupted("mine")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_without_a_request_nothing_happens():
    with stop_requests() as asked:
        assert not asked(1)


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.any = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        self.any.set()


def _heard(watchdog_does) -> list[str]:
    handler = _Heard()
    logger = logging.getLogger("infimed_jax.runs.guard")
    logger.addHandler(handler)
    try:
        watchdog_does(handler)
    finally:
        logger.removeHandler(handler)
    return handler.lines


def test_a_hung_step_is_named_with_the_host_and_once():
    def hang(handler: _Heard) -> None:
        with Watchdog(0.05) as watchdog:
            watchdog.beat("step 7: waiting for data")
            assert handler.any.wait(60)
            threading.Event().wait(0.3)

    (line,) = _heard(hang)
    assert "step 7: waiting for data" in line and socket.gethostname() in line and "process 0 of 1" in line


def test_it_says_nothing_when_off_or_when_the_run_has_ended():
    def run(handler: _Heard) -> None:
        with Watchdog(0.0) as watchdog:
            watchdog.beat("step 1")
            assert not handler.any.wait(0.2)
        with Watchdog(3600) as watchdog:
            watchdog.beat("step 1")
        assert not watchdog._thread.is_alive() or watchdog._stop.is_set()

    assert _heard(run) == []


def test_a_timeout_beyond_what_a_thread_can_wait_leaves_the_watchdog_alive():
    with Watchdog(1e308) as watchdog:
        watchdog._thread.join(0.2)  # it ended at once with an OverflowError
        assert watchdog._thread.is_alive()
