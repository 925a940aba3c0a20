"""The networks of forward.py in PyTorch: eager, channels_last, the very same weights.

A worker process (turns.py): reads an .npz of flattened Flax variables and of the images.

python benchmarks/rival_torch.py WEIGHTS.npz --network nin --dtype float32
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from turns import repeated, serve


class Net:
    """Layers by their path in the Flax tree; a convolution is two where the tree holds factors."""

    def __init__(self, arrays: dict[str, np.ndarray], dtype: torch.dtype) -> None:
        self.conv_weights, self.vectors, self.dtype = {}, {}, dtype
        for name, value in arrays.items():
            tensor = torch.from_numpy(np.ascontiguousarray(value))
            if value.ndim == 4:
                kernel = tensor.permute(3, 2, 0, 1).to(dtype)
                self.conv_weights[name] = kernel.contiguous(memory_format=torch.channels_last)
            else:
                self.vectors[name] = (
                    (tensor.T if value.ndim == 2 else tensor).to(dtype).contiguous()
                )

    def conv(self, path: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        if f"{path}/kernel" in self.conv_weights:
            return self._one(
                f"{path}/kernel", x, (stride, stride), self.vectors.get(f"{path}/bias")
            )
        pairs = (("vertical", "horizontal"), ("horizontal_first", "vertical_second"))
        one, two = next(
            names for names in pairs if f"{path}/{names[0]}/kernel" in self.conv_weights
        )
        strides = ((stride, 1), (1, stride)) if one == "vertical" else ((1, stride), (stride, 1))
        x = self._one(f"{path}/{one}/kernel", x, strides[0], None)
        return self._one(
            f"{path}/{two}/kernel", x, strides[1], self.vectors.get(f"{path}/{two}/bias")
        )

    def _one(
        self, name: str, x: torch.Tensor, stride: tuple, bias: torch.Tensor | None
    ) -> torch.Tensor:
        kernel = self.conv_weights[name]
        padding = tuple(size // 2 for size in kernel.shape[2:])
        return F.conv2d(x, kernel, bias, stride, padding)

    def norm(self, path: str, x: torch.Tensor) -> torch.Tensor:
        mean, var, scale, bias = (
            self.vectors[f"{path}/{name}"] for name in ("mean", "var", "scale", "bias")
        )
        return F.batch_norm(x, mean, var, scale, bias, eps=1e-5)

    def dense(self, path: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.vectors[f"{path}/kernel"], self.vectors[f"{path}/bias"])


def nin(net: Net, x: torch.Tensor) -> torch.Tensor:
    for index in range(6):
        x = net.conv(f"Conv_{index}", x)
        if index == 5:
            return x.mean((2, 3))
        x = F.relu(
            net.norm(f"BatchNorm_{index}", x) if f"BatchNorm_{index}/mean" in net.vectors else x
        )
        if index == 1:
            x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        if index == 3:
            x = F.avg_pool2d(x, 3, 2, ceil_mode=True, divisor_override=9)
    return x


def vgg16(net: Net, x: torch.Tensor) -> torch.Tensor:
    index = 0
    for count in (2, 2, 3, 3, 3):
        for _ in range(count):
            x, index = F.relu(net.conv(f"Conv_{index}", x)), index + 1
        x = F.max_pool2d(x, 2)
    return x.permute(0, 2, 3, 1)


def resnet20(net: Net, x: torch.Tensor) -> torch.Tensor:
    x = F.relu(net.norm("BatchNorm_0", net.conv("Conv_0", x)))
    for block in range(9):
        path, stride = f"BasicBlock_{block}", 2 if block in (3, 6) else 1
        y = F.relu(net.norm(f"{path}/BatchNorm_0", net.conv(f"{path}/Conv_0", x, stride)))
        y = net.norm(f"{path}/BatchNorm_1", net.conv(f"{path}/Conv_1", y))
        extra = y.shape[1] - x.shape[1]
        x = (
            F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, extra // 2, extra - extra // 2))
            if extra
            else x
        )
        x = F.relu(x + y)
    return net.dense("Dense_0", x.mean((2, 3)))


def resnet50(net: Net, x: torch.Tensor) -> torch.Tensor:
    x = F.max_pool2d(F.relu(net.norm("BatchNorm_0", net.conv("Conv_0", x, 2))), 3, 2, 1)
    starts = (0, 3, 7, 13)
    for block in range(16):
        path, stride = f"Bottleneck_{block}", 2 if block in starts[1:] else 1
        y = F.relu(net.norm(f"{path}/BatchNorm_0", net.conv(f"{path}/Conv_0", x)))
        y = F.relu(net.norm(f"{path}/BatchNorm_1", net.conv(f"{path}/Conv_1", y, stride)))
        y = net.norm(f"{path}/BatchNorm_2", net.conv(f"{path}/Conv_2", y))
        x = (
            net.norm(f"{path}/BatchNorm_3", net.conv(f"{path}/Conv_3", x, stride))
            if block in starts
            else x
        )
        x = F.relu(x + y)
    return net.dense("Dense_0", x.mean((2, 3)))


NETWORKS = {"nin": nin, "vgg16": vgg16, "resnet20": resnet20, "resnet50": resnet50}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights")
    parser.add_argument("--network", choices=NETWORKS, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()

    def prepare():
        arrays = dict(np.load(args.weights))
        dtype = getattr(torch, args.dtype)
        images = torch.from_numpy(arrays.pop("images")).permute(0, 3, 1, 2)
        images = images.to(dtype).contiguous(memory_format=torch.channels_last)
        net, forward = Net(arrays, dtype), NETWORKS[args.network]
        outputs = forward(net, images)
        run, count = repeated(lambda: forward(net, images))
        first = outputs[0].float().flatten()[:1000].tolist()
        return {"outputs": first, "repeats": count, "torch": torch.__version__}, run

    with torch.inference_mode():
        serve(prepare)


if __name__ == "__main__":
    main()
