"""`lowrank(f)` is a function like any other: under every transformation of JAX, and with every
construct of JAX inside, it is `f` of the reconstructed tree."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.ad_checkpoint import checkpoint_name

from lowrank_jax import decompose, lowrank, reconstruct, trace
from lowrank_jax.program.jaxprs import programs

NHWC = ("NHWC", "HWIO", "NHWC")


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


X = normal(2, 6, 5, 4, seed=1)
DENSE = {"kernel": normal(3, 3, 4, 4) / 4, "bias": normal(4, seed=2)}
STACK = {"kernel": normal(3, 3, 3, 4, 4) / 4, "bias": normal(3, 4, seed=2)}
SMALL, SMALL_STACK = decompose(DENSE, {"kernel": 3}), decompose(STACK, {"kernel": 3})


def conv(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC)


def layer(p, x):
    return jnp.tanh(conv(x, p["kernel"]) + p["bias"])


def equations(program):
    for eqn in program.eqns:
        yield eqn
        for inner in programs(eqn.params):
            yield from equations(inner)


def operations(function, *args):
    eqns = equations(jax.make_jaxpr(function)(*args).jaxpr)
    return Counter(eqn.primitive.name for eqn in eqns)


def assert_same(found, expected):
    """Sums of some dozens of terms of the order of 1 in float32, in another order."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert jnp.shape(one) == jnp.shape(two)
        np.testing.assert_allclose(one, two, atol=2e-5 * max(1, float(jnp.abs(two).max())))


def assert_equivalent(function, small=SMALL, x=X):
    """Values and derivatives, compiled together."""

    def run(apply, tree, x):
        y, pullback = jax.vjp(apply, tree, x)
        return y, pullback(jax.tree.map(jnp.cos, y))

    def both(small, x):
        rebuilt = lambda tree, x: function(reconstruct(tree), x)  # noqa: E731
        return run(lowrank(function), small, x), run(rebuilt, small, x)

    assert_same(*jax.jit(both)(small, x))


@jax.custom_jvp
def own_conv(x, kernel):
    return conv(x, kernel)


@own_conv.defjvp
def _(primals, tangents):
    (x, kernel), (dx, dk) = primals, tangents
    return conv(x, kernel), conv(dx, kernel) + conv(x, dk)


@jax.custom_vjp
def clipped(kernel):
    """The kernel itself, with a gradient of its own."""
    return kernel * 1


