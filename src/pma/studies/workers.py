"""Processes that train and measure side by side: gone as soon as whoever asked is."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

_LOOK_EVERY_SECONDS = 2.0


@contextmanager
def pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """As many processes, for the block. If it ends by an exception (an interrupt is one), they are ended at
    once: a training goes on from its newest checkpoint.
    """
    before = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    workers = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start, initargs=(os.getpid(),))
    try:
        yield workers
    except BaseException:
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        workers.shutdown(wait=False, cancel_futures=True)
        raise
    workers.shutdown()


def _start(parent: int) -> None:
    """Runs are parallel, not steps: tiny models gain nothing from threads."""
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Not even a killed parent leaves a training behind that nobody waits for."""
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY_SECONDS)
    os._exit(1)
