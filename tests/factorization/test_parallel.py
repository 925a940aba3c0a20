"""Jobs side by side on the cores, and the routines that leave Python's lock free for them."""

import gc
import threading
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info

import lowrank_jax as lr
from lowrank_jax.factorization.forms import SCHEMES
from lowrank_jax.factorization.lapack import routine
from lowrank_jax.factorization.parallel import (
    available_cores,
    one_core_each,
    side_by_side,
    together,
)
from lowrank_jax.factorization.scheme import factor_all


def keep(index, result):
    return result


def blas_threads() -> list[int]:
    return [
        library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"
    ]


@given(st.lists(st.integers(1, 50), max_size=12), st.integers(1, 4))
@settings(max_examples=30)
def test_results_come_in_the_order_of_the_jobs(sizes, cores):
    jobs = [lambda index=index: index for index in range(len(sizes))]
    found = side_by_side(jobs, sizes, lambda index, result: (index, result), cores)
    assert found == [(index, index) for index in range(len(sizes))]


def test_the_largest_starts_first_and_no_more_run_than_there_are_cores():
    started, running, most, lock = [], [0], [0], threading.Lock()

    def job(index):
        with lock:
            started.append(index)
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.01)
        with lock:
            running[0] -= 1

    sizes = [1, 2, 3, 5, 4, 3]
    side_by_side([lambda i=i: job(i) for i in range(6)], sizes, keep, 2)
    assert started[0] == 3 and most[0] == 2


@pytest.mark.parametrize("sizes", [[], [5], [5, 1, 1], [5, 5]])
def test_jobs_that_cannot_keep_up_with_the_largest_run_in_turn_in_this_thread(sizes):
    found = side_by_side([threading.current_thread] * len(sizes), sizes, keep, 8)
    assert found == [threading.current_thread()] * len(sizes)


@pytest.mark.parametrize("cores", [1, 2])
def test_results_are_handed_on_in_this_thread_and_not_kept(cores):
    class Result:
        pass

    made, threads = [], []

    def job():
        result = Result()
        made.append(weakref.ref(result))
        return result

    def then(index, result):
        threads.append(threading.current_thread())
        return index

    assert side_by_side([job] * 8, [1] * 8, then, cores) == list(range(8))
    gc.collect()
    assert len(made) == 8 and not any(ref() for ref in made)
    assert set(threads) == {threading.current_thread()}


def test_each_job_has_one_core_and_afterwards_the_library_has_all_again():
    before = blas_threads()
    found = side_by_side([blas_threads] * 4, [1] * 4, keep, 2)
    assert all(set(threads) == {1} for threads in found) and blas_threads() == before


def test_threads_that_decompose_at_once_leave_the_library_its_cores():
    before = blas_threads()
    calls = [
        threading.Thread(
            target=side_by_side, args=([lambda: time.sleep(0.005)] * 6, [1] * 6, keep, 2)
        )
        for _ in "abc"
    ]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert blas_threads() == before


def test_an_error_in_a_job_is_raised_and_the_library_has_its_cores_again():
    before = blas_threads()
    with pytest.raises(ZeroDivisionError):
        side_by_side([lambda: 1 // 0] * 4, [1] * 4, keep, 2)
    assert blas_threads() == before


def test_routines_leave_the_lock_free():
    ran, stop = [0], threading.Event()

    def count():
        while not stop.is_set():
            ran[0] += 1
            time.sleep(0)

    side = 1500
    a, c = np.ones((side, side), order="F"), np.empty((side, side), order="F")
    thread = threading.Thread(target=count)
    thread.start()
    try:
        time.sleep(0.01)
        before = ran[0]
        routine("gemm", a.dtype)("N", "N", side, side, side, 1.0, a, side, a, side, 0.0, c, side)
        during = ran[0] - before
    finally:
        stop.set()
        thread.join()
    assert c[0, 0] == side and during > 10  # with the lock held the other thread would stand still


def test_a_wrong_number_of_arguments_is_refused_before_the_call():
    with pytest.raises(TypeError, match="ssterf: 1 arguments are not allowed; give 4"):
        routine("sterf", np.dtype("float32"))(3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_layers_side_by_side_have_the_factors_that_they_have_alone(dtype):
    rng = np.random.default_rng(0)
    kernels = [jnp.asarray(rng.standard_normal((3, 3, 64 + 8 * i, 72)), dtype) for i in range(5)]
    forms = ["vertical", "horizontal", "spatial", "pointwise", "vertical"]
    schemes = [SCHEMES[first](20 + i, first=first) for i, first in enumerate(forms)]
    for scheme, kernel, pair in zip(schemes, kernels, factor_all(schemes, kernels), strict=True):
        for one, alone in zip(pair, scheme.factor(kernel), strict=True):
            assert one.dtype == kernel.dtype
            # Another number of threads sums in another order; a column may also change its sign
            # with the other's.
            limit = 1e-3 if dtype == "float32" else 0.05
            np.testing.assert_allclose(
                *(np.abs(np.asarray(x, np.float32)) for x in (one, alone)), atol=limit
            )


def test_kernels_with_values_beside_traced_ones_stay_in_this_thread():
    rng = np.random.default_rng(0)
    kernels = [jnp.asarray(rng.standard_normal((3, 3, 8, 8)), jnp.float32) for _ in range(4)]

    def factors(last):
        return factor_all([lr.Separable(3)] * 4, [*kernels[:3], last])

    found, wanted = jax.jit(factors)(kernels[3]), factors(kernels[3])
    for one, two in zip(found, wanted, strict=True):
        np.testing.assert_allclose(lr.merge(*one), lr.merge(*two), atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_jobs_at_once_give_their_results_in_turn_on_one_core_each(count):
    def job(index):
        return index, set(blas_threads())

    with one_core_each():
        found = together([lambda i=i: job(i) for i in range(count)])
    assert found == [(index, {1}) for index in range(count)]


@pytest.mark.skipif(available_cores() < 2, reason="one core runs one job at a time")
def test_two_jobs_meet_each_other():
    both = threading.Barrier(2, timeout=20)
    assert sorted(together([both.wait, both.wait])) == [0, 1]
