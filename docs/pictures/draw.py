"""Draw the pictures of docs/how_it_works.md beside this file: ``python docs/pictures/draw.py``.

Schematic: the energies and angles are chosen to be seen, not measured.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, Rectangle

FOLDER = Path(__file__).resolve().parent
BITS = {16: "#08306b", 8: "#2171b5", 4: "#6baed6", 2: "#c6dbef", 0: "#eeeeee"}
EXACT, LATENT, PADDING, INK = "#f4a582", "#6baed6", "#dddddd", "#333333"


def main() -> None:
    plt.rcParams.update({"font.size": 11, "svg.hashsalt": "lowrank-cache", "font.family": "DejaVu Sans"})
    for draw in (coder, frames, slots, attending):
        figure = draw()
        figure.savefig(FOLDER / f"{draw.__name__}.svg", bbox_inches="tight", facecolor="white", metadata={"Date": None})
        plt.close(figure)


def coder() -> plt.Figure:
    """One token's states, their latent by importance with its bits, and what is stored."""
    figure, axis = _canvas(13.6, 5.1, (0, 136), (0, 51))
    for layer in range(5):
        for side, color in (("keys", "#b2df8a"), ("values", "#fdbf6f")):
            y = 40 - 8 * layer - (0 if side == "keys" else 3.6)
            axis.add_patch(Rectangle((3, y), 15, 3.2, facecolor=color, edgecolor="white"))
            axis.text(10.5, y + 1.5, f"layer {layer}, {side}", ha="center", va="center", fontsize=8)
    axis.text(10.5, 47, "x: keys and values of\none token, five layers", ha="center", va="center")
    _arrow(axis, (20, 24), (34, 24), "(x − mean)\n· down_proj")
    energies = np.exp(-np.arange(40) / 7.5)
    bits = [16] + [8] * 4 + [4] * 9 + [2] * 10 + [0] * 16
    for channel, (energy, width) in enumerate(zip(energies, bits, strict=True)):
        axis.add_patch(Rectangle((36 + channel, 7), 0.85, 1 + 34 * energy, facecolor=BITS[width], edgecolor="none"))
    axis.text(56, 47, "z: channels of the latent,\nsorted by what dropping one costs", ha="center", va="center")
    for index, (width, color) in enumerate(BITS.items()):
        axis.add_patch(Rectangle((60, 37 - 4 * index), 2.2, 2.6, facecolor=color, edgecolor="#999999", linewidth=0.4))
        label = f"{width} bits" if width else "0 bits: read as the mean"
        axis.text(63.2, 38.2 - 4 * index, label, va="center", fontsize=9)
    axis.plot([36, 76], [6.7, 6.7], color=INK, linewidth=0.8)
    axis.text(56, 4, "← most important            least important →", ha="center", fontsize=8)
    _arrow(axis, (80, 14), (93, 14), "quantize,\npack")
    rows = [(16, 3), (8, 6), (4, 7), (2, 4)]
    for index, (width, size) in enumerate(rows):
        y = 22 - 4.6 * index
        axis.add_patch(Rectangle((96, y), 2 * size, 3.4, facecolor=BITS[width], edgecolor="white"))
        if width < 16:
            axis.add_patch(Rectangle((96 + 2 * size + 0.5, y), 2, 3.4, facecolor="#bbbbbb", edgecolor="white"))
    axis.text(
        106,
        32.5,
        "stored of the token: packed codes\nof each tier, and a step (grey)\nof each quantized tier",
        ha="center",
        va="center",
        fontsize=9,
    )
    _arrow(axis, (116, 14), (126, 14), "z · up_proj\n+ mean")
    axis.add_patch(Rectangle((128, 6), 5, 20, facecolor="#e0e0e0", edgecolor="white"))
    axis.text(130.5, 16, "x̂, as it is read", rotation=90, ha="center", va="center", fontsize=9)
    return figure


