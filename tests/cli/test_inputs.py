"""`--images` takes what people have: files, folders, prepared data sets and iterators."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lowrank_jax.cli.choice import Choice
from lowrank_jax.cli.examples import load_examples

X = np.random.default_rng(0).integers(0, 255, (6, 8, 9, 3), np.uint8)
Y = np.arange(6)
SHARED = Path(__file__).parents[3] / "shared" / "data" / "tensorflow_datasets"
PREPARED = os.environ.get("TFDS_DATA_DIR") or (str(SHARED) if SHARED.exists() else None)
needs_cifar = pytest.mark.skipif(PREPARED is None, reason="no prepared CIFAR-10: set TFDS_DATA_DIR")


def pictures(folder, images, names=None):
    """Writes images as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        name = names[number] if names else f"{number}.png"
        Image.fromarray(np.squeeze(image)).save(folder / name)


def make_npy(folder):
    np.save(folder / "x.npy", X)
    return "x.npy", None


def make_npz(folder):
    np.savez(folder / "x.npz", image=X, label=Y, other=Y)
    return "x.npz", Y


def make_single_npz(folder):
    np.savez(folder / "x.npz", pixels=X)
    return "x.npz", None


def make_folder(folder):
    pictures(folder / "x", X)
    return "x", None


def make_classes(folder):
    pictures(folder / "x" / "cat", X[:2])
    pictures(folder / "x" / "dog", X[2:])
    return "x", np.array([0, 0, 1, 1, 1, 1])


def make_batches(folder):
    (folder / "batches_of_a_user.py").write_text(
        f"import numpy as np\nX = np.load({str(folder / 'all.npy')!r})\n"
        "def give():\n    return iter([(X[:4], np.arange(4)), (X[4:], np.arange(4, 6))])\n"
    )
    np.save(folder / "all.npy", X)
    return "batches_of_a_user:give", Y


KINDS = (make_npy, make_npz, make_single_npz, make_folder, make_classes, make_batches)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize("make", KINDS)
def test_every_kind_gives_its_images_and_its_labels(make, tmp_path):
    path, labels = make(tmp_path)
    found = load_examples(path, Choice())
    np.testing.assert_array_equal(found.images, X)
    assert found.total == 6 and found.rows.tolist() == list(range(6))
    assert (found.labels is None) == (labels is None)
    if labels is not None:
        np.testing.assert_array_equal(found.labels, labels)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_count_chooses_rows_of_the_whole_with_their_labels(make, seed, tmp_path):
    path, labels = make(tmp_path)
    found = load_examples(path, Choice(count=3, seed=seed))
    again = load_examples(path, Choice(count=3, seed=seed))
    assert len(found.images) == 3 and sorted(set(found.rows)) == found.rows.tolist()
    np.testing.assert_array_equal(found.images, X[found.rows])
    np.testing.assert_array_equal(found.rows, again.rows)
    if labels is not None:
        np.testing.assert_array_equal(found.labels, labels[found.rows])


def test_another_seed_chooses_others():
    assert len({tuple(Choice(count=3, seed=seed).rows(50)) for seed in range(5)}) == 5


def test_pictures_of_different_sizes_need_a_size_to_which_the_centre_is_cut(tmp_path):
    striped = np.zeros((10, 20, 3), np.uint8)
    striped[:, 5:15] = 200  # the centre
    pictures(tmp_path / "x", [striped, np.full((30, 30, 3), 200, np.uint8)], ["a.png", "b.PNG"])
    with pytest.raises(ValueError, match=r"a.png 10x20.*b.PNG 30x30.*give --size"):
        load_examples("x", Choice())
    found = load_examples("x", Choice(size=(10, 10)))
    assert found.images.shape == (2, 10, 10, 3) and (found.images == 200).all()


def test_grey_pictures_have_one_channel_and_among_colours_three(tmp_path):
    pictures(tmp_path / "grey", X[..., :1])
    assert load_examples("grey", Choice()).images.shape == (6, 8, 9, 1)
    pictures(tmp_path / "mixed", [X[0], X[1, ..., :1]])
    assert load_examples("mixed", Choice()).images.shape == (2, 8, 9, 3)


