"""Stops a training cleanly on SIGTERM (job cancelled), SIGUSR2 (submitit: preemption, time limit) or SIGINT (Ctrl-C).

The signal handler only sets a flag. The training loop reads it between two steps.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
AGREE_EVERY_STEPS = 10  # processes must stop at the same step; to agree on it costs a collective and a host sync


class StopRequest:
    """Within the block the stop signals set a flag instead of ending the process. A second Ctrl-C interrupts at once.

    If a signal arrived that `agreed` did not report, the earlier handler receives it at the end of the block.
    """

    def __init__(self) -> None:
        self.received = 0
        self.answered = False
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            self._old = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        handled = callable(self._old.get(signal.Signals(self.received))) if self.received else False
        # while an exception is raised, do not run the default action: it would end the process and hide the error
        if self.received and not self.answered and (kind is None or handled):
            signal.raise_signal(self.received)

    @contextmanager
    def signals_as_before(self) -> Iterator[None]:
        """Within the block signals have their earlier handlers again.

        For long work after a checkpoint: nothing is lost if a signal ends it, so nobody should have to wait for it.
        """
        for number, handler in self._old.items():
            signal.signal(number, handler)
        if self.received:  # a signal arrived after the last call of `agreed`
            signal.raise_signal(self.received)
        yield
        for number in self._old:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = number

    def agreed(self, step: int, last: bool = False) -> str | None:
        """The name of a stop signal that any process has received, or None. All processes call it at the same steps.

        Several processes exchange their flags only every AGREE_EVERY_STEPS steps and if `last` is true;
        at other steps the result is None.
        """
        number = self.received
        if dist.is_available() and dist.is_initialized():
            if step % AGREE_EVERY_STEPS and not last:
                return None
            flag = torch.tensor(number, device="cuda" if dist.get_backend() == "nccl" else "cpu")
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            number = int(flag)
        self.answered = bool(number)
        return signal.Signals(number).name if number else None
