"""Arrays of .npz files: all of them, as they were written, or an error."""

import io
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.io.npz import read_arrays, write_arrays
from lowrank_jax.io.weights import load_weights, save_weights


def archive(path, *members):
    """A zip archive of arrays, or of bytes, by names that may come twice."""
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members:
            if isinstance(content, np.ndarray):
                buffer = io.BytesIO()
                np.save(buffer, content)
                content = buffer.getvalue()
            file.writestr(name, content)


@pytest.mark.parametrize("names", [("a", "a/b"), ("a/b", "a"), ("x/a/b/c", "x/a"), ("a/b/c", "a")])
def test_an_array_within_an_array_is_refused_in_any_order(names, tmp_path):
    archive(tmp_path / "w.npz", *((f"{name}.npy", np.ones(2)) for name in names))
    with pytest.raises(ValueError, match=r"'(x/)?a' is an array, and '.*' lies within it"):
        load_weights(tmp_path / "w.npz")


@pytest.mark.filterwarnings("ignore:Duplicate name")  # zipfile's own, while the file is written
def test_a_name_that_comes_twice_is_refused(tmp_path):
    archive(
        tmp_path / "w.npz", ("a.npy", np.ones(2)), ("b.npy", np.ones(2)), ("a.npy", np.zeros(2))
    )
    with pytest.raises(ValueError, match=r"a.npy comes 2 times"):
        load_weights(tmp_path / "w.npz")


def test_what_is_no_array_is_refused(tmp_path):
    archive(tmp_path / "w.npz", ("a.npy", np.ones(2)), ("notes.txt", b"text"))
    with pytest.raises(ValueError, match=r"notes.txt is no array"):
        load_weights(tmp_path / "w.npz")


def test_an_array_with_more_bytes_than_its_shape_is_refused(tmp_path):
    whole = io.BytesIO()
    np.save(whole, np.ones(2))
    archive(tmp_path / "w.npz", ("a.npy", whole.getvalue() + b"more"))
    with pytest.raises(ValueError, match=r"a is longer than its shape \(2,\) says"):
        load_weights(tmp_path / "w.npz")


def test_the_comment_of_another_program_is_no_seal(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.ones(2))
    with zipfile.ZipFile(tmp_path / "w.npz", "a") as file:
        file.comment = b"hello"
    assert read_arrays(tmp_path / "w.npz").keys() == {"a"}


def test_an_array_that_was_taken_out_or_added_is_missed(tmp_path):
    for change in ("less", "more"):
        with (tmp_path / "w.npz").open("wb") as file:
            write_arrays(file, {"a": np.ones(2), "b": np.ones(3)})
        with zipfile.ZipFile(tmp_path / "w.npz") as old:
            members = [(info.filename, old.read(info)) for info in old.infolist()]
            comment = old.comment
        members = members[:1] if change == "less" else [*members, ("c.npy", members[0][1])]
        archive(tmp_path / "w.npz", *members)
        assert read_arrays(tmp_path / "w.npz").keys() != {"a", "b"}  # of a foreign file
        with zipfile.ZipFile(tmp_path / "w.npz", "a") as new:
            new.comment = comment
        with pytest.raises(ValueError, match="not those that were written"):
            read_arrays(tmp_path / "w.npz")


@pytest.mark.parametrize("name", ["file", "args", "kwds", "allow_pickle", "é ü", "a.npy", "0"])
def test_any_name_is_kept(name, tmp_path):
    save_weights(tmp_path / "w.npz", {name: np.arange(3)})
    assert load_weights(tmp_path / "w.npz")[name].tolist() == [0, 1, 2]


def test_other_programs_read_and_write_the_same_format(tmp_path):
    tree = {"a": np.arange(3), "half": np.ones(2, jnp.bfloat16)}
    save_weights(tmp_path / "ours.npz", tree)
    with np.load(tmp_path / "ours.npz") as found:
        assert list(found) == ["a", "half"] and found["a"].tolist() == [0, 1, 2]
    np.savez_compressed(tmp_path / "theirs.npz", **tree)
    assert load_weights(tmp_path / "theirs.npz")["half"].dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [">f4", ">i8", "<f4", ">c16"])
def test_numbers_come_in_the_byte_order_of_the_machine(dtype, tmp_path):
    np.savez(tmp_path / "w.npz", a=np.arange(3).astype(dtype))
    found = load_weights(tmp_path / "w.npz")["a"]
    assert found.dtype.isnative and found.tolist() == [0, 1, 2]
