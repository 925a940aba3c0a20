"""`lowrank_jax.nnx.finetune`: a model in, a trained model out."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowrank_jax.nnx import decompose, finetune
from lowrank_jax.training import distillation, layer_matching


class Model(nnx.Module):
    """A convolution, batch normalisation, dropout and a dense layer."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.conv(x))).mean((1, 2))))


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 64)
    images = rng.normal(size=(64, 8, 8, 3)) + labels[:, None, None, None]
    return images.astype(np.float32), labels


@pytest.fixture(scope="module")
def small():
    return decompose(Model(nnx.Rngs(0)), {"conv": 2})


def accuracy(model, data):
    model = nnx.clone(model)
    model.eval()
    return float(np.mean(np.argmax(model(data[0]), -1) == data[1]))


@pytest.mark.slow
def test_a_decomposed_model_learns_and_the_one_given_stays(small, data, tmp_path):
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(small, nnx.Param)))
    shown = []

    def after(epoch, model, metrics):
        shown.append((epoch, type(model)))

    options = dict(learning_rate=0.1, batch_size=16, folder=tmp_path / "run", after_epoch=after)
    tuned = finetune(small, data, epochs=8, **options)
    assert accuracy(tuned, data) > 0.6  # chance is 0.25
    assert type(tuned.conv) is type(small.conv) and shown[-1] == (8, Model)
    assert jnp.any(tuned.conv.kernel.vertical[...] != small.conv.kernel.vertical[...])
    assert jnp.any(tuned.norm.mean[...] != 0) and tuned.dropout.rngs.count[...] > 0
    after_all = nnx.to_pure_dict(nnx.state(small, nnx.Param))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, before, after_all)))
    again = finetune(small, data, epochs=8, **options)
    assert accuracy(again, data) == accuracy(tuned, data)


@pytest.mark.slow
def test_a_dense_model_teaches_without_labels(small, data):
    loss = distillation() + layer_matching()
    teacher = Model(nnx.Rngs(0))
    options = dict(loss=loss, teacher=teacher, batch_size=16)
    tuned = finetune(small, data[0], steps=12, **options)
    teacher.eval()

    def gap(model):
        model = nnx.clone(model)
        model.eval()
        return float(jnp.linalg.norm(model(data[0]) - teacher(data[0])))

    assert gap(tuned) < gap(small)


@pytest.mark.parametrize(
    "typo, meant", [("epoch", "epochs"), ("step", "steps"), ("batchsize", "batch_size")]
)
def test_an_argument_that_is_nearly_one_of_finetune_is_refused(small, data, typo, meant):
    with pytest.raises(ValueError, match=f"no argument '{typo}'; did you mean '{meant}'"):
        finetune(small, data, **{typo: 2})


@pytest.mark.parametrize("name", ["mutable", "rngs", "teacher_apply"])
def test_what_a_model_has_of_its_own_is_not_given(small, data, name):
    with pytest.raises(ValueError, match=f"{name}=.* is not allowed for a model of NNX"):
        finetune(small, data, steps=1, **{name: ["state"]})


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")  # models still do
def test_what_a_model_sows_is_no_part_of_its_training(data):
    class Sowing(nnx.Module):
        def __init__(self, rngs):
            self.head = nnx.Linear(3, 4, rngs=rngs)

        def __call__(self, x):
            x = x.mean((1, 2))
            self.sow(nnx.Intermediate, "features", x)
            return self.head(x)

    tuned = finetune(Sowing(nnx.Rngs(0)), data, steps=2, batch_size=32)
    assert tuned(data[0][:2]).shape == (2, 4) and len(tuned.features.get_value()) == 1


def test_without_the_mode_of_training_statistics_stay_and_parameters_learn(small, data):
    tuned = finetune(small, data, steps=3, batch_size=32, training_mode=False)
    old, new = (nnx.to_pure_dict(nnx.state(own, nnx.BatchStat)) for own in (small, tuned))
    chex.assert_trees_all_equal(old, new)
    assert not np.array_equal(small.head.kernel.get_value(), tuned.head.kernel.get_value())


def test_without_the_mode_of_training_dropout_is_off(data):
    class Dropping(nnx.Module):
        def __init__(self, rngs):
            self.head = nnx.Linear(3, 4, rngs=rngs)
            self.dropout = nnx.Dropout(1.0, rngs=rngs)

        def __call__(self, x):
            return self.head(self.dropout(x.mean((1, 2))))

    model = Dropping(nnx.Rngs(0))
    kept, dropped = (
        finetune(model, data, steps=2, batch_size=32, training_mode=mode).head.kernel.get_value()
        - model.head.kernel.get_value()
        for mode in (False, True)
    )
    assert np.abs(kept).max() > 10 * np.abs(dropped).max()  # of weight decay alone
