"""Jobs of the host side by side on its cores."""

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

from threadpoolctl import ThreadpoolController

S = TypeVar("S")
T = TypeVar("T")
# Two that set the library's cores at once would each restore what the other had set.
_LIMITED = threading.Lock()


def side_by_side(
    jobs: Sequence[Callable[[], S]],
    sizes: Sequence[int],
    then: Callable[[int, S], T],
    cores: int | None = None,
) -> list[T]:
    """Runs jobs, each on one core where there are enough of them, else in turn.

    Much of a decomposition cannot use more than one core, so that two layers on a core each take
    less time than one after the other on both. The largest job starts first. Only as many jobs run
    at once as the other jobs keep busy while the largest runs. That also bounds the memory: the
    jobs that run hold less than all jobs together.

    Args:
        jobs: functions without arguments that leave Python's lock free while they compute.
        sizes: how large each is.
        then: takes the index and the result of each job as soon as it is done, in the calling
            thread. The result of a job is not kept, only what ``then`` makes of it.
        cores: how many to use; None for those that this process may use.

    Returns:
        What ``then`` gave, in the order of the jobs.
    """
    cores = cores or available_cores()
    workers = min(cores, int(sum(sizes) / max(sizes, default=1) - 0.5))
    if workers < 2:
        return [then(index, job()) for index, job in enumerate(jobs)]
    order, found = sorted(range(len(jobs)), key=lambda index: -sizes[index]), dict[int, T]()
    with one_core_each(), ThreadPoolExecutor(workers) as pool:
        waiting = {pool.submit(jobs[index]): index for index in order}
        for future in as_completed(list(waiting)):
            index = waiting.pop(future)
            found[index] = then(index, future.result())
    return [found[index] for index in range(len(jobs))]


@contextlib.contextmanager
def one_core_each() -> Iterator[None]:
    """Within it, numerical libraries use one core in each thread that calls them.

    Their own threads wait for each other in loops. Where the threads of two libraries, or of two
    programs, share the cores, a computation takes up to twenty times as long as in one thread.
    """
    with _LIMITED, _libraries().limit(limits=1, user_api="blas"):
        yield


def together(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """Runs a few jobs of like size at once, within `one_core_each`; gives their results in turn.

    Args:
        jobs: functions without arguments that leave Python's lock free while they compute.

    Example:
        >>> together([lambda: 1, lambda: 2])
        [1, 2]
    """
    if len(jobs) < 2 or available_cores() < 2:
        return [job() for job in jobs]
    with ThreadPoolExecutor(min(len(jobs), available_cores())) as pool:
        return list(pool.map(lambda job: job(), jobs))


def available_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def _libraries() -> ThreadpoolController:
    """The numerical libraries of this process; to find them takes longer than a small
    decomposition."""
    return ThreadpoolController()
