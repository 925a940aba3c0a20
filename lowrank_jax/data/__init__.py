"""CIFAR-10: the whole data set, and the sample inside the package."""

from lowrank_jax.data.cifar10 import Dataset as Dataset
from lowrank_jax.data.cifar10 import cifar10 as cifar10
from lowrank_jax.data.cifar10 import normalize as normalize
from lowrank_jax.data.cifar10 import sample as sample
from lowrank_jax.data.pretrained import pretrained as pretrained
