from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from hq_optuna.workers.interrupts import held_interrupts


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_waits_until_it_is_released() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), held_interrupts() as held:
        interrupt()
        reached.append("held")
        held.release()
        reached.append("not here")
    assert reached == ["held"]


def test_an_interrupt_comes_at_once_after_the_release() -> None:
    with pytest.raises(KeyboardInterrupt), held_interrupts() as held:
        held.release()
        interrupt()
        pytest.fail("not interrupted")


def test_what_was_never_released_comes_when_the_body_ends() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt):
        with held_interrupts():
            interrupt()
            reached.append("body")
        reached.append("not here")
    assert reached == ["body"]


def test_handlers_are_put_back_also_after_an_error() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ValueError, match="of the body"), held_interrupts():
        raise ValueError("of the body")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_another_thread_leaves_signals_alone() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def body() -> None:
        with held_interrupts():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [before]


def test_an_interrupt_is_held_again_once_asked() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt):
        with held_interrupts() as held:
            held.release()
            held.hold()
            interrupt()
            assert held.pending
            reached.append("body")
        reached.append("not here")
    assert reached == ["body"]


def test_a_sleep_ends_with_the_interrupt_that_was_held_before_it() -> None:
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), held_interrupts() as held:
        interrupt()
        held.sleep(60)
    assert time.monotonic() - began < 30


def test_a_sleep_without_an_interrupt_takes_its_time() -> None:
    began = time.monotonic()
    with held_interrupts() as held:
        held.sleep(0.15)
    assert time.monotonic() - began >= 0.15
