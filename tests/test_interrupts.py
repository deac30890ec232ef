"""Ctrl-C that waits for a safe point."""

import os
import signal

import pytest

from msquant.interrupts import check_interrupt, deferred_interrupts


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def work(passed: list[str], presses: int) -> None:
    with deferred_interrupts():
        for _ in range(presses):
            press_ctrl_c()
        passed.append("before the check")
        check_interrupt()
        passed.append("after the check")


@pytest.mark.parametrize(("presses", "passed"), [(1, ["before the check"]), (2, [])])
def test_ctrl_c_waits_for_the_next_check_and_a_second_one_does_not(presses: int, passed: list[str]) -> None:
    seen: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        work(seen, presses)
    assert seen == passed


def test_ctrl_c_without_a_check_takes_effect_at_the_end() -> None:
    with pytest.raises(KeyboardInterrupt), deferred_interrupts():
        press_ctrl_c()


def test_afterwards_all_is_as_before() -> None:
    before = signal.getsignal(signal.SIGINT)
    with deferred_interrupts():
        assert signal.getsignal(signal.SIGINT) is not before
        check_interrupt()
    assert signal.getsignal(signal.SIGINT) is before
    check_interrupt()
