"""Every bad argument is refused before Fortran's routine is called."""

import inspect
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_jax.factorization import lapack
from lowrank_jax.factorization.lapack import routine

N, M, K = 5, 4, 3
DTYPES = ("float32", "float64")
READ = {  # the arrays that a routine only reads
    "gemm": {"a", "b"},
    "syrk": {"a"},
    "sytrd": set(),
    "sterf": set(),
    "stein": {"d", "e", "w", "iblock", "isplit"},
    "ormqr": {"tau"},
    "potrf": set(),
    "potrs": {"a"},
    "trtrs": {"a"},
}


def matrix(rows, columns, dtype):
    return np.ones((rows, columns), dtype, "F")


def vector(size, dtype):
    return np.ones(size, dtype)


def arguments(name: str, dtype: str) -> dict:
    """Arguments that a routine takes, by Fortran's names."""
    ints = lambda size: vector(size, np.intc)  # noqa: E731
    a, b, c = matrix(M, K, dtype), matrix(K, N, dtype), matrix(M, N, dtype)
    square, info = matrix(N, N, dtype), ints(1)
    d, e, work = vector(N, dtype), vector(N - 1, dtype), vector(5 * N, dtype)
    values = {
        "gemm": ("N", "N", M, N, K, 1.0, a, M, b, K, 0.0, c, M),
        "syrk": ("L", "N", M, K, 1.0, a, M, 0.0, matrix(M, M, dtype), M),
        "sytrd": ("L", N, square, N, d, e, vector(N - 1, dtype), work, 5 * N, info),
        "sterf": (N, d, e, info),
        "stein": (N, d, e, 2, vector(2, dtype), ints(2), ints(N), matrix(N, 2, dtype), N, work,
                  ints(N), ints(2), info),
        "potrf": ("L", N, square, N, info),
        "potrs": ("L", N, M, square, N, matrix(N, M, dtype), N, info),
        "trtrs": ("L", "T", "N", N, M, square, N, matrix(N, M, dtype), N, info),
        "ormqr": ("L", "N", M, N, K, a, M, vector(K, dtype), c, M, work, 5 * N, info),
    }[name]  # fmt: skip
    return dict(zip(inspect.signature(lapack._NEEDS[name]).parameters, values, strict=True))


def arrays(name: str) -> list[str]:
    given = arguments(name, "float64")
    return [key for key, value in given.items() if isinstance(value, np.ndarray)]


def read_only(array):
    array = array.copy(order="K")
    array.flags.writeable = False
    return array


def unaligned(array):
    raw = np.zeros(array.nbytes + 1, np.uint8)[1:]
    return raw.view(array.dtype).reshape(array.shape, order="F")


BAD = {
    "a list": (lambda x: x.tolist(), TypeError),
    "None": (lambda x: None, TypeError),
    "another precision": (lambda x: x.astype("float16"), TypeError),
    "the other precision": (lambda x: x.astype({4: "f8", 8: "f4"}[x.itemsize]), TypeError),
    "another order of bytes": (lambda x: x.astype(x.dtype.newbyteorder()), TypeError),
    "gaps": (lambda x: np.repeat(x, 2, axis=0)[::2], ValueError),
    "reversed": (lambda x: x[::-1], ValueError),
    "too small": (lambda x: x[..., :-1], ValueError),
    "empty": (lambda x: x[..., :0], ValueError),
    "not aligned": (unaligned, ValueError),
    "three axes": (lambda x: x[None, None], ValueError),
}
ROUTINES = sorted(lapack._NEEDS)


@pytest.fixture
def calls(monkeypatch):
    """The calls that reach Fortran; none is made."""
    made: list = []
    monkeypatch.setattr(lapack, "_function", lambda full: lambda *args: made.append(full))
    return made


def call(name: str, dtype: str, changes: dict) -> None:
    routine.__wrapped__(name, np.dtype(dtype))(*(arguments(name, dtype) | changes).values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROUTINES)
