"""The networks of the experiments."""

from lowrank_jax.models.nin import NIN as NIN
