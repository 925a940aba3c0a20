"""Wrong arguments of the library: one error that says what was given and what is allowed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lowrank_jax as lr
from lowrank_jax import Plan, Separable
from lowrank_jax.io.weights import load_weights, save_weights

MODEL, X = nn.Sequential([nn.Conv(8, (3, 3)), nn.Conv(8, (3, 3))]), jnp.ones((4, 8, 8, 3))
SHAPES = jax.eval_shape(MODEL.init, jax.random.key(0), X)
V = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), SHAPES)
K = np.random.default_rng(0).standard_normal((3, 3, 4, 8)).astype(np.float32)
CONV = nn.Conv(8, (3, 3)).apply


def layer(kernel):
    return lr.decompose({"a": {"kernel": kernel}}, {"a": 2})


def factors(dtype="float32", **more):
    one, two = jnp.ones((3, 1, 3, 2), dtype), jnp.ones((1, 3, 2, 8), dtype)
    kernel = {"vertical": one, "horizontal": two, **more}
    return {"params": {"kernel": kernel, "bias": jnp.ones(8)}}


def structured(x):
    return np.zeros(x.shape, [("a", "f4")])


CASES = {
    "a tree of None": (lambda: lr.decompose(None, {"a": 2}), "there are no layers"),
    "an array as a tree": (lambda: lr.decompose(K, {"a": 2}), "'a' matches no layer"),
    "no table": (lambda: lr.decompose(V, None), "There is no table of ranks"),
    "a list as a table": (lambda: lr.decompose(V, [2]), "A list is no table of ranks"),
    "a name as a table": (lambda: lr.decompose(V, "layers_0"), "A str is no table of ranks"),
    "a number as a trace": (lambda: lr.decompose(V, {"layers_0": 2}, trace=3), "trace=3 is not"),
    "a float of 128 bits": (lambda: layer(K.astype(np.longdouble)), "allowed are float16"),
    "a float of 8 bits": (
        lambda: layer(K.astype(jnp.float8_e4m3fn)),
        "type float8_e4m3fn",
    ),
    "codes": (lambda: layer(K.astype("int8")), "a: the kernel has type int8; allowed are"),
    "a complex kernel": (lambda: layer(K.astype("complex64")), "type complex64; allowed are"),
    "objects": (lambda: layer(K.astype(object)), "type object; allowed are"),
    "NaN": (lambda: layer(K * np.nan), "holds NaN or infinite values"),
    "ints to factor": (lambda: Separable(2).factor(K.astype(int)), "the kernel has type int"),
    "None to factor": (lambda: Separable(2).factor(None), "the kernel is a NoneType"),
    "a spectrum of None": (lambda: lr.spectrum(None), "spectrum: the kernel is a NoneType"),
    "a spectrum of ints": (lambda: lr.spectrum(K.astype(int)), "the kernel has type int64"),
    "a short shape": (lambda: lr.max_rank((3, 3)), "has fewer axes than axes='HWIO'"),
    "groups that do not divide": (lambda: lr.max_rank(K.shape, 3), "max_rank: groups=3 is not"),
    "no groups": (lambda: lr.spectrum(K, 0), "spectrum: groups=0 is not allowed; give an int of 1"),
    "a matrix as HWIO": (lambda: lr.spectrum(K[0, 0]), "spectrum: a kernel of shape (4, 8) has"),
    "a layout without outputs": (lambda: lr.spectrum(K, axes="HW"), "axes='HW' is not allowed"),
    "an unknown layout": (lambda: lr.max_rank(K.shape, axes="XYZW"), "axes='XYZW' is not allowed"),
    "factors of no layout": (
        lambda: lr.merge(jnp.ones((3, 1, 4, 2)), jnp.ones((1, 3, 2, 8)), "HWIX"),
        "do not fit together in the layout axes='HWIX'",
    ),
    "lists to merge": (
        lambda: lr.merge([1.0], [2.0]),
        "merge: the kernel is a list; give an array",
    ),
    "stacks of two sizes": (
        lambda: lr.merge(jnp.ones((4, 3, 1, 4, 2)), jnp.ones((5, 1, 3, 2, 8))),
        "do not fit together",
    ),
    "two kernels": (lambda: lr.merge(K, jnp.ones((3, 3, 8, 2))), "merge: factors of shapes (3, 3,"),
    "other ranks": (
        lambda: lr.merge(jnp.ones((3, 1, 4, 6)), jnp.ones((1, 3, 7, 2))),
        "do not fit together",
    ),
    "a bias among factors": (
        lambda: lr.reconstruct(factors(bias=jnp.ones(8))),
        "kernel: beside the factors 'vertical' and 'horizontal' there is 'bias'",
    ),
    "a bias among factors that run": (
        lambda: lr.lowrank(CONV)(factors(bias=jnp.ones(8)), X),
        "kernel: beside the factors 'vertical' and 'horizontal' there is 'bias'",
    ),
    "factors of ints": (lambda: lr.lowrank(CONV)(factors(int), X), "types int32 and int32 are not"),
    "factors of flags": (lambda: lr.lowrank(CONV)(factors(bool), X), "types bool and bool are not"),
    "complex factors": (lambda: lr.reconstruct(factors("complex64")), "complex64 are not allowed"),
    "a number as a function": (lambda: lr.lowrank(3), "apply=3 is not allowed; give a function"),
    "a module as a function": (lambda: lr.calibrate(MODEL, V, X), "give its method, as in model"),
    "a trace of a number": (lambda: lr.trace(3, V, X), "apply=3 is not allowed; give a function"),
    "a trace of nothing": (lambda: lr.trace(MODEL.apply, None, X), "variables=None is not allowed"),
    "no variables": (lambda: lr.calibrate(MODEL.apply, None, X), "variables=None is not allowed"),
    "no inputs": (lambda: lr.calibrate(MODEL.apply, V, None), "No calibration data"),
    "no images": (lambda: lr.calibrate(MODEL.apply, V, X[:0]), "No calibration data"),
    "no batches": (lambda: lr.calibrate(MODEL.apply, V, []), "No calibration data"),
    "no rows": (lambda: lr.calibrate(MODEL.apply, V, X[:, :0]), "No calibration data"),
    "complex images": (lambda: lr.calibrate(MODEL.apply, V, X + 1j), "type complex64; give arrays"),
    "fields": (lambda: lr.calibrate(MODEL.apply, V, structured(X)), "give arrays of real numbers"),
    "a name as images": (lambda: lr.calibrate(MODEL.apply, V, "x"), "give arrays of real numbers"),
    "an unknown budget": (lambda: lr.plan(MODEL.apply, V, X, flops=0.5), "got none of these"),
    "two budgets": (
        lambda: lr.plan(MODEL.apply, V, X, macs=0.5, bytes=0.5),
        "got macs and bytes",
    ),
    "a plan of nothing": (lambda: lr.plan(None, macs=0.5), "apply=None is not allowed"),
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_arguments(name):
    call, message = CASES[name]
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "msgpack"])
@pytest.mark.parametrize("tree", [None, [K], K, "x"])
def test_what_is_no_tree_is_not_written(suffix, tree, tmp_path):
    with pytest.raises(ValueError, match="is no tree of names; give a mapping"):
        save_weights(tmp_path / f"x.{suffix}", tree)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">f2"])
def test_kernels_of_another_byte_order_are_decomposed(dtype):
    small, wanted = layer(K.astype(dtype)), layer(K.astype(dtype).astype(dtype.replace(">", "<")))
    np.testing.assert_array_equal(*(tree["a"]["kernel"]["vertical"] for tree in (small, wanted)))


def test_any_name_survives_in_a_file(tmp_path):
    save_weights(tmp_path / "x.npz", {"file": K})
    np.testing.assert_array_equal(load_weights(tmp_path / "x.npz")["file"], K)


@pytest.mark.parametrize("content", [b"[" * 100_000, bytes(range(256)) * 1000, b'{"version": 2}'])
def test_what_is_no_plan_is_refused_in_one_line(content, tmp_path):
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"plan.json is no whole plan") as error:
        Plan.load(tmp_path / "plan.json")
    assert len(str(error.value)) < 500
