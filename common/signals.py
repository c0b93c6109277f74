"""Stopping cleanly: SIGTERM (a cancelled job), SIGUSR2 (submitit: preemption or time limit) and SIGINT (Ctrl-C) ask, the loop answers between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
AGREE_EVERY_STEPS = 10  # processes must stop at the same step; agreeing costs a collective and a host sync


class StopRequest:
    """Within the block the stop signals set a flag instead of ending the process. A second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.received = 0
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            self._old = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = number

    def agreed(self, step: int) -> str | None:
        """The name of a signal that any process has received, once all processes know of it; else None. All processes call it at the same steps."""
        if not (dist.is_available() and dist.is_initialized()):
            return signal.Signals(self.received).name if self.received else None
        if step % AGREE_EVERY_STEPS:
            return None
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        flag = torch.tensor(int(self.received), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return signal.Signals(int(flag)).name if flag else None
