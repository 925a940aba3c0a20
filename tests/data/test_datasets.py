"""CIFAR-10 through TensorFlow Datasets, and the sample inside the package."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax import data

SHARED = Path(__file__).parents[3] / "shared" / "data" / "tensorflow_datasets"
PREPARED = os.environ.get("TFDS_DATA_DIR") or (str(SHARED) if SHARED.exists() else None)
needs_cifar = pytest.mark.skipif(PREPARED is None, reason="no prepared CIFAR-10: set TFDS_DATA_DIR")


@pytest.mark.parametrize("split, count", [("train", 2000), ("test", 1000)])
def test_the_sample_is_balanced_real_images(split, count):
    sample = data.sample(split)
    assert sample.images.shape == (count, 32, 32, 3)
    assert sample.images.dtype == np.uint8
    assert np.bincount(sample.labels).tolist() == [count // 10] * 10
    assert 50 < sample.images.std() < 80  # of all CIFAR-10: 64


def test_an_unknown_split_of_the_sample_is_refused():
    with pytest.raises(ValueError, match=r"'valid'.*\['test', 'train'\]"):
        data.sample("valid")


def test_normalised_images_are_centred():
    mean = data.normalize(jnp.asarray(data.sample("train").images)).mean((0, 1, 2))
    assert jnp.all(jnp.abs(mean) < 0.1)  # 2,000 of the 50,000 images that the constants come from


@pytest.mark.slow
@needs_cifar
def test_the_whole_of_cifar10_is_read_without_tensorflow():
    code = f"""
import sys
from lowrank_jax import data
whole = data.cifar10("test", {PREPARED!r})
print(whole.images.shape, whole.labels.tolist().count(3), "tensorflow" in sys.modules)
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert out.strip() == "(10000, 32, 32, 3) 1000 False"


@needs_cifar
def test_the_sample_comes_from_the_splits_of_the_data_set():
    whole, sample = data.cifar10("test", PREPARED), data.sample("test")
    known = {
        image.tobytes(): label for image, label in zip(whole.images, whole.labels, strict=True)
    }
    assert all(
        known[i.tobytes()] == label for i, label in zip(sample.images, sample.labels, strict=True)
    )


@needs_cifar
def test_an_incomplete_folder_is_refused_by_the_name_of_the_missing_file(tmp_path):
    folder = Path(PREPARED) / "cifar10"
    for file in folder.glob("*/*"):
        if "test" not in file.name:
            target = tmp_path / file.relative_to(folder.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(file, target)
    with pytest.raises(
        FileNotFoundError, match=r"cifar10-test.array_record-00000-of-00001 is missing.*--data-dir"
    ):
        data.cifar10("train", str(tmp_path))


@needs_cifar
def test_a_truncated_file_is_refused(tmp_path):
    shutil.copytree(Path(PREPARED) / "cifar10", tmp_path / "cifar10")
    (file,) = tmp_path.glob("cifar10/*/*test.array_record*")
    file.chmod(0o644)
    os.truncate(file, 1000)
    with pytest.raises(OSError, match=r"(?s)test.array_record.*TFDS_DATA_DIR"):
        data.cifar10("test", str(tmp_path))


def test_a_folder_without_the_data_set_is_refused_at_once(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"No prepared cifar10.*TFDS_DATA_DIR.*pip install tensorflow"
    ):
        data.cifar10("train", str(tmp_path))


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"lowrank-jax\[data\]"):
        data.cifar10("train")
