"""A map over threads whose results come in order, with a bounded number of results waiting."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

MAX_WAITING = 8
"""results per item that may wait to be consumed"""


class _Failed:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class _End:
    pass


def ordered_map(
    items: Sequence[T], work: Callable[[T], Iterator[R]], workers: int, first: int = 0
) -> Iterator[tuple[int, R]]:
    """(index, result) for every result of `work(items[index])`, from index `first` on, in order.

    `workers` threads run `work` on at most twice as many items; an item pauses while MAX_WAITING of its results wait.
    An error is raised where its result would have come, after all earlier results.
    """
    stop = threading.Event()
    in_flight: deque[tuple[int, queue.Queue[R | _Failed | _End]]] = deque()

    def put(results: queue.Queue[R | _Failed | _End], value: R | _Failed | _End) -> bool:
        while not stop.is_set():
            try:
                results.put(value, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def run(item: T, results: queue.Queue[R | _Failed | _End]) -> None:
        try:
            for result in work(item):
                if not put(results, result):
                    return
        except BaseException as error:
            put(results, _Failed(error))
        else:
            put(results, _End())

    pool = ThreadPoolExecutor(workers, thread_name_prefix="unit")
    next_index = first
    try:
        while True:
            while next_index < len(items) and len(in_flight) < 2 * workers:
                results: queue.Queue[R | _Failed | _End] = queue.Queue(MAX_WAITING)
                # Threads take items in this order, so the item that is consumed next always has a thread.
                pool.submit(run, items[next_index], results)
                in_flight.append((next_index, results))
                next_index += 1
            if not in_flight:
                return
            index, results = in_flight[0]
            while not isinstance(value := results.get(), _End):
                if isinstance(value, _Failed):
                    raise value.error
                yield index, value
            in_flight.popleft()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
