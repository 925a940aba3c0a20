"""Where the factors of a kernel lie where the program has put the kernel."""

from typing import Any

from jax.sharding import NamedSharding, PartitionSpec

from lowrank_jax.factorization import placement
from lowrank_jax.program.provenance import Source


def factor_sharding(sharding: Any, source: Source, axes: str, first: str, index: int) -> Any:
    """The sharding of a factor where its kernel has one, as the program has it at this place."""
    if not isinstance(sharding, NamedSharding) or source.dims is None:
        return sharding
    pairs = zip(source.dims, sharding.spec, strict=False)
    by_axis = {dim[0]: part for dim, part in pairs if len(dim) == 1}
    ndim = len(source.shape)
    stored = sharding.update(spec=PartitionSpec(*(by_axis.get(axis) for axis in range(ndim))))
    spec = placement.factor_sharding(stored, ndim, axes, first, index).spec
    return sharding.update(spec=PartitionSpec(*(spec[axis] for axis in source.kept())))
