"""Training and evaluation of any model and any tree of parameters."""

from lowrank_jax.training.loops import TrainState as TrainState
from lowrank_jax.training.loops import batches as batches
from lowrank_jax.training.loops import crop_and_flip as crop_and_flip
from lowrank_jax.training.loops import evaluate as evaluate
from lowrank_jax.training.loops import make_train_step as make_train_step
from lowrank_jax.training.loops import one_cycle_sgd as one_cycle_sgd
from lowrank_jax.training.loops import train as train
