"""`jit`-compiled training and evaluation, for any model and any parameter tree."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from lowrank_jax.program.compiler import default_options

Apply = Callable[..., Any]  # model.apply of a Linen model whose __call__ takes train=
Preprocess = Callable[[jax.Array], jax.Array]


@flax.struct.dataclass
class TrainState:
    """Everything that a training step changes.

    Attributes:
        params: the trained tree.
        collections: the other variables of the model, such as ``batch_stats``.
        optimizer: state of the optimiser.
        key: typed random key, split at every step.
    """

    params: chex.ArrayTree
    collections: chex.ArrayTree
    optimizer: optax.OptState
    key: chex.PRNGKey

    @classmethod
    def create(
        cls, variables: dict[str, Any], tx: optax.GradientTransformation, seed: int
    ) -> "TrainState":
        """A state at step 0; copies the variables, because a training step donates its state."""
        variables = jax.tree.map(jnp.copy, dict(variables))
        params = variables.pop("params")
        return cls(params, variables, tx.init(params), jax.random.key(seed))

    @property
    def variables(self) -> dict[str, Any]:
        """What ``model.apply`` takes."""
        return {"params": self.params, **self.collections}


def crop_and_flip(key: chex.PRNGKey, images: jax.Array, size: int, padding: int) -> jax.Array:
    """Pads with zeros, takes a random square and mirrors half of the images, on the device.

    Args:
        key: random key.
        images: (batch, height, width, channels).
        size: side of the square in pixels, at most height + 2 * padding.
        padding: zeros added on each side, in pixels.

    Returns:
        Array of shape (batch, size, size, channels).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> crop_and_flip(jax.random.key(0), jnp.ones((4, 32, 32, 3)), size=24, padding=0).shape
        (4, 24, 24, 3)
    """
    batch, height, width, channels = images.shape
    room = jnp.array((height, width)) + 2 * padding - size
    if min(height, width) + 2 * padding < size:
        raise ValueError(
            f"size={size} is larger than the padded images, {height}x{width} with "
            f"padding={padding}; give a smaller size or more padding."
        )
    corner_key, flip_key = jax.random.split(key)
    corners = jax.random.randint(corner_key, (batch, 2), 0, room + 1)
    flips = jax.random.bernoulli(flip_key, shape=(batch, 1, 1, 1))
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))

    def square(image: jax.Array, corner: jax.Array) -> jax.Array:
        start = (corner[0], corner[1], 0)
        return jax.lax.dynamic_slice(image, start, (size, size, channels))

    squares = jax.vmap(square)(padded, corners)
    return jnp.where(flips, squares[:, :, ::-1], squares)


def make_train_step(
    apply: Apply,
    tx: optax.GradientTransformation,
    augment: Callable[[chex.PRNGKey, jax.Array], jax.Array],
    teacher: Callable[[jax.Array], jax.Array] | None = None,
) -> Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, jax.Array]]:
    """Compiles one step of minimising the cross-entropy; the state is donated.

    Args:
        apply: ``model.apply`` of a model whose call takes ``train=True``.
        tx: optimiser.
        augment: (key, images as stored) to the network's inputs.
        teacher: inputs to logits; where given, its probabilities are the targets in place of the
            labels (distillation; Hinton et al., 2015, arXiv 1503.02531, at temperature 1).

    Returns:
        Function (state, images, labels) to (state, mean loss).
    """

    def loss_fn(params, collections, inputs, labels):
        logits, updated = apply(
            {"params": params, **collections}, inputs, train=True, mutable=list(collections)
        )
        if teacher is None:
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updated
        return optax.softmax_cross_entropy(logits, jax.nn.softmax(teacher(inputs))).mean(), updated

    def step(state, images, labels):
        key, augment_key = jax.random.split(state.key)
        inputs = augment(augment_key, images)
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, collections), grads = grad_fn(state.params, state.collections, inputs, labels)
        updates, optimizer = tx.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, dict(collections), optimizer, key), loss

    return jax.jit(step, donate_argnums=0, compiler_options=default_options())


def one_cycle_sgd(
    peak: float, steps: int, weight_decay: float = 5e-4
) -> optax.GradientTransformation:
    """SGD with Nesterov momentum 0.9 under a one-cycle cosine schedule.

    The learning rate peaks after a fifth of the steps.
    """
    schedule = optax.cosine_onecycle_schedule(
        max(steps, 2), peak, pct_start=0.2, div_factor=10, final_div_factor=1e3
    )
    decay = optax.add_decayed_weights(
        weight_decay, lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    )
    return optax.chain(decay, optax.sgd(schedule, momentum=0.9, nesterov=True))


def batches(count: int, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Shuffled indices of one epoch in full batches; the few left over are dropped."""
    order = rng.permutation(count)
    for start in range(0, count - count % size, size):
        yield order[start : start + size]


def train(
    state: TrainState,
    step: Callable,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    epochs: int,
    batch_size: int,
    seed: int = 0,
    after_epoch: Callable[[int, TrainState, float], None] = lambda epoch, state, loss: None,
) -> TrainState:
    """Runs training steps over shuffled data, with a progress bar on a terminal.

    Args:
        state: start; donated to the first step.
        step: from `make_train_step`.
        images, labels: arrays with the same first axis, which must hold at least one batch.
        epochs: passes over the data.
        batch_size: images in a step.
        seed: of the shuffling; with the state's own key it makes a run reproducible.
        after_epoch: called with (epoch from 1, state, mean loss).
    """
    if len(labels) < batch_size:
        raise ValueError(
            f"batch_size={batch_size} is more than the {len(labels)} training images; make it "
            "smaller."
        )
    rng = np.random.default_rng(seed)
    for epoch in range(1, epochs + 1):
        losses = []
        progress = tqdm(
            batches(len(labels), batch_size, rng),
            f"epoch {epoch}/{epochs}",
            len(labels) // batch_size,
            leave=False,
            disable=None,
        )
        for rows in progress:
            state, loss = step(state, images[rows], labels[rows])
            losses.append(loss)
        after_epoch(epoch, state, float(jnp.mean(jnp.stack(losses))))
    return state


@functools.lru_cache(maxsize=8)  # what is kept, keeps its function, too
def _count_correct(apply, preprocess):
    def count(variables, images, labels):
        return jnp.sum(jnp.argmax(apply(variables, preprocess(images)), -1) == labels)

    return jax.jit(count, compiler_options=default_options())


def evaluate(
    apply: Apply,
    variables: chex.ArrayTree,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    preprocess: Preprocess = lambda images: images,
    batch_size: int = 250,
) -> float:
    """Share of the images whose largest logit is the label, exact for any count of images.

    The last partial batch is filled with the label -1, which no prediction equals.

    Returns:
        A number from 0 to 1.
    """
    if not len(labels):
        raise ValueError("evaluate needs at least one image.")
    correct, count = 0, _count_correct(apply, preprocess)
    for start in range(0, len(labels), batch_size):
        x, y = images[start : start + batch_size], labels[start : start + batch_size]
        missing = batch_size - len(y)
        x = np.pad(x, ((0, missing),) + ((0, 0),) * (x.ndim - 1))
        correct += int(count(variables, x, np.pad(y, (0, missing), constant_values=-1)))
    return correct / len(labels)
