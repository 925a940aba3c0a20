"""What the program of a network says about its kernels, and how it runs by another rule."""

from lowrank_jax.program import control_flow as control_flow
