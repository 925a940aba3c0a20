"""The picture of the README: `python docs/drawings/accuracy.py` writes docs/accuracy.png.

The figures are those of docs/comparison.md: accuracy of the ResNet-20 in percent by the share of
its macs, in percent, on all 10,000 test images of CIFAR-10, without training.
"""

from pathlib import Path

from matplotlib.figure import Figure

DENSE = 91.73
LINES = {
    "lowrank_jax, fitted": ({66: 91.11, 50: 90.86, 33: 88.73, 25: 85.83}, "#1f6feb", "o-"),
    "BALF, fitted": ({66: 83.94, 50: 65.29, 40: 41.64, 33: 22.27, 25: 19.35}, "#d9822b", "s-"),
    "AIMET, automatic ranks": ({50: 70.9, 33: 26.9}, "#8250df", "^-"),
    "lowrank_jax without data": ({66: 85.10, 50: 61.90, 33: 27.79, 25: 16.54}, "#8c959f", "o--"),
}


def draw() -> Figure:
    """Accuracy over the share of the macs, a line for each tool."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.axhline(DENSE, color="#57606a", lw=1, ls=":", label=f"dense network, {DENSE} %")
    for name, (points, color, style) in LINES.items():
        axis.plot(*zip(*sorted(points.items()), strict=True), style, color=color, label=name)
    axis.set(xlabel="multiply-accumulates left, %", ylabel="test accuracy, %", ylim=(0, 100))
    axis.invert_xaxis()
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False)
    return figure


if __name__ == "__main__":
    draw().savefig(Path(__file__).parents[1] / "accuracy.png", dpi=130)
