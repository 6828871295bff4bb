"""A step that hangs is named, once, with the host; one that goes on is not."""

import logging
import socket
import threading

from infimed_jax.train.watchdog import Watchdog


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
    logger = logging.getLogger("infimed_jax.train.watchdog")
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
