"""Losses: pure functions that add with weights and say what they need."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_jax.training import Loss, cross_entropy, distillation, layer_matching, squared_error
from lowrank_jax.training.labels import probabilities

LOGITS = jax.random.normal(jax.random.key(0), (6, 4))
TEACHER = jax.random.normal(jax.random.key(1), (6, 4))
LABELS = jnp.array([0, 1, 2, 3, 0, 1])


@settings(max_examples=10)
@given(st.floats(-4, 4), st.floats(-4, 4))
def test_losses_add_with_their_weights(one, two):
    loss = one * cross_entropy() + distillation(2.0) * two
    found = loss(outputs=LOGITS, labels=LABELS, teacher=TEACHER)
    entropy = cross_entropy()(outputs=LOGITS, labels=LABELS)
    divergence = distillation(2.0)(outputs=LOGITS, teacher=TEACHER)
    np.testing.assert_allclose(found, one * entropy + two * divergence, rtol=1e-4, atol=1e-5)


def test_the_cross_entropy_is_that_of_optax_for_classes_and_for_probabilities():
    wanted = optax.softmax_cross_entropy_with_integer_labels(LOGITS, LABELS).mean()
    for labels in (LABELS, jax.nn.one_hot(LABELS, 4)):
        found = cross_entropy()(outputs=LOGITS, labels=labels)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_smoothed_labels_are_mixed_with_all_classes():
    smooth = cross_entropy(0.4)(outputs=LOGITS, labels=LABELS)
    uniform = cross_entropy()(outputs=LOGITS, labels=jnp.full((6, 4), 0.25))
    sharp = cross_entropy()(outputs=LOGITS, labels=LABELS)
    np.testing.assert_allclose(smooth, 0.6 * sharp + 0.4 * uniform, rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 8.0])
def test_distillation_is_least_at_the_teacher_and_blind_to_a_shift_of_the_logits(temperature):
    loss = distillation(temperature)
    assert abs(loss(outputs=TEACHER + 3, teacher=TEACHER)) < 1e-5
    assert loss(outputs=LOGITS, teacher=TEACHER) > 0.01


def test_at_a_high_temperature_distillation_matches_the_logits():
    centred = [x - x.mean(-1, keepdims=True) for x in (LOGITS, TEACHER)]
    wanted = jnp.sum((centred[0] - centred[1]) ** 2, -1).mean() / (2 * 4)
    found = distillation(100.0)(outputs=LOGITS, teacher=TEACHER)
    np.testing.assert_allclose(found, wanted, rtol=0.05)  # the next term is about 1 / T of it


def test_the_layers_count_alike_whatever_their_scale():
    one, two = (LOGITS, TEACHER), (1000 * LOGITS, 1000 * TEACHER)
    alone, both = layer_matching()(layers={"a": one}), layer_matching()(layers={"a": one, "b": two})
    np.testing.assert_allclose(alone, both, rtol=1e-6)


def test_a_loss_computes_in_float32_whatever_the_outputs_are():
    found = cross_entropy()(outputs=LOGITS.astype(jnp.bfloat16), labels=LABELS)
    assert found.dtype == jnp.float32


def test_a_loss_says_what_it_needs():
    assert cross_entropy().needs == {"outputs", "labels"}
    assert (distillation() + layer_matching()).needs == {"outputs", "teacher", "layers"}
    assert Loss.of(lambda teacher, labels: 0.0).needs == {"teacher", "labels"}


@pytest.mark.parametrize("name", ["cross_entropy", "distillation", "layers", "squared_error"])
def test_a_loss_has_the_name_by_which_it_is_asked_for(name):
    assert [term for term, _, _ in Loss.of(name).terms] == [name]


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: Loss.of("entropy"), "loss='entropy' is not allowed; give one of"),
        (lambda: Loss.of(3), "loss=3 is not allowed"),
        (lambda: Loss.of(lambda y, labels: 0.0), r"\('y', 'labels'\); name its arguments as"),
        (lambda: cross_entropy(1.0), r"smoothing=1\.0 is not allowed"),
        (lambda: distillation(0), "temperature=0 is not allowed"),
        (lambda: distillation("4"), "temperature='4' is not allowed"),
        (lambda: distillation(float("inf")), "temperature=inf is not allowed"),
        (lambda: cross_entropy("0.1"), "smoothing='0.1' is not allowed"),
        (lambda: float("nan") * cross_entropy(), "The weight nan of a loss is not allowed"),
        (lambda: squared_error() + squared_error(), "comes twice"),
        (lambda: Loss.of(lambda labels: 0.0) + (lambda outputs: 0.0), r'Loss.of\(function, "name"'),
        *[
            (lambda make=make: Loss.of(make), r"or call what makes a loss, as in distillation\(\)")
            for make in (cross_entropy, distillation, layer_matching, squared_error)
        ],
    ],
)
def test_what_is_no_loss_is_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize("outputs, labels", [((6, 1), (6,)), ((6,), (6, 1)), ((6, 4), (4,))])
def test_a_squared_error_of_two_shapes_is_refused(outputs, labels):
    with pytest.raises(ValueError, match=r"^Labels of shape .* give both in one shape"):
        squared_error()(outputs=jnp.zeros(outputs), labels=jnp.zeros(labels))


@pytest.mark.parametrize("shape", [(6,), (1,), (6, 4)])
def test_a_term_that_is_no_number_is_refused(shape):
    loss = Loss.of(lambda outputs: jnp.ones(shape), "own")
    with pytest.raises(ValueError, match=r"'own' gives an array of shape .*; give one number"):
        loss(outputs=LOGITS)


@pytest.mark.parametrize("other", ["squared_error", lambda outputs, labels: jnp.mean(outputs)])
def test_a_loss_adds_with_all_that_makes_one(other):
    given = dict(outputs=LOGITS, labels=LOGITS + 1)
    wanted = distillation()(outputs=LOGITS, teacher=TEACHER) + Loss.of(other)(**given)
    np.testing.assert_allclose((distillation() + other)(**given, teacher=TEACHER), wanted)


def test_a_term_may_have_settings_and_many_losses_have_a_sum():
    def scaled(outputs, scale=2.0):
        return scale * outputs.sum()

    given = dict(outputs=LOGITS, labels=LOGITS + 1)
    loss = sum([squared_error(), Loss.of(functools.partial(scaled, scale=3.0))])
    assert [name for name, _, _ in loss.terms] == ["squared_error", "scaled"]
    np.testing.assert_allclose(loss(**given), 1 + 3 * LOGITS.sum(), rtol=1e-6)
    np.testing.assert_allclose(Loss.of(scaled)(**given), 2 * LOGITS.sum(), rtol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("classes", [3, 200, 256, 257, 1000])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32"])
def test_labels_of_any_int_are_the_same_classes(dtype, classes, compiled):
    labels = np.arange(0, min(classes, 120), 2)
    fn = jax.jit(probabilities, static_argnums=1) if compiled else probabilities
    found = fn(jnp.asarray(labels, dtype), (len(labels), classes))
    np.testing.assert_array_equal(found, np.eye(classes)[labels])


@pytest.mark.parametrize("make", [cross_entropy, squared_error])
@pytest.mark.parametrize("labels", [{"a": LABELS}, [1, 2], None])
def test_labels_that_are_no_array_are_refused(make, labels):
    with pytest.raises(ValueError, match=r"Labels that are a .* or a loss of your own"):
        make()(outputs=LOGITS, labels=labels)


@pytest.mark.parametrize("labels", [[5, 0, 1, 2, 3, 0], [-1, 0, 1, 2, 3, 0], [4] * 6])
def test_a_label_that_is_no_class_makes_no_loss_of_zero(labels):
    assert jnp.isnan(jax.jit(cross_entropy())(outputs=LOGITS, labels=jnp.array(labels)))


@pytest.mark.parametrize(
    "shape, dtype", [((6, 5), float), ((6,), float), ((6, 4), int), ((5,), int)]
)
def test_labels_of_another_shape_are_refused_by_name(shape, dtype):
    with pytest.raises(ValueError, match=r"^Labels .* not allowed for outputs \(6, 4\); give ints"):
        cross_entropy()(outputs=LOGITS, labels=jnp.zeros(shape, dtype))
