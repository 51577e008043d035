"""Many small pieces of work at once, one processor each.

A small block's operations are too short to share among threads: two threads inside each are hardly faster than one,
while two blocks at a time are twice as fast. Each piece is computed by one thread alone, so that its result does not
depend on how many there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def in_parallel(function: Callable[[T], R], items: Iterable[T], *, at_once: bool) -> Iterator[R]:
    """`function` of each item, in order: several items at once on one thread each, or one item on all threads.

    `items` are drawn in the calling thread, and no more than twice as many as there are threads ahead of the results.
    Gradients are off in the function unless it turns them on.
    """

    def alone(item: T) -> R:
        with torch.no_grad():
            return function(item)

    threads = torch.get_num_threads()
    if threads == 1 or not at_once:
        yield from map(alone, items)
        return
    waiting: deque[Future[R]] = deque()
    pool = _pool(threads)
    with one_thread():
        try:
            for item in items:
                waiting.append(pool.submit(alone, item))
                if len(waiting) >= 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            wait(waiting)


@contextmanager
def one_thread(*, alone: bool = True) -> Iterator[None]:
    """Within the context, operations run on one thread: waking a second takes longer than a small product."""
    threads = torch.get_num_threads()
    if not alone or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """So many threads, which stay: a gradient step of a small block takes but ten times as long as to start them."""
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
