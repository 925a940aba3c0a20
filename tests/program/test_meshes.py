"""Decomposition and low-rank programs on meshes of eight simulated devices, in one process of
their own."""

import json
import subprocess
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_jax as lr

NHWC = ("NHWC", "HWIO", "NHWC")
RANK = 3
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def conv(x, kernel, **options):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=NHWC, **options
    )


def layer(p, x):
    return jnp.tanh(conv(x, p["kernel"]) + p["bias"])


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(KINDS[kind],) * 2)


def params():
    return {"kernel": jnp.asarray(normal(3, 3, 4, 8) / 6), "bias": jnp.asarray(normal(8))}


def expected(x, rank=RANK):
    """What one device gives."""
    tree = params()
    return layer(lr.reconstruct(lr.decompose(tree, {"kernel": rank})), x)


def assert_same(found, wanted):
    """Float32 sums of some dozens of terms of the order of 1, in another order."""
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), atol=1e-4)


def put(mesh, tree, kernel=P(), bias=P()):  # noqa: B008
    specs = {"kernel": kernel, "bias": bias}
    return jax.device_put(tree, {name: NamedSharding(mesh, spec) for name, spec in specs.items()})


X = normal(8, 6, 6, 4)


def case_kernels_on_a_mesh_are_decomposed(kind):
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        for spec in (
            P(),
            P(None, None, None, "model"),
            P(None, None, "data"),
            P(None, None, "data", "model"),
        ):
            tree = put(mesh, params(), spec)
            small = lr.decompose(tree, {"kernel": RANK})
            dense = lr.reconstruct(small)["kernel"]
            plain = lr.reconstruct(lr.decompose(params(), {"kernel": RANK}))["kernel"]
            assert_same(dense, plain)
            assert_same(lr.spectrum(tree["kernel"]), lr.spectrum(params()["kernel"]))
            jitted = jax.jit(lambda t: lr.reconstruct(lr.decompose(t, {"kernel": RANK})))(tree)
            assert_same(jitted["kernel"], plain)
            factors = small["kernel"]
            want = tree["kernel"].sharding.spec
            pad = (*want, *[None] * (4 - len(want)))
            specs = {name: (*f.sharding.spec, *[None] * 4)[:4] for name, f in factors.items()}
            assert specs["vertical"] == (None, None, pad[2], None)
            assert specs["horizontal"] == (None, None, None, pad[3])


def case_data_parallel(kind):
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        small = lr.decompose(put(mesh, params()), {"kernel": RANK})
        x = jax.device_put(X, NamedSharding(mesh, P("data")))
        for run in (lr.lowrank(layer), jax.jit(lr.lowrank(layer)), lr.lowrank(jax.jit(layer))):
            y = run(small, x)
            assert y.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 4)
            assert_same(y, expected(X))
        slopes = jax.jit(jax.grad(lambda s, x: lr.lowrank(layer)(s, x).sum()))(small, x)
        plain = jax.grad(lambda s: lr.lowrank(layer)(s, X).sum())(jax.device_get(small))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), slopes, plain)


def case_kernels_gathered_before_use(kind):
    mesh = mesh_of(kind)

    def apply(p, x):
        whole = NamedSharding(mesh, P())
        if kind == "explicit":
            kernel = jax.sharding.reshard(p["kernel"], whole)
        else:
            kernel = jax.lax.with_sharding_constraint(p["kernel"], whole)
        return layer({**p, "kernel": kernel}, x)

    with jax.set_mesh(mesh):
        tree = put(mesh, params(), P(None, None, None, "model"))
        small = lr.decompose(tree, {"kernel": RANK})
        assert lr.trace(apply, tree, X).safe_paths() == ["kernel"]
        x = jax.device_put(X, NamedSharding(mesh, P("data")))
        assert_same(jax.jit(lr.lowrank(apply))(small, x), expected(X))
        assert_same(lr.lowrank(apply)(small, x), expected(X))


def case_kernels_put_on_devices_by_the_function(kind):
    mesh = mesh_of(kind)

    def apply(p, x):
        p, x = jax.device_put((p, x), NamedSharding(mesh, P()))
        return layer(p, x)

    small = lr.decompose(params(), {"kernel": RANK})
    assert_same(lr.lowrank(apply)(small, X), expected(X))
    host = jax.tree.map(np.asarray, small)  # arrays of no device, which jax.jit may put anywhere
    assert_same(jax.jit(lr.lowrank(apply))(host, X), expected(X))
    other = jax.devices()[3]

    def move(p, x):
        return layer(jax.device_put(p, other), jax.device_put(x, other))

    y = lr.lowrank(move)(small, X)
    assert y.devices() == {other}
    assert_same(y, expected(X))


