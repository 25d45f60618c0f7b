from __future__ import annotations

import asyncio
import signal
import threading

import pytest
from fsspec.asyn import get_loop

from ckpt.backends.objects.fsspec_io import run_in_loop


def test_result_and_error_come_from_the_other_thread() -> None:
    async def work() -> str:
        return threading.current_thread().name

    assert run_in_loop(work(), get_loop()) != threading.current_thread().name

    async def fails() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_in_loop(fails(), get_loop())


def test_interrupted_wait_ends_the_work_before_it_raises() -> None:
    begun, ended = threading.Event(), threading.Event()

    async def work() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    def interrupt() -> None:
        begun.wait()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    with pytest.raises(KeyboardInterrupt):
        run_in_loop(work(), get_loop())
    assert ended.is_set()
    interrupting.join()
