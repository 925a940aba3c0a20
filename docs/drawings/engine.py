"""The picture of the engine on the page about the inside."""

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

BOX, ARROW = "#eef2f7", "#5b6b7f"
INPUTS = ["f(tree, x)", "tree with factors"]
STEPS = ["make_jaxpr\nwith abstract kernels", "provenance:\nwhich kernel is this?"]
RULES = {
    "trace": "note geometry, cost, safety",
    "lowrank": "run two smaller operations",
    "calibrate": "add up second moments",
    "compress": "fit factors, go on with both",
    "fast": "run the measured algorithm",
}


def draw() -> Figure:
    """The program of a function, its walk, and the rules of the verbs."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axis = figure.subplots()
    axis.set(xlim=(0, 9), ylim=(0, 4.2))
    axis.axis("off")
    for row, text in enumerate(INPUTS):
        _box(axis, 0.1, 2.5 - 1.2 * row, 1.6, text)
        _arrow(axis, (1.7, 2.8 - 1.2 * row), (2.1, 2.2))
    for column, text in enumerate(STEPS):
        _box(axis, 2.1 + 1.95 * column, 1.8, 1.75, text, height=0.8)
    _arrow(axis, (3.85, 2.2), (4.05, 2.2))
    _box(axis, 6.0, 0.2, 0.75, "walk", height=3.8)
    _arrow(axis, (5.8, 2.2), (6.0, 2.2))
    for row, (verb, what) in enumerate(RULES.items()):
        _box(axis, 7.05, 3.4 - 0.8 * row, 1.9, f"{verb}\n{what}", size=7.5)
        _arrow(axis, (6.75, 3.7 - 0.8 * row), (7.05, 3.7 - 0.8 * row))
    return figure


def _box(axis, x, y, width, text, height=0.6, size=8.5):
    style = "round,pad=0,rounding_size=0.08"
    axis.add_patch(FancyBboxPatch((x, y), width, height, style, fc=BOX, ec=ARROW))
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", size=size)


def _arrow(axis, start, end):
    axis.annotate("", end, start, arrowprops=dict(arrowstyle="->", color=ARROW))
