"""The residual network is the published one, and with the published weights it classifies as
published."""

import functools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from lowrank_jax import data
from lowrank_jax.io.torch_names import from_torch
from lowrank_jax.io.weights import load_weights
from lowrank_jax.models import CifarResNet
from lowrank_jax.training.evaluation import evaluate

SHARED = Path(__file__).parents[3] / "shared" / "data"
WEIGHTS = (
    SHARED / "resnet20_cifar10_torch.npz"
)  # ResNet-20 of Y. Idelbayev, 91.7 % on the test images
needs_weights = pytest.mark.skipif(
    not WEIGHTS.exists(), reason=f"no {WEIGHTS.name} beside the repository"
)
needs_cifar = pytest.mark.skipif(
    not (SHARED / "tensorflow_datasets").exists(), reason="no prepared CIFAR-10"
)
IMAGES = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)


def skeleton(**options):
    return jax.eval_shape(CifarResNet(**options).init, jax.random.key(0), IMAGES)


def preprocess(images):
    """The scaling that the published weights were trained with, which is not
    `lowrank_jax.data.normalize`."""
    scaled = images.astype(jnp.float32) / 255
    return (scaled - jnp.array((0.485, 0.456, 0.406))) / jnp.array((0.229, 0.224, 0.225))


@functools.cache
def published():
    return from_torch(load_weights(WEIGHTS), CifarResNet().apply, skeleton(), IMAGES)


def torch_logits(tensors, images):
    """The network as PyTorch's layers compute it, on (batch, channels, height, width)."""

    def conv(x, name, stride):
        dims = ("NCHW", "OIHW", "NCHW")
        return jax.lax.conv_general_dilated(
            x, tensors[name], (stride,) * 2, ((1, 1), (1, 1)), dimension_numbers=dims
        )

    def norm(x, name):
        leaves = (
            tensors[f"{name}.{leaf}"] for leaf in ("weight", "bias", "running_mean", "running_var")
        )
        scale, bias, mean, var = (leaf[:, None, None] for leaf in leaves)
        return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias

    x = jax.nn.relu(norm(conv(images, "conv1.weight", 1), "bn1"))
    for stage in (1, 2, 3):
        for block in range(3):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = jax.nn.relu(norm(conv(x, f"{name}.conv1.weight", stride), f"{name}.bn1"))
            y = norm(conv(y, f"{name}.conv2.weight", 1), f"{name}.bn2")
            extra = (y.shape[1] - x.shape[1]) // 2
            x = jax.nn.relu(
                y + jnp.pad(x[:, :, ::stride, ::stride], ((0, 0), (extra, extra), (0, 0), (0, 0)))
            )
    return x.mean((2, 3)) @ tensors["linear.weight"].T + tensors["linear.bias"]


# Table 6 of He et al., 2015, in millions; batch normalisation included.
@pytest.mark.parametrize(
    "depth, millions", [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)]
)
def test_the_depths_of_the_paper_have_its_parameters(depth, millions):
    params = flatten_dict(skeleton(depth=depth)["params"], sep="/")
    assert sum(leaf.size for leaf in params.values()) / 1e6 == pytest.approx(millions, rel=0.03)
    assert sum(path.endswith("kernel") for path in params) == depth


@pytest.mark.parametrize("depth", [19, 2, 18, 0, -4])
def test_another_depth_is_refused(depth):
    with pytest.raises(ValueError, match=rf"depth={depth} is not 6n \+ 2 .* 8, 14, 20"):
        skeleton(depth=depth)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_logits_parameters_and_statistics_are_float32_whatever_the_computation(dtype):
    model, variables = (
        CifarResNet(depth=8, num_classes=7, dtype=dtype),
        skeleton(depth=8, num_classes=7),
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(
        skeleton(depth=8, num_classes=7, dtype=dtype), variables
    )
    apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    logits, updates = jax.eval_shape(apply, variables, IMAGES)
    chex.assert_shape(logits, (2, 7))
    chex.assert_type([logits, *jax.tree.leaves(updates)], jnp.float32)


def test_any_image_size_is_accepted():
    model = CifarResNet(depth=8)
    for size in (8, 17, 40):
        images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        assert jax.eval_shape(model.apply, skeleton(depth=8), images).shape == (1, 10)


@needs_weights
def test_every_published_tensor_has_its_leaf():
    variables, report = published()
    chex.assert_trees_all_equal_shapes_and_dtypes(variables, skeleton())
    assert report.complete and len(report.pairs) == 97


@needs_weights
def test_the_logits_are_those_of_pytorchs_layers():
    images = preprocess(jnp.asarray(data.sample("test").images[:4]))
    expected = jax.jit(torch_logits)(load_weights(WEIGHTS), images.transpose(0, 3, 1, 2))
    found = jax.jit(CifarResNet().apply)(published()[0], images)
    assert np.abs(expected).max() > 5
    np.testing.assert_allclose(
        found, expected, atol=1e-3
    )  # float32 through 20 layers, logits of the order of 10


@needs_weights
def test_a_few_images_are_classified_as_published():
    test = data.sample("test")
    share = evaluate(
        CifarResNet().apply,
        published()[0],
        test.images[::4],
        test.labels[::4],
        preprocess=preprocess,
    )
    assert share > 0.85  # 91.7 % of all; 250 images: 1.7 % standard deviation


@pytest.mark.slow
@needs_weights
@needs_cifar
def test_all_test_images_are_classified_as_published():
    test = data.cifar10("test", str(SHARED / "tensorflow_datasets"))
    share = evaluate(
        CifarResNet().apply, published()[0], test.images, test.labels, preprocess=preprocess
    )
    assert 0.915 <= share <= 0.919
