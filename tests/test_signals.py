"""Signal handling: what is said when a run is asked to stop."""

from __future__ import annotations

import os
import signal

import pytest

from clbench import signals


def test_a_first_interrupt_says_how_to_stop_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with signals.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.asked() == "SIGINT"
    said = capfd.readouterr().err
    assert said == "\nSIGINT: stopping after this update, once more: at once\n"


def test_a_block_within_another_forgets_nothing_that_was_asked() -> None:
    with signals.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        with signals.listening():
            assert signals.asked() == "SIGTERM"
        assert signals.asked() == "SIGTERM"
    assert signals.asked() is None
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_a_signal_of_the_cluster_is_answered(capfd: pytest.CaptureFixture[str]) -> None:
    with signals.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert capfd.readouterr().err == "\nSIGUSR1: stopping after this update\n"