def case_jit_with_shardings(kind):
    mesh = mesh_of(kind)
    spec = NamedSharding(mesh, P(None, None, None, "model"))
    data = NamedSharding(mesh, P("data"))
    ins = ({"kernel": spec, "bias": NamedSharding(mesh, P())}, data)

    def apply(p, x):
        return p, layer({**p, "kernel": 1 * p["kernel"]} if kind == "mixed" else p, x)

    with jax.set_mesh(mesh):
        inner = jax.jit(apply, in_shardings=ins, out_shardings=(ins[0], data))
        if kind == "explicit":  # its kernel is sharded by type; it is gathered for the layer
            inner = jax.jit(lambda p, x: (p, layer(p, x)), out_shardings=(None, data))
            small = lr.decompose(put(mesh, params()), {"kernel": RANK})
        else:
            small = lr.decompose(params(), {"kernel": RANK})
        x = jax.device_put(X, data)
        for run in (lr.lowrank(inner), jax.jit(lr.lowrank(inner))):
            tree, y = run(small, x)
            assert_same(y, expected(X))
            assert set(tree["kernel"]) == {"vertical", "horizontal"}


def case_shard_map_with_whole_kernels(kind):
    mesh = mesh_of(kind)

    def apply(p, x):
        run = jax.shard_map(layer, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
        return run(p, x)

    with jax.set_mesh(mesh):
        small = lr.decompose(put(mesh, params()), {"kernel": RANK})
        x = jax.device_put(X, NamedSharding(mesh, P("data")))
        assert lr.trace(apply, put(mesh, params()), x).safe_paths() == ["kernel"]
        assert_same(jax.jit(lr.lowrank(apply))(small, x), expected(X))
        count = str(jax.make_jaxpr(lr.lowrank(apply))(small, x)).count("conv_general_dilated[")
        assert count == 2

        def loss(run):
            return lambda s: jnp.sum(run(s, x))

        found = jax.jit(jax.grad(loss(lr.lowrank(apply))))(small)
        plain = jax.grad(lambda s: lr.lowrank(layer)(s, X).sum())(jax.device_get(small))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), found, plain)


def case_shard_map_with_parts_of_kernels(kind):
    mesh = mesh_of(kind)

    def apply(p, x):
        specs = ({"kernel": P(None, None, None, "model"), "bias": P("model")}, P("data"))
        run = jax.shard_map(
            layer, mesh=mesh, in_specs=specs, out_specs=P("data", None, None, "model")
        )
        return run(p, x)

    with jax.set_mesh(mesh):
        tree = put(mesh, params())
        if kind == "explicit":
            tree = put(mesh, params(), P(None, None, None, "model"), P("model"))
        small = lr.decompose(tree, {"kernel": RANK})
        x = jax.device_put(X, NamedSharding(mesh, P("data")))
        (use,) = lr.trace(apply, tree, x)
        assert "shard_map" in use.reason, use.reason
        assert_same(jax.jit(lr.lowrank(apply))(small, x), expected(X))


def case_summed_only_where_it_is_sharded(kind):
    """A kernel that runs whole outside, and of which each device sums a part."""
    mesh = mesh_of(kind)

    def apply(p, x):
        parts = jax.shard_map(
            lambda k: jax.lax.psum(k.sum(), "model"),
            mesh=mesh,
            in_specs=P(None, None, None, "model"),
            out_specs=P(),
        )
        kernel = p["kernel"]
        if kind == "explicit":
            kernel = jax.sharding.reshard(kernel, P(None, None, None, "model"))
        return layer(p, x) + parts(kernel)

    with jax.set_mesh(mesh):
        small = lr.decompose(put(mesh, params()), {"kernel": RANK})
        total = float(np.asarray(lr.reconstruct(small)["kernel"]).sum())
        assert_same(jax.jit(lr.lowrank(apply))(small, jnp.asarray(X)), expected(X) + total)


def case_a_boxed_linen_model(kind):
    mesh = mesh_of(kind)
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None, None, "model"))
    model = nn.Conv(8, (3, 3), kernel_init=init)
    variables = model.init(jax.random.key(0), X)
    small = jax.tree.map(np.asarray, lr.decompose(variables, {"kernel": 12}))
    with jax.set_mesh(mesh) if kind == "auto" else jax.set_mesh(mesh_of("auto")):
        found = jax.jit(lr.lowrank(model.apply))(small, X)
    assert_same(found, model.apply(variables, X))


CASES = [
    f"{name.removeprefix('case_')}-{kind}"
    for name in list(globals())
    if name.startswith("case_")
    for kind in KINDS
]


def run_all():
    """Name of each case to what went wrong; "" if nothing did."""
    results = {}
    for name in CASES:
        case, kind = name.split("-")
        try:
            globals()[f"case_{case}"](kind)
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc(limit=-4)
    return results


@pytest.fixture(scope="module")
def results(devices):
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=devices(8), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_on_a_mesh(name, results):
    assert not results[name], results[name]


if __name__ == "__main__":
    print(json.dumps(run_all()))
