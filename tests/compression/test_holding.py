"""Activations of many batches are held in files, with the same values."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.compression import holding
from lowrank_jax.compression.holding import Files, Holding, Stored, loaded

VALUES = {
    "map": jnp.arange(60.0).reshape(3, 4, 5),
    "half": jnp.ones((2, 3), jnp.bfloat16) / 3,
    "scalar": jnp.float32(2.5),
    "empty": jnp.zeros((0, 4)),
    "index": jnp.arange(4, dtype=jnp.int8),
}


def kept(limit, monkeypatch, batches=1):
    monkeypatch.setattr(holding, "IN_MEMORY", limit)
    return Holding(batches, Files()).keep(VALUES)


@pytest.mark.parametrize("limit", [0, 10**6])
def test_what_is_held_is_what_was_given(limit, monkeypatch):
    given = kept(limit, monkeypatch)
    assert isinstance(given["map"], Stored) == (limit == 0)
    found = loaded(given)
    chex.assert_trees_all_equal(found, {name: np.asarray(x) for name, x in VALUES.items()})
    chex.assert_trees_all_equal_dtypes(found, VALUES)


def test_all_batches_count(monkeypatch):
    size = sum(x.nbytes for x in VALUES.values())
    assert not isinstance(kept(5 * size, monkeypatch, batches=5)["map"], Stored)
    assert isinstance(kept(5 * size, monkeypatch, batches=6)["map"], Stored)


def test_batches_share_a_file(monkeypatch):
    monkeypatch.setattr(holding, "IN_MEMORY", 0)
    holder = Holding(3, Files())
    given = [holder.keep({"x": np.full((2, 3), own, np.float32)}) for own in range(3)]
    for own in (2, 0, 1):
        assert (loaded(given[own])["x"] == own).all()
    assert len({own["x"].file for own in given}) == 1


def test_a_file_is_written_again_once_nothing_reads_it(monkeypatch):
    monkeypatch.setattr(holding, "IN_MEMORY", 0)
    files = Files()

    def keep(own):
        return Holding(1, files).keep({"x": np.full((2, 3), own, np.float32)})

    first = keep(1)
    read = loaded(first)
    del first
    second = keep(2)
    assert (read["x"] == 1).all() and not files.spare
    del read
    assert len(files.spare) == 1
    third = keep(3)
    assert not files.spare
    assert (loaded(second)["x"] == 2).all() and (loaded(third)["x"] == 3).all()


def test_files_are_closed_with_what_they_are_from(monkeypatch):
    monkeypatch.setattr(holding, "IN_MEMORY", 0)
    files = Files()
    one, two = (Holding(1, files).keep(VALUES)["map"] for _ in range(2))
    handles = [stored.file.file for stored in (one, two)]
    del one, files
    assert handles[0].closed and not handles[1].closed
    del two
    assert handles[1].closed


def test_without_space_they_stay_in_memory_and_a_warning_says_so(monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.warns(UserWarning, match="No space left.*set TMPDIR"):
        found = kept(0, monkeypatch)
    assert not isinstance(found["map"], Stored)
