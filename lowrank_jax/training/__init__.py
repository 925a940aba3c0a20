"""Training of any model and any tree of parameters, dense or decomposed."""

from lowrank_jax.training.augmentation import chain as chain
from lowrank_jax.training.augmentation import crop_and_flip as crop_and_flip
from lowrank_jax.training.augmentation import crops_and_flips as crops_and_flips
from lowrank_jax.training.augmentation import cutmix as cutmix
from lowrank_jax.training.augmentation import mixup as mixup
from lowrank_jax.training.decay import frobenius_decay as frobenius_decay
from lowrank_jax.training.decay import nuclear_decay as nuclear_decay
from lowrank_jax.training.decay import orthogonal_decay as orthogonal_decay
from lowrank_jax.training.evaluation import evaluate as evaluate
from lowrank_jax.training.finetuning import finetune as finetune
from lowrank_jax.training.losses import Loss as Loss
from lowrank_jax.training.losses import cross_entropy as cross_entropy
from lowrank_jax.training.losses import distillation as distillation
from lowrank_jax.training.losses import layer_matching as layer_matching
from lowrank_jax.training.losses import squared_error as squared_error
from lowrank_jax.training.metrics import read_metrics as read_metrics
from lowrank_jax.training.optimizers import carry_optimizer as carry_optimizer
from lowrank_jax.training.optimizers import one_cycle_sgd as one_cycle_sgd
from lowrank_jax.training.shrinking import shrink as shrink
from lowrank_jax.training.state import TrainState as TrainState
from lowrank_jax.training.steps import make_step as make_step