def test_jpeg_files_are_read_and_other_files_left_alone(tmp_path):
    pictures(tmp_path / "x", [np.full((8, 8, 3), 128, np.uint8)], ["a.JPEG"])
    (tmp_path / "x" / "notes.txt").write_text("of no use")
    assert load_examples("x", Choice()).images.shape == (1, 8, 8, 3)


@needs_cifar
@pytest.mark.parametrize("named", [True, False])
def test_a_prepared_data_set_is_read_by_its_name_or_its_folder(named):
    folder = next((Path(PREPARED) / "cifar10").iterdir())
    path = "tfds:cifar10/train[:500]" if named else str(folder)
    data_dir = PREPARED if named else None
    found = load_examples(path, Choice(count=5, size=(24, 24), data_dir=data_dir))
    assert found.images.shape == (5, 24, 24, 3) and found.images.dtype == np.uint8
    assert found.total == (500 if named else 50_000) and found.labels.shape == (5,)
    with pytest.raises(ValueError, match=r"no split 'valid'; give one of \['test', 'train'\]"):
        load_examples("tfds:cifar10/valid", Choice(count=5, data_dir=PREPARED))


@pytest.mark.parametrize(
    "path, text",
    [
        ("tfds:nothing_of_this_name", "no data set 'nothing_of_this_name'"),
        ("tfds:mnist", r"No prepared mnist \(array_record\)"),
        ("empty", r"empty holds no .png or .jpg files, nor do the folders in it \(none\)"),
        ("nested", r"the folders in it \(train\); give a folder that does"),
        ("records", "records has files of array_record and no dataset_info.json"),
        ("broken", r"broken.+a.png is no whole picture; remove it, or repair it"),
        ("cut.npz", "cut.npz is no .npz file of numbers"),
        ("two.npz", r"two.npz has \['a', 'b'\]; name one of them images or image or x"),
        ("uneven.npz", r"uneven.npz holds arrays .*; give images and a label for each"),
    ],
)
def test_what_is_no_such_thing_is_refused(path, text, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
    for name in ("empty", "nested/train/cat", "records", "broken"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "records" / "x-train.array_record-00000-of-00001").touch()
    (tmp_path / "broken" / "a.png").write_bytes(b"\x89PNG cut")
    (tmp_path / "cut.npz").write_bytes(b"PK")
    np.savez("two.npz", a=X, b=Y)
    np.savez("uneven.npz", x=X, y=Y[:3])
    with pytest.raises((ValueError, OSError), match=text):
        load_examples(path, Choice())


def test_a_size_is_for_pictures_alone(tmp_path):
    make_npy(tmp_path)
    with pytest.raises(ValueError, match=r"--size is for pictures, and x.npy holds arrays"):
        load_examples("x.npy", Choice(size=(4, 4)))


@pytest.mark.parametrize("name", ["loader", "pairs", "alone"])
def test_an_iterator_is_read_until_there_are_enough(name, user):
    found = load_examples(f"{user.__name__}:{name}", Choice(count=3))
    np.testing.assert_array_equal(found.images, user.X[:3])
    assert (found.labels is None) == (name == "alone")


@pytest.mark.parametrize(
    "name, text",
    [
        ("nothing", "gives no batches; give the import path"),
        ("number", "TypeError: 'int' object is not iterable"),
        ("missing", "TypeError: 'NoneType' object is not iterable"),
        ("three", "batch 0 has 3 parts; give images, or images and labels"),
        ("flat", r"batch 0 has the shape \(6, 3\); give images"),
        ("raises", "RuntimeError: boom$"),
        ("unnamed", r"batch 0 has \['pixels'\]; name one of them images or image or x"),
    ],
)
def test_an_iterator_that_gives_no_images_is_refused(name, text, user):
    with pytest.raises(ValueError, match=text):
        load_examples(f"{user.__name__}:{name}", Choice())
