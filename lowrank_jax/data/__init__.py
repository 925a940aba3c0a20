"""CIFAR-10: the whole data set, and the sample inside the package."""

from lowrank_jax.data.datasets import CLASSES as CLASSES
from lowrank_jax.data.datasets import Dataset as Dataset
from lowrank_jax.data.datasets import cifar10 as cifar10
from lowrank_jax.data.datasets import normalize as normalize
from lowrank_jax.data.datasets import sample as sample
from lowrank_jax.data.networks import pretrained as pretrained
