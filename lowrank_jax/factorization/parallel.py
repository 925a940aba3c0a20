"""Jobs of the host side by side on its cores."""

import functools
import os
import threading
from collections.abc import Callable, Sequence
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
    less time than one after the other on both. The largest starts first. As many run as the others
    can keep up with the largest, which also bounds the memory: what they hold together is under the
    sum of all.

    Args:
        jobs: functions without arguments that leave Python's lock free while they compute.
        sizes: how large each is.
        then: takes the index and the result of each job as soon as it is done, in the calling
            thread. What a job gave is not kept, only what this makes of it.
        cores: to use; without it those that this process may.

    Returns:
        What ``then`` gave, in the order of the jobs.
    """
    cores = cores or len(
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    workers = min(cores, int(sum(sizes) / max(sizes, default=1) - 0.5))
    if workers < 2:
        return [then(index, job()) for index, job in enumerate(jobs)]
    order, found = sorted(range(len(jobs)), key=lambda index: -sizes[index]), dict[int, T]()
    with (
        _LIMITED,
        _libraries().limit(limits=1, user_api="blas"),
        ThreadPoolExecutor(workers) as pool,
    ):
        waiting = {pool.submit(jobs[index]): index for index in order}
        for future in as_completed(list(waiting)):
            index = waiting.pop(future)
            found[index] = then(index, future.result())
    return [found[index] for index in range(len(jobs))]


@functools.cache
def _libraries() -> ThreadpoolController:
    """The numerical libraries of this process; to find them takes longer than a small
    decomposition."""
    return ThreadpoolController()
