"""`fast`: candidates are tried in order, and the fastest with the outputs of most is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lowrank_jax as lr
from lowrank_jax.program.compiler import candidate_options
from lowrank_jax.tuning import autotune, search
from lowrank_jax.tuning.agreement import agree
from lowrank_jax.tuning.algorithms import PLAIN
from lowrank_jax.tuning.search import fast
from lowrank_jax.tuning.timer import Timer

pytestmark = pytest.mark.slow  # what `fast` finds is searched for seconds in each

FIRST = "default options, all at once"


class Net(nn.Module):
    """Two convolutions and a batch normalisation, and an argument that has to be given."""

    @nn.compact
    def __call__(self, x, scale=1.0, *, train):
        x = nn.relu(nn.BatchNorm(not train)(nn.Conv(8, (3, 3))(x)))
        return scale * nn.Conv(8, (5, 5), strides=2)(x).mean((1, 2))


@pytest.fixture(scope="module")
def net():
    model, images = Net(), jax.random.normal(jax.random.key(1), (6, 8, 8, 4))
    variables = model.init(jax.random.key(0), images, train=False)
    params = lr.decompose(variables["params"], {"Conv_0": 2, "Conv_1": 3})
    return model, {**variables, "params": params}, images


class Named(Timer):
    """Finds these algorithms the fastest without measuring."""

    dense, low = "im2col", "kn2row+im2col"

    def fastest(self, layer, scheme):
        return self.dense if scheme is None else self.low


class Usual(Named):
    dense, low = "convolve", PLAIN


@pytest.fixture
def order(monkeypatch):
    """Makes the times up: the candidate that is named is the fastest, others as they come."""
    fastest = [""]

    def made(calls, rounds, least, seconds):
        return {name: 1.0 + i / 100 - (name == fastest[0]) / 2 for i, name in enumerate(calls)}

    monkeypatch.setattr(autotune, "measure", made)
    return fastest


def run_of(net, **options):
    model, small, images = net
    given = {"slices": (2,), "timers": Named, "rounds": 2, "train": False} | options
    return fast(model.apply, small, images, **given)


def wanted(net, *args):
    model, small, images = net
    return lr.lowrank(model.apply)(small, images, *args, train=False)


def test_it_measures_and_runs_any_batch(net):
    _, small, images = net
    run = run_of(net, timers=lambda options: Timer(options, rounds=2))
    np.testing.assert_allclose(run(small, images), wanted(net), atol=1e-5)
    np.testing.assert_allclose(run(small, images[:3]), wanted(net)[:3], atol=1e-5)
    assert run.seconds[str(run.candidate)] == min(run.seconds.values())
    assert FIRST in run.seconds and "default options, slices of 2" in run.seconds


@pytest.mark.parametrize("name", [FIRST, f"{FIRST}, algorithms", "default options, slices of 2"])
def test_the_fastest_is_kept_and_everything_that_was_tried_is_told(net, order, name):
    order[0] = name
    run = run_of(net)
    assert str(run.candidate) == name and run.left_out == {}
    assert run.size == (2 if "slices" in name else None) and run.options == {}
    plain = {name for name in run.seconds if "algorithms" not in name}
    assert len(plain) == 2 * len(candidate_options())
    names = set(run.algorithms.values())
    assert names == ({"kn2row+im2col"} if "algorithms" in name else set())


def test_layers_that_differ_in_the_batch_alone_are_measured_once_for_each_set_of_options(
    net, order
):
    asked: dict[int, list] = {}

    class Asked(Named):
        def fastest(self, layer, scheme):
            asked.setdefault(id(self), []).append((layer.size, scheme))
            return super().fastest(layer, scheme)

    timers: list = []
    run_of(net, slices=(2, 3), timers=lambda options: timers.append(Asked(options)) or timers[-1])
    assert len(asked) == len(candidate_options())
    assert all(len(own) == len(set(own)) == 2 for own in asked.values())


def test_options_that_cannot_win_are_not_searched_further(net, monkeypatch):
    def made(calls, rounds, least, seconds):
        return {name: 1.0 if name.startswith("default") else 10.0 for name in calls}

    monkeypatch.setattr(autotune, "measure", made)
    run = run_of(net)
    others = [name for name in run.seconds if not name.startswith("default")]
    assert all("all at once" in name and "algorithms" not in name for name in others)


@pytest.mark.parametrize("slow", [True, False])
def test_slices_are_tried_under_other_options_only_where_they_are_near(net, monkeypatch, slow):
    def made(calls, rounds, least, seconds):
        return {
            name: 9.0 if slow and "slices" in name else 1.0 + i / 100
            for i, name in enumerate(calls)
        }

    monkeypatch.setattr(autotune, "measure", made)
    found = run_of(net, timers=Usual)
    tried = [name for name in found.seconds if "slices" in name]
    assert len(tried) == (1 if slow else len(candidate_options()))


def test_plain_algorithms_are_not_a_candidate_again(net, order):
    run = run_of(net, timers=Usual, slices=())
    assert not any("algorithms" in name for name in run.seconds) and run.algorithms == {}


def test_arguments_of_the_model_are_passed_on(net, order):
    model, small, images = net
    run = fast(model.apply, small, images, 3.0, slices=(), timers=Usual, rounds=2, train=False)
    np.testing.assert_allclose(run(small, images), wanted(net, 3.0), rtol=1e-5)
    with pytest.raises(TypeError, match="train"):
        fast(model.apply, small, images, rounds=2)


def test_inputs_may_be_a_tree_of_arrays_that_are_sliced_together(net, order):
    model, small, images = net
    inputs = {"left": images, "pair": [np.asarray(images), np.arange(6.0)]}

    def apply(variables, inputs):
        other, by = inputs["pair"]
        return model.apply(variables, inputs["left"] + other * by[:, None, None, None], train=False)

    order[0] = "default options, slices of 4"
    run = fast(apply, small, inputs, slices=(4,), timers=Usual, rounds=2)
    assert run.size == 4
    np.testing.assert_allclose(run(small, inputs), lr.lowrank(apply)(small, inputs), atol=1e-5)


@pytest.mark.parametrize("size", [(), (2,)])
def test_a_frozen_network_has_its_weights_and_refuses_others(net, size, order):
    _, small, images = net
    run = run_of(net, slices=size, freeze=True)
    np.testing.assert_allclose(run(None, images), wanted(net), atol=1e-5)
    assert run(None, images[:3]).shape == (3, 8) and run.frozen
    with pytest.raises(ValueError, match=r"variables are part of this program: give None .*freeze"):
        run(small, images)


def test_the_unjitted_function_runs_within_other_programs(net, order):
    _, small, images = net
    run = run_of(net)
    found = jax.jit(lambda x: 2 * run.run.__wrapped__(small, x))(images)
    np.testing.assert_allclose(found, 2 * wanted(net), atol=1e-5)


# ---- frozen choices


class Strict(Named):
    """Measures during the search only."""

    searching = True

    def fastest(self, layer, scheme):
        assert Strict.searching, "measured within a call"
        return super().fastest(layer, scheme)

    fastest_pool = measure = None


def test_no_call_measures_whatever_its_size(net, order, monkeypatch):
    model, small, images = net
    order[0] = f"{FIRST}, algorithms"
    run = run_of(net, timers=Strict)
    Strict.searching = False
    try:
        monkeypatch.setattr(Timer, "_time", lambda *_: pytest.fail("measured within a call"))
        larger = jax.random.normal(jax.random.key(2), (3, 11, 9, 4))
        for inputs in (images, images[:1], jnp.concatenate([images] * 3), larger):
            found = lr.lowrank(model.apply)(small, inputs, train=False)
            np.testing.assert_allclose(run(small, inputs), found, atol=1e-5)
    finally:
        Strict.searching = True


def convolutions(run, *args):
    return str(jax.make_jaxpr(run.run)(*args)).count("conv_general_dilated[")


def test_another_batch_runs_by_what_was_chosen_and_another_image_by_plain_convolutions(order):
    model, images = nn.Conv(8, (3, 3), dtype=jnp.bfloat16), jnp.ones((4, 8, 8, 4))
    variables = model.init(jax.random.key(0), images)
    order[0] = f"{FIRST}, algorithms"
    run = fast(model.apply, variables, images, slices=(), timers=Named, rounds=2)
    assert convolutions(run, variables, images) == 0
    assert convolutions(run, variables, images[:1]) == 0
    assert convolutions(run, variables, jnp.ones((4, 9, 8, 4))) == 1


# ---- candidates that are left out


def test_candidates_that_change_the_outputs_are_left_out(net, order):
    model, small, images = net

    def apply(variables, images):  # statistics of the batch: slices have others
        return model.apply(variables, images, train=True, mutable=["batch_stats"])[0]

    run = fast(apply, small, images, slices=(2,), timers=Usual, rounds=2)
    assert run.size is None and not any("slices" in name for name in run.seconds)
    reasons = {reason for name, reason in run.left_out.items() if "slices" in name}
    assert reasons == {"its outputs are not those of most candidates"}


def test_a_candidate_that_fails_to_compile_is_noted_and_left_out(net, order, monkeypatch):
    options = ({"xla_no_such_option": "1"}, {})
    for module in (autotune, search):
        monkeypatch.setattr(module, "candidate_options", lambda: options)
    _, small, images = net
    run = run_of(net, timers=Usual)
    assert run.options == {} and list(run.left_out) == ["xla_no_such_option='1', all at once"]
    assert "xla_no_such_option" in next(iter(run.left_out.values()))
    np.testing.assert_allclose(run(small, images), wanted(net), atol=1e-5)


def test_a_candidate_that_fails_to_run_is_noted_and_left_out(net, order):
    model, small, images = net

    def apply(variables, images):  # takes this batch alone
        return model.apply(variables, images.reshape(6, 8, 8, 4), train=False)

    run = fast(apply, small, images, slices=(2,), timers=Usual, rounds=2)
    assert run.size is None and all("slices of 2" in name for name in run.left_out)
    assert all("TypeError" in reason for reason in run.left_out.values()) and run.left_out


def test_if_all_candidates_fail_the_error_of_the_plain_program_is_raised(net, monkeypatch):
    def fail(self, network):
        def run(*args):
            raise RuntimeError(f"out of memory: {self}")

        return run

    monkeypatch.setattr("lowrank_jax.tuning.candidate.Candidate.compiled", fail)
    with pytest.raises(RuntimeError, match=f"^out of memory: {FIRST}$"):
        run_of(net)


def test_algorithms_that_cannot_be_measured_leave_the_plain_ones(net, order):
    class Fails(Named):
        def fastest(self, layer, scheme):
            if layer.size == (5, 5):
                raise NotImplementedError("no kernel")
            return super().fastest(layer, scheme)

    order[0] = f"{FIRST}, algorithms"
    run = run_of(net, timers=Fails)
    assert [layer.size for layer, _ in run.algorithms] == [(3, 3)]
    noted = [name for name in run.left_out if "size=(5, 5)" in name]
    assert noted and all(run.left_out[name] == "NotImplementedError: no kernel" for name in noted)


# ---- the limit


def test_after_the_limit_only_the_first_candidate_is_measured_and_the_others_are_told(net):
    _, small, images = net
    run = run_of(net, limit=1e-9)
    assert list(run.seconds) == [FIRST] == [str(run.candidate)]
    assert set(run.left_out.values()) == {"the limit of 1e-09 seconds was reached"}
    np.testing.assert_allclose(run(small, images), wanted(net), atol=1e-5)


def test_the_best_until_the_limit_is_kept(net, order, monkeypatch):
    """The clock goes on by a second at each candidate's first run."""
    now = [0.0]
    monkeypatch.setattr(autotune.time, "monotonic", lambda: now[0])
    first_run = autotune.Autotuner._first_run

    def slow(self, candidate):
        now[0] += 1.0
        return first_run(self, candidate)

    monkeypatch.setattr(autotune.Autotuner, "_first_run", slow)
    count = len(candidate_options())
    run = run_of(net, limit=count + 0.5)
    assert len(run.seconds) == count + 1  # all with the whole batch, and one with slices
    assert any("algorithms" in name for name in run.left_out)


