"""Work done side by side, its results in order, with a bounded amount of them waiting."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

WAITING = 8
"""results of one item that may wait to be taken"""


class _Failed(Generic[T]):
    def __init__(self, error: BaseException) -> None:
        self.error = error


class _End:
    pass


def in_order(
    items: Sequence[T], work: Callable[[T], Iterator[R]], workers: int, first: int = 0
) -> Iterator[tuple[int, R]]:
    """(index, result) for every result of `work(items[index])`, from index `first` on, in order.

    `workers` threads run `work`; twice as many items are under way at most, and an item whose results nobody has taken
    yet waits after WAITING of them. An error is raised where its result would have come, after all that come before.
    """
    stop = threading.Event()
    under_way: deque[tuple[int, queue.Queue[R | _Failed[R] | _End]]] = deque()

    def put(line: queue.Queue[R | _Failed[R] | _End], value: R | _Failed[R] | _End) -> bool:
        while not stop.is_set():
            try:
                line.put(value, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def run(item: T, line: queue.Queue[R | _Failed[R] | _End]) -> None:
        try:
            for result in work(item):
                if not put(line, result):
                    return
        except BaseException as error:
            put(line, _Failed(error))
        else:
            put(line, _End())

    pool = ThreadPoolExecutor(workers, thread_name_prefix="unit")
    following = first
    try:
        while True:
            while following < len(items) and len(under_way) < 2 * workers:
                line: queue.Queue[R | _Failed[R] | _End] = queue.Queue(WAITING)
                # Threads take items in this order, so the one whose results are wanted next is always worked on.
                pool.submit(run, items[following], line)
                under_way.append((following, line))
                following += 1
            if not under_way:
                return
            index, line = under_way[0]
            while not isinstance(value := line.get(), _End):
                if isinstance(value, _Failed):
                    raise value.error
                yield index, value
            under_way.popleft()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
