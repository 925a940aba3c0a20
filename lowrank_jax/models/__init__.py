"""The networks of the experiments."""

from lowrank_jax.models.nin import NIN as NIN
from lowrank_jax.models.resnet import CifarResNet as CifarResNet