@pytest.mark.parametrize("limit", ["3s", 0, -1.0, float("nan")])
def test_a_limit_that_is_no_time_is_refused(net, limit):
    with pytest.raises(ValueError, match=r"limit=.* is not allowed; give a positive number"):
        run_of(net, limit=limit)


def test_a_batch_without_images_and_sizes_that_are_none_are_refused(net):
    with pytest.raises(ValueError, match="of at least one image, as their first axis"):
        search.fast(lambda p, x: x @ p, jnp.ones((3, 3)), jnp.ones((0, 3)))
    with pytest.raises(ValueError, match=r"slices=\(4, 0\) are not allowed; give ints of 1 or"):
        run_of(net, slices=(4, 0))


def test_one_round_is_refused(net):
    with pytest.raises(ValueError, match=r"rounds=1 is not allowed; give an int of 2 or more"):
        run_of(net, rounds=1)


def test_a_line_of_progress_tells_the_best_so_far(net, order, monkeypatch):
    texts: list = []

    class Told(search.Progress):
        def note(self, text):
            texts.append(text)

    monkeypatch.setattr(search, "Progress", Told)
    run_of(net)
    assert texts[0] == f"1e+03 ms with {FIRST}"


# ---- types


def test_candidates_are_compared_in_the_precision_that_the_network_computes_in(order):
    """Outputs in float32 of layers in bfloat16 differ by the rounding of those."""
    layers = [nn.Conv(8, (3, 3), dtype=jnp.bfloat16), nn.Conv(8, (3, 3), dtype=jnp.bfloat16)]
    model = nn.Sequential([*layers, lambda x: x.astype(jnp.float32)])
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 4))
    variables = model.init(jax.random.key(0), images)
    run = fast(model.apply, variables, images, slices=(2,), timers=Named, rounds=2)
    with_algorithms = [name for name in run.seconds if "algorithms" in name]
    assert len({name.partition(", all at")[0] for name in with_algorithms}) >= len(
        candidate_options()
    )
    assert run.left_out == {}


