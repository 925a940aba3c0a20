"""The order of the data is a function of the seed and of the number of the step."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_jax.training.order import batches_of

COUNTS = st.integers(1, 40)


def first(data, count, step=0):
    return [labels.tolist() for _, labels in itertools.islice(data.after(step), count)]


def rows(count, size, seed=0):
    return batches_of((np.zeros((count, 2)), np.arange(count)), size, seed)


@given(COUNTS, st.integers(1, 8), st.integers(0, 3), st.integers(0, 50))
def test_a_batch_is_the_same_from_wherever_the_run_goes_on(count, size, seed, step):
    size = min(count, size)
    whole = first(rows(count, size, seed), step + 3)
    assert first(rows(count, size, seed), 3, step) == whole[step:]


@given(COUNTS, st.integers(1, 8))
def test_an_epoch_has_each_example_once_but_those_left_over(count, size):
    size = min(count, size)
    data = rows(count, size)
    epochs = [first(data, data.epoch, start * data.epoch) for start in (0, 1)]
    for epoch in epochs:
        seen = list(itertools.chain(*epoch))
        assert len(set(seen)) == len(seen) == count // size * size
        assert all(len(batch) == size for batch in epoch)


def test_epochs_and_seeds_have_orders_of_their_own():
    found = [first(rows(40, 40, seed), 2) for seed in (0, 1)]
    orders = [tuple(batch) for epochs in found for batch in epochs]
    assert len(set(orders)) == 4


def test_a_list_is_taken_in_its_order_again_and_again():
    data = batches_of([(np.zeros(1), np.full(1, i)) for i in range(3)])
    assert first(data, 5, step=2) == [[2], [0], [1], [2], [0]]
    assert data.epoch == 3


@pytest.mark.parametrize("again", [True, False])
def test_a_stream_starts_anew_where_it_can(again):
    parts = [(np.zeros(1), np.full(1, i)) for i in range(3)]
    data = batches_of((lambda: iter(parts)) if again else iter(parts))
    assert data.epoch is None
    assert first(data, 5) == [[0], [1], [2], [0], [1]][: 5 if again else 3]


def test_labels_as_a_list_are_refused_in_few_words():
    with pytest.raises(ValueError, match=r"np\.asarray") as caught:
        batches_of((np.zeros((500, 4)), [0, 1] * 250), 8)
    assert "shapes (500, 4), () are" in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.parametrize("size", [np.int64(4), np.uint8(4)])
def test_a_size_may_be_an_int_of_numpy(size):
    assert first(rows(8, size), 2) == first(rows(8, 4), 2)


def test_arrays_may_be_nested():
    tokens = {"ids": np.arange(6), "mask": np.ones((6, 2))}
    batch = next(batches_of((tokens, np.arange(6)), 3).after(0))
    assert batch[0]["ids"].tolist() == batch[1].tolist() and batch[0]["mask"].shape == (3, 2)


@pytest.mark.parametrize("of", [list, iter], ids=["list", "stream"])
def test_a_batch_may_be_a_list_as_loaders_of_pytorch_give(of):
    batches = [[np.zeros((2, 3)), np.arange(2)], [np.zeros((2, 3)), np.arange(2) + 2]]
    assert first(batches_of(of(batches)), 2) == [[0, 1], [2, 3]]