clipped.defvjp(lambda kernel: (kernel * 1, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


@jax.custom_vjp
def passed(kernel):
    return kernel


passed.defvjp(lambda kernel: (kernel, None), lambda _, g: (2 * g,))


def remat(p, x, **options):
    return jax.checkpoint(layer, **options)(p, x)


def saved_by_name(p, x):
    kernel = checkpoint_name(p["kernel"], "kernel")
    return layer({**p, "kernel": kernel}, x)


def only_kernels(p, x):
    policy = jax.checkpoint_policies.save_only_these_names("kernel")
    return jax.checkpoint(saved_by_name, policy=policy)(p, x)


def shared_scan(p, x):
    return jax.lax.scan(lambda x, _: (layer(p, x), x.mean()), x, None, 3)


def nested_scan(p, x):
    def outer(x, scale):
        return jax.lax.scan(lambda x, s: (layer(p, s * x), None), x, scale)[0], x.sum()

    return jax.lax.scan(outer, x, jnp.ones((2, 2)))


def counted(p, x):
    """A ``while`` has no derivative backwards."""
    state = (0, jax.lax.stop_gradient(x))
    fixed = jax.lax.stop_gradient(p)
    return jax.lax.while_loop(
        lambda s: (s[0] < 3) & (layer(fixed, s[1]).mean() < 9),
        lambda s: (s[0] + 1, layer(fixed, s[1])),
        state,
    )[1]


def branched(p, x):
    return jax.lax.cond(x.sum() > 0, lambda: layer(p, x), lambda: 2 * layer(p, -x))


def switched(p, x):
    branches = [lambda p, x: x, layer, lambda p, x: layer(p, layer(p, x))]
    return jax.lax.switch(jnp.int32(2) + 0 * x.astype(int).max(), branches, p, x)


def one_branch_reads(p, x):
    return jax.lax.cond(x.sum() > 0, lambda k: conv(x, k), lambda k: x * 2, p["kernel"])


def called_twice(p, x):
    again = jax.jit(layer)
    return again(p, again(p, x))


def derived(p, x):
    """A program that holds a derivative: convolutions with the kernel turned round."""
    return jax.grad(lambda x: layer(p, x).sum())(x)


def pushed(p, x):
    return jax.jvp(lambda x: layer(p, x), (x,), (x,))


def by_platform(p, x):
    return jax.lax.platform_dependent(x, cpu=lambda x: layer(p, x), default=lambda x: layer(p, x))


FACTORED = {
    "jit": lambda p, x: jax.jit(layer)(p, x),
    "jit of a part": lambda p, x: layer({**p, "kernel": jax.jit(lambda k: k)(p["kernel"])}, x),
    "called twice": called_twice,
    "remat": remat,
    "remat with a policy": only_kernels,
    "scan, shared": shared_scan,
    "nested scans": nested_scan,
    "while": counted,
    "cond": branched,
    "cond, in one branch": one_branch_reads,
    "switch": switched,
    "custom_jvp": lambda p, x: own_conv(x, p["kernel"]),
    "a derivative inside": derived,
    "a directional derivative inside": pushed,
    "vmap inside": lambda p, x: jax.vmap(lambda x: layer(p, x[None])[0])(x),
    "remat in scan": lambda p, x: jax.lax.scan(lambda x, _: (remat(p, x), None), x, None, 2)[0],
    "platform": by_platform,
}
BACK = {
    "mask": lambda p, x: conv(x, p["kernel"] * (jnp.arange(3) < 2)[:, None, None, None]),
    "standardised": lambda p, x: conv(x, (p["kernel"] - p["kernel"].mean()) / p["kernel"].std()),
    "custom_vjp of the kernel": lambda p, x: conv(x, clipped(p["kernel"])),
    "identity with a gradient": lambda p, x: conv(x, passed(p["kernel"])),
    "both ends of a loop": lambda p, x: (
        jax.lax.fori_loop(0, 2, lambda _, k: k * 0.5, p["kernel"]).sum() * x
    ),
    "chosen by a cond": lambda p, x: conv(
        x, jax.lax.cond(x.sum() > 0, lambda k: k, lambda k: -k, p["kernel"])
    ),
    "through eight bits": lambda p, x: conv(
        x, p["kernel"].astype(jnp.float8_e4m3fn).astype(jnp.float32)
    ),
}
BOTH = {
    "also summed": lambda p, x: (layer(p, x), p["kernel"].sum()),
    "also clipped": lambda p, x: layer(p, x) + conv(x, clipped(p["kernel"])),
    "also carried": lambda p, x: (
        layer(p, x),
        jax.lax.fori_loop(0, 2, lambda _, k: k * 0.5, p["kernel"]),
    ),
    "moved and returned": lambda p, x: (layer(p, x), p["kernel"].T),
    "channel taken out": lambda p, x: (layer(p, x), conv(x, p["kernel"][..., :1, :].repeat(4, 2))),
}


@pytest.mark.parametrize("name", FACTORED)
def test_factors_run_within(name):
    """No factor is multiplied back; every convolution of the dense program is two."""
    function = FACTORED[name]
    assert_equivalent(function)
    assert trace(function, DENSE, X).safe_paths() == ["kernel"]
    dense, low = operations(function, DENSE, X), operations(lowrank(function), SMALL, X)
    assert low["conv_general_dilated"] == 2 * dense["conv_general_dilated"]
    assert low["dot_general"] == dense["dot_general"]


@pytest.mark.parametrize("name", BACK)
def test_factors_are_multiplied_back_once_before_anything_else(name):
    function = BACK[name]
    assert_equivalent(function)
    assert not any(use.safe and not use.changed for use in trace(function, DENSE, X))
    dense, low = operations(function, DENSE, X), operations(lowrank(function), SMALL, X)
    assert low["conv_general_dilated"] == dense["conv_general_dilated"]
    assert low["dot_general"] == dense["dot_general"] + 1


@pytest.mark.parametrize("name", BOTH)
def test_a_kernel_in_both_forms_is_multiplied_back_once(name):
    function = BOTH[name]
    assert_equivalent(function)
    assert trace(function, DENSE, X).safe_paths() == []
    dense, low = operations(function, DENSE, X), operations(lowrank(function), SMALL, X)
    assert low["conv_general_dilated"] == dense["conv_general_dilated"] + 1
    assert low["dot_general"] == dense["dot_general"] + 1


STACKED = {
    "scan": lambda p, x: jax.lax.scan(lambda x, p: (layer(p, x), x.mean()), x, p),
    "scan, reversed": lambda p, x: jax.lax.scan(
        lambda x, p: (layer(p, x), None), x, p, reverse=True
    )[0],
    "scan of the stack turned round": lambda p, x: jax.lax.scan(
        lambda x, p: (layer(p, x), None), x, jax.tree.map(lambda a: a[::-1], p)
    )[0],
    "scan of remat": lambda p, x: jax.lax.scan(lambda x, p: (remat(p, x), None), x, p)[0],
    "unrolled": lambda p, x: jax.lax.scan(lambda x, p: (layer(p, x), None), x, p, unroll=3)[0],
    "indices": lambda p, x: layer(jax.tree.map(lambda a: a[2], p), layer({**p, **FIRST(p)}, x)),
    "vmap": lambda p, x: jax.vmap(layer, (0, None))(p, x),
    "map": lambda p, x: jax.lax.map(lambda p: layer(p, x), p),
}


def FIRST(p):
    return jax.tree.map(lambda a: a[0], p)


@pytest.mark.parametrize("name", STACKED)
def test_factors_of_a_stack_run_within(name):
    function = STACKED[name]
    assert_equivalent(function, SMALL_STACK)
    assert trace(function, STACK, X).safe_paths() == ["kernel"]
    dense, low = operations(function, STACK, X), operations(lowrank(function), SMALL_STACK, X)
    assert low["conv_general_dilated"] == 2 * dense["conv_general_dilated"]


def test_a_stack_indexed_by_a_loop_is_multiplied_back_before_the_loop():
    def apply(p, x):
        def body(index, x):
            return layer(jax.tree.map(lambda a: a[index], p), x)

        return jax.lax.fori_loop(0, 3, body, x)

    assert_equivalent(apply, SMALL_STACK)
    assert "computed by the program" in trace(apply, STACK, X)[0].reason
    outside = [eqn.primitive.name for eqn in jax.make_jaxpr(lowrank(apply))(SMALL_STACK, X).eqns]
    assert outside.index("dot_general") < outside.index("scan")


def test_a_stack_of_stacks_is_scanned_twice():
    tree = {"kernel": normal(2, 2, 3, 3, 4, 4) / 4, "bias": normal(2, 2, 4)}

    def apply(p, x):
        def inner(x, p):
            return jax.lax.scan(lambda x, p: (layer(p, x), None), x, p)[0], None

        return jax.lax.scan(inner, x, p)[0]

    assert_equivalent(apply, decompose(tree, {"kernel": 3}))
    assert trace(apply, tree, X).safe_paths() == ["kernel"]


def test_a_scan_over_the_taps_of_a_kernel_multiplies_back():
    def apply(p, x):
        def row(total, taps):
            return total + jnp.einsum("bhwc,wcn->bhn", x[:, :, :3], taps), None

        return jax.lax.scan(row, jnp.zeros((2, 6, 4)), p["kernel"])[0]

    assert_equivalent(apply)


@pytest.mark.parametrize("trees, x", [(None, 0), (0, None), (0, 0)])
def test_under_vmap(trees, x):
    tree = jax.tree.map(lambda a: jnp.stack([a, -a]), SMALL) if trees == 0 else SMALL
    data = X if x is None else jnp.stack([X, 2 * X])
    mapped = [
        jax.vmap(f, (trees, x))
        for f in (lowrank(layer), lambda tree, x: layer(reconstruct(tree), x))
    ]
    assert_same(mapped[0](tree, data), mapped[1](tree, data))


def test_under_remat_scan_and_second_derivatives():
    def loss(apply, tree):
        steps = jax.lax.scan(lambda x, _: (jax.checkpoint(apply)(tree, x), None), X, None, 2)[0]
        return jnp.sum(steps**2)

    def curvature(apply):
        slope = jax.grad(functools.partial(loss, apply))
        return jax.jvp(slope, (SMALL,), (SMALL,))

    found, expected = (
        jax.jit(curvature, static_argnums=0)(f)
        for f in (lowrank(layer), lambda tree, x: layer(reconstruct(tree), x))
    )
    assert_same(found, expected)


def test_the_derivative_of_the_user_holds_where_no_factor_enters():
    def apply(p, x):
        return conv(x, clipped(p["kernel"])).sum() + conv(x, p["kernel"]).sum()

    def clipped_only(k):
        return conv(X, clipped(k)).sum()

    slope = jax.grad(lowrank(clipped_only))(SMALL["kernel"])
    expected = jax.grad(lambda pair: clipped_only(reconstruct(pair)))(SMALL["kernel"])
    assert_same(slope, expected)
    assert operations(lowrank(apply), SMALL, X)["custom_vjp_call"] == 1


@pytest.mark.parametrize("polymorphic", [False, True])
def test_it_can_be_exported_saved_and_called(polymorphic):
    x = jax.ShapeDtypeStruct(
        (*export.symbolic_shape("b"), *X.shape[1:]) if polymorphic else X.shape, X.dtype
    )
    exported = export.export(jax.jit(lowrank(layer)))(SMALL, x)
    expected = layer(reconstruct(SMALL), X)
    assert_same(exported.call(SMALL, X), expected)
    pytest.importorskip("flatbuffers")  # jax needs it to serialise
    assert_same(export.deserialize(exported.serialize()).call(SMALL, X), expected)


def test_an_exported_function_is_multiplied_back():
    call = export.export(jax.jit(layer))(DENSE, X).call
    assert_same(lowrank(call)(SMALL, X), layer(reconstruct(SMALL), X))
    assert trace(call, DENSE, X).safe_paths() == []


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_arguments_may_be_donated(where):
    donated = jax.tree.map(jnp.copy, SMALL)

    def apply(tree, x):
        return {**tree, "bias": tree["bias"] + 1}, layer(tree, x)

    if where == "outside":
        run = jax.jit(lowrank(apply), donate_argnums=0)
    else:
        run = lowrank(jax.jit(apply, donate_argnums=0))
    new, y = run(donated, X)
    assert_same(y, layer(reconstruct(SMALL), X))
    assert_same(new, {**SMALL, "bias": SMALL["bias"] + 1})
    assert donated["bias"].is_deleted()


def test_effects_happen_once_and_in_order(capfd):
    def apply(p, x):
        jax.debug.print("start", ordered=True)

        def body(x, index):
            jax.debug.print("layer {}", index, ordered=True)
            return layer(p, x), None

        x, _ = jax.lax.scan(body, x, jnp.arange(2))
        jax.lax.cond(True, lambda k: jax.debug.print("branch", ordered=True), lambda k: None, p)
        jax.jit(lambda p: jax.debug.print("call", ordered=True))(p)
        return layer(p, x)

    for run in (lowrank(apply), jax.jit(lowrank(apply))):
        run(SMALL, X).block_until_ready()
        jax.effects_barrier()
        assert capfd.readouterr().out.split("\n")[:-1] == [
            "start", "layer 0", "layer 1", "branch", "call"
        ]  # fmt: skip


def test_a_callback_gets_the_values_of_the_dense_program():
    seen_values = []

    def apply(p, x):
        jax.debug.callback(lambda k: seen_values.append(np.asarray(k)), p["kernel"])
        return layer(p, x)

    jax.jit(lowrank(apply))(SMALL, X).block_until_ready()
    jax.effects_barrier()
    np.testing.assert_allclose(seen_values[0], reconstruct(SMALL)["kernel"], atol=1e-6)


def test_named_scopes_stay():
    def apply(p, x):
        with jax.named_scope("outer"):
            return jax.jit(jax.named_scope("inner")(layer))(p, x)

    text = jax.jit(lowrank(apply)).lower(SMALL, X).as_text(debug_info=True)
    dense = jax.jit(apply).lower(DENSE, X).as_text(debug_info=True)
    for program in (text, dense):
        assert "outer" in program and "inner/conv_general_dilated" in program


def test_what_is_no_array_stays_as_it_is():
    def apply(tree, x, mode, *, scale, label=None, train=np.True_):
        assert mode in ("sum", "mean") and isinstance(scale, float) and label is None
        y = layer(tree["net"], x)
        y = (y.sum() if mode == "sum" else y.mean()) * (scale if train else 0)
        return {"y": y, "mode": mode, "none": None, "count": 3, "name": tree["name"]}

    found = lowrank(apply)({"net": SMALL, "name": "net"}, X, "sum", scale=2.0)
    expected = 2 * layer(reconstruct(SMALL), X).sum()
    assert found["y"] == pytest.approx(float(expected), rel=1e-4)  # a float32 sum of 240 terms
    rest = {key: value for key, value in found.items() if key != "y"}
    assert rest == {"mode": "sum", "none": None, "count": 3, "name": "net"}


def test_functions_of_two_trees_tell_them_apart():
    other = decompose(jax.tree.map(lambda a: -2 * a, DENSE), {"kernel": 2})

    def apply(one, two, x, *, three):
        return layer(one, layer(two, layer(three, x)))

    found = lowrank(apply)(SMALL, other, X, three=SMALL)
    expected = apply(reconstruct(SMALL), reconstruct(other), X, three=reconstruct(SMALL))
    assert_same(found, expected)
    assert operations(lambda *a: lowrank(apply)(*a, three=SMALL), SMALL, other, X)[
        "conv_general_dilated"
    ] == 6  # fmt: skip
    kernels = lowrank(lambda a, b, x: conv(conv(x, a), b))(SMALL["kernel"], other["kernel"], X)
    expected = conv(conv(X, reconstruct(SMALL["kernel"])), reconstruct(other["kernel"]))
    assert_same(kernels, expected)


def test_two_kernels_that_meet_in_a_product():
    tree = {"a": SMALL["kernel"], "b": decompose(DENSE, {"kernel": 2})["kernel"]}

    def apply(p, x):
        gram = jnp.einsum("hwio,hwip->op", p["a"], p["a"])
        return gram, jnp.einsum("hwio,hwop->ip", p["a"], p["b"]), conv(x, p["b"])

    assert_equivalent(apply, tree)


def test_a_compiled_function_is_not_compiled_anew_at_each_call(caplog):
    calls = []

    @jax.jit
    def apply(p, x):
        calls.append(x.shape)
        return layer(p, x)

    def compiled():
        caplog.clear()
        with jax.log_compiles():
            run(SMALL, X)
        return [r for r in caplog.records if r.getMessage().startswith("Compiling")]

    run = lowrank(apply)
    assert compiled() and not compiled() and len(calls) == 1


def test_a_function_without_factors_is_left_alone():
    assert str(jax.make_jaxpr(lowrank(layer))(DENSE, X)) == str(jax.make_jaxpr(layer)(DENSE, X))
    assert lowrank(layer).__name__ == "layer" and lowrank(lambda: 3)() == 3


def test_a_kernel_that_is_returned_as_it_came_is_still_factors():
    def apply(p, x):
        return p, jax.jit(lambda p: p)(p), layer(p, x)

    for function in (apply, lambda p, x: (p, p, BACK["mask"](p, x))):
        one, two, y = lowrank(function)(SMALL, X)
        assert_same((one, two), (SMALL, SMALL))
        assert_same(y, function(reconstruct(SMALL), X)[2])


def test_lowrank_of_lowrank_is_lowrank():
    assert_same(lowrank(lowrank(layer))(SMALL, X), lowrank(layer)(SMALL, X))
    outer = lowrank(lambda p, x: lowrank(layer)(p, x) * 2)
    assert_same(outer(SMALL, X), 2 * layer(reconstruct(SMALL), X))


def test_it_may_be_called_within_a_function_whose_values_it_closes_over():
    def loss(scale, tree):
        return lowrank(lambda p, x: layer(p, scale * x))(tree, X).sum()

    found = jax.grad(loss)(2.0, SMALL)
    expected = jax.grad(lambda s: layer(reconstruct(SMALL), s * X).sum())(2.0)
    assert found == pytest.approx(float(expected), abs=1e-3)  # a float32 sum of 240 terms