def test_outputs_may_be_no_floats(net, order):
    model, small, images = net
    classes = lambda variables, images: model.apply(variables, images, train=False).argmax(-1)  # noqa: E731
    run = fast(classes, small, images, slices=(2,), timers=Usual, rounds=2)
    assert run(small, images).dtype == jnp.int32


def test_bfloat16_stays_bfloat16(order):
    model = nn.Sequential([nn.Conv(8, (3, 3), dtype=jnp.bfloat16)])
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 4))
    variables = model.init(jax.random.key(0), images)
    tree = {"params": lr.decompose(variables["params"], {"layers_0": 3})}
    run = fast(model.apply, tree, images, slices=(2,), timers=Named, rounds=2)
    assert run(tree, images).dtype == jnp.bfloat16


def test_what_runs_is_exact_where_the_default_program_is_not():
    """With jax 0.12.0.1 XLA's default program of these layers returns memory that was never
    written."""
    model = lambda dtype: nn.Sequential([  # noqa: E731
        nn.Conv(64, (3, 3), dtype=dtype), nn.relu, nn.Conv(64, (3, 3), dtype=dtype), nn.relu,
        lambda x: nn.max_pool(x, (2, 2), (2, 2)),
    ])  # fmt: skip
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    variables = model(jnp.float32).init(jax.random.key(0), images)
    tree = {"params": lr.decompose(variables["params"], {"layers_2": 24})}
    for own in (variables, tree):
        run = fast(model(jnp.bfloat16).apply, own, images, slices=(), timers=Named, rounds=2)
        exact = lr.lowrank(model(jnp.float32).apply)(own, images)
        found = run(own, images).astype(jnp.float32)
        assert agree(exact, found, tolerance=0.03)  # three roundings to 8 bits a layer