def test_arguments_that_fit_are_passed_on(calls, name, dtype):
    call(name, dtype, {})
    assert calls == [{"float32": "s", "float64": "d"}[dtype] + name]


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name in ROUTINES for key in arrays(name)]
)
def test_every_bad_array_is_refused_before_the_call(calls, name, key):
    for (bad, (change, error)), dtype in itertools.product(BAD.items(), DTYPES):
        array = arguments(name, dtype)[key]
        single = array.size == 1 and bad in ("gaps", "reversed")
        if single or (array.ndim == 1 and bad == "three axes"):
            continue  # the same memory
        with pytest.raises(error, match=rf"{name}: .*\b{key}\b"):
            call(name, dtype, {key: change(array)})
        assert not calls, bad


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name in ROUTINES for key in arrays(name)]
)
def test_what_is_written_to_must_be_writeable_and_what_is_read_need_not(calls, name, key):
    changes = {key: read_only(arguments(name, "float64")[key])}
    if key in READ[name]:
        call(name, "float64", changes)
        assert len(calls) == 1
    else:
        with pytest.raises(ValueError, match=f"{name}: the array {key} is read-only"):
            call(name, "float64", changes)
        assert not calls


@pytest.mark.parametrize(
    ("name", "key"), [("gemm", "c"), ("syrk", "c"), ("sytrd", "a"), ("stein", "z"), ("ormqr", "c")]
)
def test_a_matrix_that_is_written_lies_column_by_column(calls, name, key):
    rows = np.ascontiguousarray(arguments(name, "float64")[key])
    with pytest.raises(ValueError, match=f"array {key} lies row by row"):
        call(name, "float64", {key: rows})
    assert not calls


@pytest.mark.parametrize("step", [0, 1, M - 1, M + 1, 10**6])
@pytest.mark.parametrize(("key", "of"), [("lda", "a"), ("ldc", "c")])
def test_a_leading_dimension_that_is_not_that_of_the_array_is_refused(calls, key, of, step):
    with pytest.raises(ValueError, match=f"array {of} .*leading dimension {step}"):
        call("gemm", "float64", {key: step})
    assert not calls


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("m", 1.0, TypeError),
        ("m", True, TypeError),
        ("m", -1, ValueError),
        ("m", 2**31, ValueError),
        ("alpha", 1, TypeError),
        ("transa", "X", ValueError),
        ("transa", "NN", ValueError),
        ("transa", b"N", TypeError),
        ("m", M + 1, ValueError),
        ("n", N + 1, ValueError),
        ("k", K + 1, ValueError),
    ],
)
def test_scalars_that_do_not_fit_are_refused(calls, key, value, error):
    with pytest.raises(error, match="dgemm: "):
        call("gemm", "float64", {key: value})
    assert not calls


@pytest.mark.parametrize(("name", "dtype"), [("gesdd", "float64"), ("gemm", "float16"), ("", "f8")])
def test_an_unknown_routine_is_refused_with_those_there_are(name, dtype):
    with pytest.raises(ValueError, match=r"not known; give one of gemm, .*float32 or float64"):
        routine(name, np.dtype(dtype))


def test_a_wrong_number_of_arguments_is_refused(calls):
    with pytest.raises(TypeError, match="ssterf: 1 arguments are not allowed; give 4"):
        routine.__wrapped__("sterf", np.dtype("float32"))(3)
    assert not calls


@given(
    st.tuples(*[st.integers(1, 6)] * 3),
    st.tuples(st.booleans(), st.booleans()),
    st.sampled_from(DTYPES),
)
@settings(max_examples=50)
def test_a_product_of_matrices_in_either_order_is_the_product(sizes, by_row, dtype):
    (m, n, k), rng = sizes, np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(dtype) for shape in ((m, k), (k, n)))
    c = np.empty((m, n), dtype, "F")
    given = [
        np.asarray(x, order="C" if rows else "F") for x, rows in zip((a, b), by_row, strict=True)
    ]
    how = ["T" if rows else "N" for rows in by_row]
    steps = [x.shape[1] if rows else x.shape[0] for x, rows in zip(given, by_row, strict=True)]
    routine("gemm", a.dtype)(*how, m, n, k, 1.0, given[0], steps[0], given[1], steps[1], 0.0, c, m)
    np.testing.assert_allclose(c, a @ b, rtol=1e-4, atol=1e-5)
