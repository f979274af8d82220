"""SIGTERM and SIGINT (Ctrl-C): the first ends the command where nothing is lost, the second at once."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from timm_mamba_pkd.distributed import gather, is_main

__all__ = ["Interrupted", "deferring", "ending_on_signals", "received", "received_anywhere", "share"]

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """A signal asked the command to end; ``exit_code`` is the one of convention, 128 plus the signal's number."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.exit_code = 128 + number


class _State:
    received: signal.Signals | None = None
    deferring = False


_state = _State()


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """In this context a signal raises `Interrupted`, at once or at the end of `deferring`; a second one kills."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets only the main thread handle signals
        return
    process = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:
            return  # a worker of a data loader: the process that started it decides
        if _state.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(process, number)
        _state.received = signal.Signals(number)
        if not _state.deferring:
            raise Interrupted(_state.received)
        message = f"\nmamba-pkd: {_state.received.name}: finishing the step and saving; a second signal ends at once\n"
        if is_main():
            os.write(2, message.encode())  # print and logging may be what was interrupted

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    _state.received = None
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferring() -> Iterator[None]:
    """In this context a signal is only noted, see `received`; it raises `Interrupted` when the context ends."""
    _state.deferring = True
    try:
        yield
    finally:
        _state.deferring = False
    if _state.received is not None:
        raise Interrupted(_state.received)


def received() -> int:
    """The number of the signal that waits for the end of `deferring`; 0 for none."""
    return _state.received or 0


def share(numbers: Iterable[int]) -> bool:
    """Take what `received` says in every process as received here too; whether there is any."""
    number = max(numbers)
    if number:
        _state.received = signal.Signals(number)
    return number > 0


def received_anywhere() -> bool:
    """`share` what every process has received by now."""
    return share(gather(received()))
