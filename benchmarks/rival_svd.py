"""One program that decomposes all kernels of a file, as a worker of `turns`; run by decompose.py.

python benchmarks/rival_svd.py {ours,jit,torch,numpy,aimet} KERNELS.npz [--cold]

The file holds float32 kernels (h, w, c, n), the ranks are those of half the weights. Each library
is imported only for its own program. The facts are its version, the ranks and the Frobenius error
of every layer, in float64; with --cold nothing is run before the first turn, and the facts are the
version alone.
"""

import argparse
import time
from collections.abc import Callable
from decimal import Decimal

import numpy as np
from turns import serve

Kernels = dict[str, np.ndarray]
Pairs = list[tuple[np.ndarray, np.ndarray]]  # (h, 1, c, K) and (1, w, K, n)
Made = tuple[
    str, Callable[[], object], Callable[[object], Pairs], dict
]  # version, program, what it gave, facts


def half_rank(shape: tuple[int, ...]) -> int:
    """The largest rank at which the factors of a kernel (h, w, c, n) have half its weights."""
    h, w, c, n = shape
    return h * w * c * n // (2 * (h * c + w * n))


def error(kernel: np.ndarray, pair: tuple[np.ndarray, np.ndarray]) -> float:
    """The Frobenius norm of what a pair of factors leaves out of a kernel, in float64."""
    vertical, horizontal = (np.asarray(factor, np.float64) for factor in pair)
    rank = horizontal.shape[2]
    dense = vertical.reshape(-1, rank) @ horizontal[0].transpose(1, 0, 2).reshape(rank, -1)
    h, w, c, n = kernel.shape
    return float(np.linalg.norm(dense.reshape(h, c, w, n).transpose(0, 2, 1, 3) - kernel))


def ours(kernels: Kernels) -> Made:
    """`lowrank_jax.decompose` of arrays with values."""
    import jax

    from lowrank_jax import decompose

    params, ranks = _tree(kernels)
    return (
        f"jax {jax.__version__}",
        lambda: jax.block_until_ready(decompose(params, ranks)),
        _leaves(ranks),
        {},
    )


def jit(kernels: Kernels) -> Made:
    """The same within ``jax.jit``, which is ``jnp.linalg.svd``; compiled at the first turn."""
    import jax

    from lowrank_jax import decompose

    params, ranks = _tree(kernels)
    programs, facts = [], {}

    def run():
        if not programs:
            start = time.perf_counter()
            programs.append(jax.jit(lambda tree: decompose(tree, ranks)).lower(params).compile())
            facts["compile s"] = time.perf_counter() - start
        return jax.block_until_ready(programs[0](params))

    return f"jax {jax.__version__}", run, _leaves(ranks), facts


def numpy(kernels: Kernels) -> Made:
    """The textbook decomposition by hand with NumPy, which computes in float64 and rounds."""

    def split(kernel):
        h, w, c, n = kernel.shape
        rank = half_rank(kernel.shape)
        u, s, qt = np.linalg.svd(
            kernel.transpose(0, 2, 1, 3).reshape(h * c, w * n), full_matrices=False
        )
        root = np.sqrt(s[:rank])
        vertical = (u[:, :rank] * root).reshape(h, 1, c, rank)
        horizontal = (root[:, None] * qt[:rank]).reshape(rank, w, n).transpose(1, 0, 2)[None]
        return vertical, np.ascontiguousarray(horizontal)

    return (
        f"numpy {np.__version__}",
        lambda: [split(kernel) for kernel in kernels.values()],
        list,
        {},
    )


def torch(kernels: Kernels) -> Made:
    """The same, written by hand with PyTorch in its own layout."""
    import torch

    weights = [torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()) for kernel in kernels.values()]

    def split(weight):
        n, c, h, w = weight.shape
        rank = half_rank((h, w, c, n))
        u, s, qt = torch.linalg.svd(
            weight.permute(2, 1, 3, 0).reshape(h * c, w * n), full_matrices=False
        )
        root = s[:rank].sqrt()
        vertical = (u[:, :rank] * root).reshape(h, c, rank).permute(2, 1, 0)[..., None]
        horizontal = (root[:, None] * qt[:rank]).reshape(rank, w, n).permute(2, 0, 1)[:, :, None]
        return vertical.contiguous(), horizontal.contiguous()

    return (
        f"torch {torch.__version__}",
        lambda: [split(weight) for weight in weights],
        _from_oihw,
        {},
    )


