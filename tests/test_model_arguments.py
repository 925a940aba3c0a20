"""Arguments of the model's own call follow by their names in every verb that calls it."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import lowrank_jax as lr
from lowrank_jax.calibration.batch_norm import reestimate
from lowrank_jax.io.torch_names import from_torch

X = np.random.default_rng(0).normal(size=(4, 12)).astype(np.float32)
Y = np.arange(4)


class Net(nn.Module):
    """Needs an argument of its call."""

    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(not train)(nn.Dense(8)(x))


class Module(nnx.Module):
    def __init__(self):
        self.head = nnx.Linear(12, 8, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(8, rngs=nnx.Rngs(0))

    def __call__(self, x, train):
        return self.norm(self.head(x), use_running_average=not train)


def torch_tensors():
    names = ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
    head = {"head.weight": np.ones((8, 12)), "head.bias": np.ones(8)}
    return head | {name: np.ones(8) for name in names}


FAST = dict(slices=(), rounds=2, limit=1e-9)
VERBS = {
    "trace": lambda f, v, **own: lr.trace(f, v, X, **own),
    "calibrate": lambda f, v, **own: lr.calibrate(f, v, X, **own),
    "plan": lambda f, v, **own: lr.plan(f, v, X, macs=0.9, **own),
    "compress": lambda f, v, **own: lr.compress(f, v, X, {"Dense_0": 2}, **own),
    "finetune": lambda f, v, **own: lr.finetune(f, v, (X, Y), steps=1, batch_size=4, **own),
    "fast": lambda f, v, **own: lr.fast(f, v, X, **FAST, **own)(v, X),
    "reestimate": lambda f, v, **own: reestimate(f, v, X, **own),
    "from_torch": lambda f, v, **own: from_torch(torch_tensors(), f, v, X, **own),
}
SLOW = dict.fromkeys(("plan", "compress", "finetune"), pytest.mark.slow)
OF_NNX = {
    "trace": lambda m, **own: lr.nnx.trace(m, X, **own),
    "calibrate": lambda m, **own: lr.nnx.calibrate(m, X, **own),
    "plan": lambda m, **own: lr.nnx.plan(m, X, macs=0.9, **own),
    "compress": lambda m, **own: lr.nnx.compress(m, X, {"head": 2}, **own),
    "finetune": lambda m, **own: lr.nnx.finetune(m, (X, Y), steps=1, batch_size=4, **own),
    "fast": lambda m, **own: lr.nnx.fast(m, X, **FAST, **own),
    "reestimate": lambda m, **own: lr.nnx.reestimate(m, X, **own),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_takes_the_arguments_of_the_model(verb):
    model = Net()
    variables = jax.jit(model.init, static_argnames="train")(jax.random.key(0), X, train=False)
    training = verb == "reestimate"
    assert VERBS[verb](model.apply, variables, train=training) is not None
    if verb != "finetune":  # which finds out how a model of Linen trains
        with pytest.raises((TypeError, ValueError), match="train"):
            VERBS[verb](model.apply, variables)


@pytest.mark.parametrize("verb", [pytest.param(v, marks=SLOW.get(v, ())) for v in OF_NNX])
def test_a_verb_of_nnx_takes_the_arguments_of_the_model(verb):
    assert OF_NNX[verb](Module(), train=verb == "reestimate") is not None
    with pytest.raises((TypeError, ValueError), match="train"):
        OF_NNX[verb](Module())


def test_help_begins_with_the_verbs():
    text = lr.__doc__
    verbs = set(VERBS) - {"reestimate", "from_torch"}
    assert len(text.splitlines()) < 40  # one screen
    assert all(f"\n{verb} " in text for verb in [*verbs, "decompose", "reconstruct", "lowrank"])


@pytest.mark.parametrize("known", [False, True], ids=["by its call", "by its calibration"])
@pytest.mark.parametrize(
    "verb, typo, meant",
    [
        ("plan", {"mac": 0.5}, "macs"),
        ("plan", {"parameter": 0.5}, "parameters"),
        ("compress", {"sweep": 2}, "sweeps"),
        ("finetune", {"step": 1}, "steps"),
        ("finetune", {"batchsize": 8}, "batch_size"),
        ("fast", {"limitt": 2}, "limit"),
    ],
)
def test_an_argument_that_is_nearly_one_of_the_verb_is_not_given_to_the_model(
    verb, typo, meant, known
):
    variables = Net().init(jax.random.key(0), X, train=False)
    given = (Net().apply, variables, X)
    if known and verb in ("plan", "compress"):
        given = (lr.calibrate(*given, train=False),)
    [name] = typo
    with pytest.raises(
        ValueError, match=f"{verb} has no argument '{name}'; did you mean '{meant}'"
    ):
        getattr(lr, verb)(*given, **typo)


def test_an_argument_of_the_model_may_be_near_one_of_the_verb():
    def network(variables, x, limits):
        return x @ variables["kernel"] + limits

    run = lr.fast(network, {"kernel": np.ones((12, 3), np.float32)}, X, limits=1.0, **FAST)
    assert run({"kernel": np.ones((12, 3), np.float32)}, X).shape == (4, 3)
