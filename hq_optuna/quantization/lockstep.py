"""Several batches go through a network together: at a watched module each waits for the others.

What is measured at a module can then be of all batches, and be used before any of them goes on, as
if they were one batch. They are never joined: what a network computes may hang on which samples a
batch holds, how many, and of which shapes.

Each batch has a thread, of which one runs at a time, in the order of the batches.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch


class _Abandoned(BaseException):
    """Ends the forward pass of a batch when another one failed."""


class Lockstep:
    """Runs one forward pass a batch, all together; see `run`.

    ``settle(name, what)`` is called with what all batches that wait at a module handed over, in
    the order of the batches, before any of them goes on. Where batches wait at different modules
    (a branch that some do not take), the one that comes first in ``order`` is settled first.
    """

    def __init__(self, order: Sequence[str], settle: Callable[[str, list[Any]], None]) -> None:
        self._rank = {name: rank for rank, name in enumerate(order)}
        self._settle = settle
        self._passes: list[_Pass] = []

    def wait(self, name: str, what: Any) -> None:
        """Hand over what was measured at a module, and return when it is settled."""
        if not self._passes:  # a single batch
            self._settle(name, [what])
        else:
            _RUNNING.get().wait_at(name, what)

    def run(self, forwards: Sequence[Callable[[], Any]]) -> list[Any]:
        """Call one function a batch, which call `wait`, and return what they return."""
        if len(forwards) == 1:
            return [forwards[0]()]
        self._passes = [_Pass(forward) for forward in forwards]
        try:
            going = list(self._passes)
            while going:
                for one in going:
                    one.go_on()
                waiting = [one for one in self._passes if one.at is not None]
                name = min((str(one.at) for one in waiting), key=self._rank.__getitem__, default="")
                going = [one for one in waiting if one.at == name]
                if going:
                    self._settle(name, [one.what for one in going])
            return [one.returned for one in self._passes]
        finally:
            for one in self._passes:
                one.abandon()
            self._passes = []


class _Pass:
    """The forward pass of one batch, in a thread that runs only in `go_on`."""

    def __init__(self, forward: Callable[[], Any]) -> None:
        self.at: str | None = None
        self.what: Any = None
        self.returned: Any = None
        self._error: BaseException | None = None
        self._forward, self._abandoned = forward, False
        self._may_run, self._stands = threading.Semaphore(0), threading.Semaphore(0)
        # What PyTorch keeps by thread.
        self._device = torch.get_default_device()
        self._modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        self._threads = torch.get_num_threads()  # with another number the last bits may differ
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run,), daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._may_run.acquire()
        _RUNNING.set(self)
        torch.set_num_threads(self._threads)
        inference, grad = self._modes
        try:
            if not self._abandoned:
                with torch.inference_mode(inference), torch.set_grad_enabled(grad):
                    if self._device.type == "cpu":
                        self.returned = self._forward()
                    else:
                        with self._device:
                            self.returned = self._forward()
        except BaseException as error:
            self._error = error
        finally:
            self._stands.release()

    def wait_at(self, name: str, what: Any) -> None:
        self.at, self.what = name, what
        self._stands.release()
        self._may_run.acquire()
        if self._abandoned:
            raise _Abandoned

    def go_on(self) -> None:
        """Run until it waits or ends; raise what it raised."""
        self.at = self.what = None
        self._may_run.release()
        self._stands.acquire()
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        self._abandoned = True
        while self._thread.is_alive():
            self._may_run.release()
            self._thread.join(0.05)


_RUNNING: contextvars.ContextVar[_Pass] = contextvars.ContextVar("the pass of this thread")