def aimet(kernels: Kernels) -> Made:
    """AIMET's compressor in its manual mode, with the smallest input that it can run forward."""
    import aimet_torch
    import torch
    from aimet_torch.common.defs import CompressionScheme, CostMetric
    from aimet_torch.compress import ModelCompressor
    from aimet_torch.defs import ModuleCompRatioPair, SpatialSvdParameters

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(conv(kernel) for kernel in kernels.values())

        def forward(self, x):
            return sum(layer(x[:, : layer.in_channels]).mean() for layer in self.layers)

    def conv(kernel):
        h, w, c, n = kernel.shape
        layer = torch.nn.Conv2d(c, n, (h, w), padding=(h // 2, w // 2), bias=False)
        layer.weight.data = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
        return layer

    net, mode = Net(), SpatialSvdParameters.Mode.manual
    pairs = [
        ModuleCompRatioPair(x, share(k)) for x, k in zip(net.layers, kernels.values(), strict=True)
    ]
    parameters = SpatialSvdParameters(mode, SpatialSvdParameters.ManualModeParams(pairs))
    size = (1, max(kernel.shape[2] for kernel in kernels.values()), 8, 8)
    how = (size, CompressionScheme.spatial_svd, CostMetric.memory, parameters)

    def run():
        with torch.no_grad():
            return ModelCompressor.compress_model(net, lambda *_: 0.0, None, *how)[0]

    def pairs_of(small):
        return _from_oihw([(one.weight.detach(), two.weight.detach()) for one, two in small.layers])

    return f"aimet_torch {aimet_torch.__version__}, torch {torch.__version__}", run, pairs_of, {}


def share(kernel: np.ndarray) -> Decimal:
    """The share of the weights at which AIMET takes our rank."""
    h, w, c, n = kernel.shape
    return Decimal(half_rank(kernel.shape) * (h * c + w * n)) / Decimal(kernel.size) + Decimal(
        "1e-9"
    )


def _tree(kernels: Kernels) -> tuple[dict, dict[str, int]]:
    import jax

    params = jax.block_until_ready(
        {name: {"kernel": jax.device_put(kernel)} for name, kernel in kernels.items()}
    )
    return params, {name: half_rank(kernel.shape) for name, kernel in kernels.items()}


def _leaves(names) -> Callable[[object], Pairs]:
    """By name, because jit sorts the keys."""
    factors = ("vertical", "horizontal")
    return lambda params: [
        tuple(np.asarray(params[name]["kernel"][key]) for key in factors) for name in names
    ]


def _from_oihw(pairs) -> Pairs:
    return [tuple(factor.numpy().transpose(2, 3, 1, 0) for factor in pair) for pair in pairs]


PROGRAMS = {"ours": ours, "jit": jit, "torch": torch, "numpy": numpy, "aimet": aimet}


def prepare(program: str, path: str, cold: bool) -> tuple[dict, Callable[[], object]]:
    """The facts of a program, after a first run if it is to be warm, and the program."""
    with np.load(path) as file:
        kernels = {name: file[name] for name in file.files}
    version, run, pairs_of, facts = PROGRAMS[program](kernels)
    if not cold:
        pairs = pairs_of(run())
        facts["ranks"] = [pair[1].shape[2] for pair in pairs]
        facts["errors"] = [
            error(kernel, pair) for kernel, pair in zip(kernels.values(), pairs, strict=True)
        ]
    return {"version": version, **facts}, run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("kernels")
    parser.add_argument("--cold", action="store_true")
    args = parser.parse_args()
    serve(lambda: prepare(args.program, args.kernels, args.cold))
