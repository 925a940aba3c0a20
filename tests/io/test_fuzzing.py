"""Damaged files of every format: what was saved is what is loaded, or one error that says so."""

import random
import tracemalloc
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lowrank_jax import Plan, calibrate, plan
from lowrank_jax.calibration.collecting import Calibration
from lowrank_jax.io.weights import load_weights, save_weights

MUTATIONS = 150
ERROR = 2**16  # bytes of an error with its traceback
TREE = {
    "params": {
        f"Conv_{i}": {"kernel": np.arange(36.0, dtype=np.float32) + i, "bias": np.ones(3)}
        for i in range(4)
    },
    "batch_stats": {"mean": np.arange(5), "half": jnp.ones(7, jnp.bfloat16)},
}


def flipped(content, rng):
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


def cut(content, rng):
    return content[: rng.randrange(len(content))]


def zeroed(content, rng):
    start, length = rng.randrange(len(content)), rng.randrange(1, 64)
    return content[:start] + bytes(length) + content[start + length :]


def doubled(content, rng):
    start, length = rng.randrange(len(content)), rng.randrange(1, 200)
    return content[: start + length] + content[start:]


def shortened(content, rng):
    start, length = rng.randrange(len(content)), rng.randrange(1, 200)
    return content[:start] + content[start + length :]


def replaced(content, rng):
    start, length = rng.randrange(len(content)), rng.randrange(1, 16)
    return content[:start] + rng.randbytes(length) + content[start + length :]


KINDS = (flipped, cut, zeroed, doubled, shortened, replaced)


def mutations(content, count=MUTATIONS):
    rng = random.Random(0)
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        changed = kind(content, rng)
        if changed != content:
            yield kind.__name__, changed


def outcome(path, read, equal):
    """What becomes of a damaged file: refused, or read as the "same" or as "other" values."""
    try:
        found = read(path)
    except ValueError as error:
        short = len(str(error)) < 2000
        return "refused" if str(path) in str(error) and short else str(error)
    return "same" if equal(found) else "other"


def peak_of(call):
    """The result of a call, and the most memory that it held, bytes."""
    tracemalloc.start()
    try:
        return call(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def outcomes(path, read, equal):
    """How often each outcome was met, with a table by the kind of damage.

    A damaged file takes no more memory than the whole one, and its own bytes twice, whatever sizes
    its changed header claims.
    """
    table, whole = Counter(), path.read_bytes()
    for _ in range(2):  # the first reading imports
        _, usual = peak_of(lambda: outcome(path, read, equal))
    for kind, content in mutations(whole):
        path.write_bytes(content)
        end, peak = peak_of(lambda: outcome(path, read, equal))
        assert peak <= usual + 2 * len(content) + ERROR, (kind, end, peak, usual)
        table[kind, end] += 1
    print(f"\n{path.name}")
    for (kind, end), number in sorted(table.items()):
        print(f"{kind:10} {end:8} {number}")
    ends = Counter()
    for (_, end), number in table.items():
        ends[end] += number
    assert set(ends) <= {"refused", "same", "other"}
    return ends


def same_tree(found):
    if jax.tree.structure(found) != jax.tree.structure(TREE):
        return False
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(TREE), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".msgpack"])
def test_damaged_weights_are_refused_or_do_no_harm(suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    save_weights(path, TREE)
    found = outcomes(path, load_weights, same_tree)
    assert found["refused"] > MUTATIONS / 3
    # Flax's format has no room for a checksum, so that numbers may have changed.
    assert suffix == ".msgpack" or found["other"] == 0


@pytest.fixture(scope="module")
def network():
    model, x = nn.Sequential([nn.Conv(4, (3, 3)), nn.Conv(4, (3, 3))]), jnp.ones((4, 6, 6, 3))
    variables = model.init(jax.random.key(0), x)
    return model.apply, variables, x


def same_strips(one, two):
    fields = ("count", "samples", "x", "y", "yy", "strips", "offsets")
    parts = [[getattr(own, name) for name in fields] for own in (one, two)]
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, *parts)))


@pytest.mark.slow
def test_damaged_calibrations_are_refused_or_do_no_harm(network, tmp_path):
    apply, variables, x = network
    path, seen = tmp_path / "seen.npz", calibrate(apply, variables, x)
    seen.save(path)

    def equal(found):
        pairs = zip(*(jax.tree.leaves(own.moments) for own in (found, seen)), strict=True)
        return all(same_strips(one, two) for one, two in pairs)

    found = outcomes(path, lambda path: Calibration.load(path, apply, variables, x), equal)
    assert found["other"] == 0 and found["refused"] > MUTATIONS / 3


@pytest.mark.slow
def test_damaged_plans_are_refused_or_are_plans(network, tmp_path):
    path, chosen = tmp_path / "plan.json", plan(*network, macs=0.5)
    chosen.save(path)
    found = outcomes(path, Plan.load, lambda plan: plan == chosen)
    assert found["refused"] > MUTATIONS / 3