def frames() -> plt.Figure:
    """The same key at every slot: as attention sees it, in frames of 8 slots, and before rotation."""
    figure, axis = _canvas(13, 6.2, (-9, 33), (-1.2, 12.4))
    step, length = 0.35, 8
    rows = [
        (
            10,
            "post-RoPE\n(frame = ∞)",
            lambda n: n * step,
            "each slot has its own angle: one query serves all slots, but the keys differ and compress badly",
        ),
        (
            6,
            "frames of 8",
            lambda n: (n % length) * step,
            "angles start again in each frame: the query is turned once per frame, by −m",
        ),
        (
            2,
            "pre-RoPE\n(frame = 1)",
            lambda n: 0.0,
            "all alike: compresses best, but each key must be reconstructed and turned to be scored",
        ),
    ]
    colors = ["#1b9e77", "#d95f02", "#7570b3", "#e7298a"]
    for y, label, angle, remark in rows:
        axis.text(-1.2, y, label, ha="right", va="center")
        axis.text(15.5, y - 1.55, remark, ha="center", va="center", fontsize=10, style="italic")
        for slot in range(32):
            color = colors[slot // length] if y == 6 else INK
            dx, dy = 0.75 * np.cos(angle(slot)), 0.75 * np.sin(angle(slot))
            axis.add_patch(
                FancyArrowPatch(
                    (slot - dx / 2, y - dy / 2),
                    (slot + dx / 2, y + dy / 2),
                    arrowstyle="-|>",
                    mutation_scale=9,
                    color=color,
                    linewidth=1.4,
                )
            )
    for frame in range(4):
        axis.add_patch(
            Rectangle(
                (frame * length - 0.5, 5.1), length - 0.1, 1.8, facecolor=colors[frame], alpha=0.12, edgecolor="none"
            )
        )
        axis.text(frame * length - 0.4, 7.15, f"m = {frame * length}", fontsize=9, color=colors[frame])
    axis.text(15.5, 11.9, "one pair of numbers of the same key, cached at slots 0 to 31", ha="center", va="center")
    axis.text(15.5, -0.7, "slot →", ha="center", va="center", fontsize=9)
    return figure


def slots() -> plt.Figure:
    """Two sequences of a batch: where sinks, latents and the window lie, and what moves."""
    figure, axis = _canvas(13, 4.0, (-14, 118), (-4, 36))
    for y, label, padding in ((20, "sequence 0", 0), (8, "sequence 1,\nleft-padded", 14)):
        axis.text(-2, y + 2.5, label, ha="right", va="center")
        parts = [(padding, PADDING), (3, EXACT), (73 - padding, LATENT), (28, EXACT)]
        start = 0.0
        for size, color in parts:
            axis.add_patch(Rectangle((start, y), size, 5, facecolor=color, edgecolor="white", linewidth=1.2))
            start += size
        for block in range(12, 76, 8):
            if block > padding + 3:
                axis.plot([block, block], [y, y + 5], color="white", linewidth=0.8)
    for x, text in (
        (1.5, "sinks: the first 4 real\ntokens, exactly"),
        (45, "latents, in blocks of 64 tokens"),
        (90, "window: the last 128 to 191\ntokens, exactly"),
    ):
        axis.text(x, 28.5, text, ha="left" if x < 10 else "center", va="center", fontsize=10)
    axis.text(7, 10.5, "padding", ha="center", va="center", fontsize=9)
    _arrow(axis, (82, 7), (72, 7), "")
    axis.text(77, 3.2, "a full window gives its\noldest block to the latents", ha="center", va="center", fontsize=9)
    _arrow(axis, (112, 16.5), (105, 16.5), "")
    axis.text(113, 16.5, "new\ntokens", va="center", fontsize=9)
    axis.text(
        30,
        1,
        "slots are the same for all sequences; each sequence has its own positions →",
        ha="center",
        va="center",
        fontsize=9,
    )
    return figure


def attending() -> plt.Figure:
    """What a layer gets back from the cache in the two ways of attending."""
    figure, axis = _canvas(13, 4.2, (0, 130), (0, 42))
    _box(axis, 0, 16, 22, 10, "attention layer:\nnew keys and values", "#eeeeee")
    _box(axis, 36, 16, 20, 10, "LowRankCache", LATENT)
    _box(axis, 72, 27, 26, 11, "all keys and values\nof this layer, reconstructed", EXACT)
    _box(axis, 72, 4, 26, 11, "sinks, packed latents,\nwindow: as they are stored", LATENT)
    _box(axis, 108, 27, 22, 11, "the model's\nown attention", "#eeeeee")
    _box(axis, 108, 4, 22, 11, "three attentions,\njoined by their\nlog-sum-exps", "#eeeeee")
    _arrow(axis, (22, 21), (35.5, 21), "update")
    _arrow(axis, (56, 23), (71.5, 31), "")
    _arrow(axis, (56, 19), (71.5, 11), "")
    axis.text(61, 31.5, "attend=\n'reconstruct'", ha="center", va="center", fontsize=10)
    axis.text(60, 9, "attend='auto'\n(default)", ha="center", va="center", fontsize=10)
    _arrow(axis, (98, 32.5), (107.5, 32.5), "")
    _arrow(axis, (98, 9.5), (107.5, 9.5), "")
    return figure


def _box(axis, x: float, y: float, width: float, height: float, label: str, color: str) -> None:
    axis.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor=INK, linewidth=0.8))
    axis.text(x + width / 2, y + height / 2, label, ha="center", va="center", fontsize=10)


def _canvas(width: float, height: float, x: tuple, y: tuple):
    figure, axis = plt.subplots(figsize=(width, height))
    axis.set(xlim=x, ylim=y)
    axis.axis("off")
    return figure, axis


def _arrow(axis, start: tuple, end: tuple, label: str) -> None:
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=16, color=INK, linewidth=1.4))
    axis.text((start[0] + end[0]) / 2, start[1] + 1, label, ha="center", va="bottom", fontsize=9)


if __name__ == "__main__":
    main()
