"""Requests to stop: noted at once, answered at a step, never lost."""

import signal

import pytest

from infimed_jax.errors import Interrupted
from infimed_jax.train.stopping import stop_requests


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


def test_a_second_ctrl_c_stops_at_once():
    with pytest.raises(KeyboardInterrupt), stop_requests():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_without_a_request_nothing_happens():
    with stop_requests() as asked:
        assert not asked(1)
