"""The start of a run is taken again only where it was made of the same."""

import pytest

from lowrank_jax.training.checkpoints import begun
from lowrank_jax.training.origins import has_origin, new_origin

OWN = {"plan": "5", "checkpoint": "a"}
OTHERS = [{"plan": "3", "checkpoint": "a"}, {"plan": "5", "checkpoint": "b"}]


def begin(folder):
    (folder / "checkpoints" / "000000005").mkdir(parents=True)


def test_a_start_is_found_again_by_what_it_was_made_of(tmp_path):
    assert not has_origin(tmp_path / "run", OWN) and not (tmp_path / "run").exists()
    with new_origin(tmp_path / "run", OWN):
        pass
    assert has_origin(tmp_path / "run", OWN)
    begin(tmp_path / "run")
    assert has_origin(tmp_path / "run", OWN)


@pytest.mark.parametrize("other", OTHERS)
def test_a_start_of_something_else_is_refused_once_a_step_is_saved(tmp_path, other):
    with new_origin(tmp_path, OWN):
        pass
    assert not has_origin(tmp_path, other)
    begin(tmp_path)
    assert begun(tmp_path)
    with pytest.raises(ValueError, match=r"began from another \w+; give the"):
        has_origin(tmp_path, other)


@pytest.mark.parametrize("other", OTHERS)
def test_a_start_that_was_not_written_to_its_end_has_no_origin(tmp_path, other):
    with new_origin(tmp_path, OWN):
        pass
    with pytest.raises(KeyboardInterrupt), new_origin(tmp_path, other):
        raise KeyboardInterrupt
    assert not has_origin(tmp_path, OWN) and not has_origin(tmp_path, other)


def test_a_folder_of_an_older_version_is_taken_as_it_is(tmp_path):
    begin(tmp_path)
    assert has_origin(tmp_path, OWN)
