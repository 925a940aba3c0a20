"""Prepared data sets of TensorFlow Datasets, in files of array_record; TensorFlow is not needed."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

PREPARE = (
    "To prepare one, on a machine with a network: pip install tensorflow tensorflow-datasets, then "
    "tfds.builder({name!r}, file_format='array_record').download_and_prepare()."
)
Row = dict[str, Any]


def named_builder(name: str, data_dir: str | None = None) -> "tfds.core.DatasetBuilder":
    """The data set of a name, in a folder, TFDS_DATA_DIR or ``~/tensorflow_datasets``.

    Raises:
        FileNotFoundError: no prepared copy is there, or it lacks files.
        ImportError: tensorflow-datasets is not installed.
        ValueError: there is no data set of this name.
    """
    tfds, remedy = _library(), _remedy(name)
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(f"There is no data set {name!r}. {remedy}") from error
    if not builder.is_prepared():
        raise FileNotFoundError(
            f"No prepared {name} (array_record) in {builder.data_path}. {remedy}"
        )
    _check_files(builder, remedy)
    return builder


def folder_builder(folder: Path) -> "tfds.core.DatasetBuilder":
    """The data set in the folder of one version, which holds dataset_info.json.

    Raises:
        FileNotFoundError: it is no such folder, or it lacks files.
        ImportError: tensorflow-datasets is not installed.
    """
    if not (folder / "dataset_info.json").exists():
        raise FileNotFoundError(
            f"{folder} has files of array_record and no dataset_info.json, which says how to "
            "decode them; give a folder that tensorflow_datasets prepared, or the import path of "
            "an iterator that decodes them."
        )
    builder = _library().builder_from_directory(folder)
    _check_files(builder, _remedy(builder.name))
    return builder


def read_rows(builder: "tfds.core.DatasetBuilder", split: str, rows: Sequence[int]) -> list[Row]:
    """Some examples of a split.

    Raises:
        OSError: a file is damaged.
    """
    records = builder.as_data_source(split=split)
    try:
        return records.__getitems__(list(rows))
    except (RuntimeError, ValueError) as error:  # of array_record, on a damaged file
        files = ", ".join(sorted(path.name for path in builder.data_path.glob("*.array_record*")))
        raise OSError(
            f"One of {files} in {builder.data_path} is damaged: {error}. {_remedy(builder.name)}"
        ) from error


def count_rows(builder: "tfds.core.DatasetBuilder", split: str) -> int:
    """How many examples a split has; also of a slice such as "train[:1000]"."""
    return len(builder.as_data_source(split=split))


def stacked(rows: Sequence[Row], name: str) -> np.ndarray:
    """One feature of all examples, which have it in one shape."""
    return np.stack([row[name] for row in rows])


def _library() -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ImportError(
            "Reading prepared data sets needs the extra 'data': pip install 'lowrank-jax[data]'."
        ) from error
    return tensorflow_datasets


def _remedy(name: str) -> str:
    where = f"Give the folder that holds {name}/ as data_dir (--data-dir) or in TFDS_DATA_DIR."
    return f"{where} {PREPARE.format(name=name)}"


def _check_files(builder: Any, remedy: str) -> None:
    """Raises where tfds would fail on a missing file."""
    for split in builder.info.splits.values():
        for file in split.filepaths:
            if not file.exists():
                raise FileNotFoundError(
                    f"The {builder.name} in {builder.data_path} is incomplete: {file.name} is "
                    f"missing. {remedy}"
                )
