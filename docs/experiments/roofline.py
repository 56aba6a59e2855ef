"""What a decode step's attention over latents costs on paper: bytes and operations per token, against GPUs' peaks.

Counts follow the Triton kernels before the planes of a byte were multiplied apart: positions padded to whole chunks,
rows padded to tiles, joint latents read by two kernels, keys unpacked once per head where they are reconstructed.
Nothing here was measured on a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from lowrank_cache.budget import Tiers, spend, tier_bytes, tiers_loss
from lowrank_cache.calibration.fisher import weighted_basis
from lowrank_cache.calibration.moments import Moments
from lowrank_cache.shapes import BOTH, SIDES, layer_groups

__all__ = [
    "ASSUMPTIONS",
    "CARDS",
    "Attention",
    "Card",
    "KernelCost",
    "LatentGroup",
    "Setting",
    "Share",
    "dense_time",
    "kernel_costs",
    "main",
    "measure_shares",
    "run_roofline",
]

WANTED = 0.8  # of the byte ratio
FRAME_LENGTHS = (1, 16, 64, 128)
_CHUNK = 128  # positions that the kernels unpack at once
_RECONSTRUCT_CHUNK, _RECONSTRUCT_TILE = 64, 128  # the same where keys are reconstructed, and tokens of a tile
_TILE = 64  # tokens of a tile of scores
_SPLIT = 2048  # tokens of a split
# Vector instructions of `weigh` per position beside unpacking: counted at 32 rows, the share that rows have is a guess.
_WEIGH_FIXED, _WEIGH_PER_ROW = 6.0, 5.0 / 32
_SOFTMAX = 10  # vector instructions per score of the full cache

ASSUMPTIONS = (
    "Assumptions: 85 % of the memory bandwidth and 60 % of the matrix and instruction peaks are reached, for the full "
    "cache as for latents; L2 bandwidths are assumed; within a kernel the scarcest resource decides, kernels follow "
    "one another; context long enough that launches, the query, sinks, window and the last up-projection do not count. "
    "Instructions per unpacked channel are counted in the machine code of the kernels' loops for sm_80 and sm_90 "
    "(taken for the RTX 4090 and the MI300X from sm_80). The full cache is float16, read once by an attention kernel "
    "that tiles the query heads of a KV head together. Each head group is a latent of its own; a joint latent is read "
    "from memory twice, for scores and for values."
)


@dataclass(frozen=True)
class Card:
    """Peaks of one GPU, per second.

    Attributes:
        memory: Bytes.
        l2: Bytes, assumed.
        matrix: float16 operations with float32 sums, dense.
        vector: Instructions times lanes.
        unpack: Vector instructions of the loop over scores per position that it unpacks.
    """

    name: str
    memory: float
    l2: float
    matrix: float
    vector: float
    unpack: float


# Memory and matrix peaks: vendors' data sheets. Vector: multiprocessors x lanes issued per clock x boost clock.
CARDS = (
    Card("A100-80G", 2.04e12, 4.5e12, 312e12, 108 * 128 * 1.41e9, 12),
    Card("H100-SXM", 3.35e12, 5.5e12, 989e12, 132 * 128 * 1.755e9, 7.5),
    Card("RTX 4090", 1.01e12, 5.0e12, 165e12, 128 * 128 * 2.52e9, 12),
    Card("MI300X", 5.3e12, 10e12, 1307e12, 304 * 64 * 2.1e9, 12),
)


@dataclass(frozen=True)
class Attention:
    """The attention of one layer, one query token."""

    q_heads: int
    heads: int
    head_dim: int


@dataclass(frozen=True)
class LatentGroup:
    """A latent as one layer reads it.

    Attributes:
        heads: KV heads of the layer that it holds.
        keys, values: ``(bits, channels)`` of the tiers that hold keys and values. The same in a joint latent.
        key_bytes, value_bytes: Of these tiers, padded, with steps.
    """

    heads: int
    keys: tuple[tuple[int, float], ...]
    values: tuple[tuple[int, float], ...]
    key_bytes: float
    value_bytes: float


@dataclass(frozen=True)
class KernelCost:
    """What one kernel needs per token of context and layer: bytes, operations, instructions, unpacked positions."""

    kernel: str
    memory: float
    l2: float
    matrix: float
    vector: float
    unpacked: float

    def times(self, card: Card) -> dict[str, float]:
        """Seconds by resource."""
        return {
            "memory": self.memory / (0.85 * card.memory),
            "L2": self.l2 / card.l2,
            "matrix": self.matrix / (0.6 * card.matrix),
            "instructions": (self.vector + card.unpack * self.unpacked) / (0.6 * card.vector),
        }

    def seconds(self, card: Card) -> float:
        return max(self.times(card).values())


def _positions(tiers: tuple[tuple[int, float], ...], chunk: int) -> int:
    """Channels padded to 16 bytes a row, then to whole chunks, over all tiers."""
    total = 0
    for bits, channels in tiers:
        granule = 128 // bits
        padded = -(-round(channels) // granule) * granule
        total += -(-padded // chunk) * chunk
    return total


def _padded_rows(rows: float, most: int) -> float:
    block = 16
    while block < min(rows, most):
        block *= 2
    return -(-rows // block) * block


def kernel_costs(attention: Attention, groups: list[LatentGroup], frame_length: int) -> list[KernelCost]:
    """Costs by kernel, per token of context, of one layer whose heads are cut into ``groups``."""
    per_head = attention.q_heads / attention.heads
    dim = attention.head_dim
    totals: dict[str, list[float]] = {}

    def add(kernel: str, memory: float, l2: float, matrix: float, vector: float, unpacked: float) -> None:
        for place, amount in enumerate((memory, l2, matrix, vector, unpacked)):
            totals.setdefault(kernel, [0.0] * 5)[place] += amount

    for group in groups:
        rows = per_head * group.heads
        if frame_length > per_head:
            positions = _positions(group.keys, _CHUNK)
            # Absorbed queries are written once a frame and read once a tile, within L2.
            add("absorb", 0, 2 * rows * positions / frame_length, 2 * rows * dim * positions / frame_length, 0, 0)
            padded = _padded_rows(rows, 128)
            read = group.key_bytes + 2 * rows * positions / min(frame_length, _TILE) + 4 * rows
            add("scores", group.key_bytes, read, 2 * padded * positions, 0, positions * -(-rows // 128))
        else:
            # Every head reads and unpacks the whole latent, and a tile of the up-projection for every tile of tokens.
            positions = _positions(group.keys, _RECONSTRUCT_CHUNK)
            read = group.heads * (group.key_bytes + 2 * positions * dim / _RECONSTRUCT_TILE) + 4 * rows
            matrix = group.heads * dim * 2 * (positions + _padded_rows(per_head, 64))
            add("scores", group.key_bytes, read, matrix, 0, positions * group.heads)
        positions = _positions(group.values, _CHUNK)
        blocks, padded = -(-rows // 64), _padded_rows(rows, 64)
        partial = 4 * rows * positions / _SPLIT
        read = group.value_bytes * blocks + 4 * rows * positions / _CHUNK + partial
        vector = positions * (_WEIGH_FIXED * blocks + _WEIGH_PER_ROW * padded)
        add("weigh", group.value_bytes, read, 2 * padded * positions, vector, positions * blocks)
        add("combine", 0, partial, 0, rows * positions / _SPLIT, 0)
    return [KernelCost(kernel, *amounts) for kernel, amounts in totals.items()]


def dense_time(attention: Attention, card: Card) -> float:
    """Seconds per token of context and layer of the full cache at 16 bits."""
    width = attention.heads * attention.head_dim
    size = 4.0 * width
    rows = _padded_rows(attention.q_heads / attention.heads, 64)
    return KernelCost("dense", size, size, 4 * width * rows, _SOFTMAX * rows * attention.heads, 0).seconds(card)


LLAMA = Attention(q_heads=32, heads=8, head_dim=128)


@dataclass(frozen=True)
class Setting:
    """How bases are cut: ``head_groups`` of a layer's heads, ``layers`` that share a latent, keys and values joint."""

    frame_length: int
    head_groups: int
    layers: int
    joint: bool


@dataclass(frozen=True)
class Share:
    """What a setting's budget bought on average, as fractions of the latent's width.

    Attributes:
        keys, values: Fraction of the width by bits; equal if joint, and then of both widths together.
        loss: Predicted, nats per token of the whole model.
        bytes: Per token of the whole model.
    """

    keys: dict[int, float]
    values: dict[int, float]
    loss: float
    bytes: int


def measure_shares(
    moments: Moments, setting: Setting, ratio: float, report: Callable[[str], object] = lambda message: None
) -> Share:
    """Bases of a setting from moments, and how the budget of a ratio is spent on their channels."""
    report(f"bases: {setting}")
    stores: list[tuple[str, int, np.ndarray]] = []
    for side in (BOTH,) if setting.joint else SIDES:
        for group in layer_groups(moments.shape, side, setting.layers):
            second, mean, sensitivity = moments.of_group(side, group, setting.frame_length)
            for rows in _head_rows(moments, side, group, setting.head_groups):
                part = rows[:, None], rows
                loss = weighted_basis(second[part], mean[rows], sensitivity[part])["loss"].double().numpy()
                stores.append((side, len(rows), loss))
    full = 2 * sum(layer.key.width + layer.value.width for layer in moments.shape.layers)
    counts = spend([loss for _, _, loss in stores], full / ratio)
    spent = [(side, width, count) for (side, width, _), count in zip(stores, counts, strict=True)]
    fractions = {
        side: _fractions([(width, count) for name, width, count in spent if name == side])
        for side in {name for name, _, _ in spent}
    }
    total = sum(tiers_loss(loss, count) for (_, _, loss), count in zip(stores, counts, strict=True))
    keys, values = (fractions[BOTH],) * 2 if setting.joint else (fractions[side] for side in SIDES)
    return Share(keys, values, total, sum(tier_bytes(*tier) for tiers in counts for tier in tiers))


def _head_rows(moments: Moments, side: str, group: tuple[int, ...], head_groups: int) -> list[Tensor]:
    """Row numbers of every head group within a layer group's states."""
    members = moments.shape.members(side, group)
    rows: list[list[Tensor]] = [[] for _ in range(head_groups)]
    start = 0
    for _, _, shape in members:
        if shape.heads % head_groups:
            raise ValueError(f"head_groups must divide {shape.heads} heads, got {head_groups}")
        for number, part in enumerate(torch.arange(start, start + shape.width).chunk(head_groups)):
            rows[number].append(part)
        start += shape.width
    return [torch.cat(parts) for parts in rows]


def _fractions(counts: list[tuple[int, Tiers]]) -> dict[int, float]:
    width = sum(width for width, _ in counts)
    kept = {16: 0, 8: 0, 4: 0, 2: 0}
    for _, count in counts:
        for bits, channels in count:
            kept[bits] += channels
    return {bits: channels / width for bits, channels in kept.items()}


def _latents(attention: Attention, setting: Setting, share: Share) -> list[LatentGroup]:
    """A layer's latents if its channels take these fractions."""
    heads = attention.heads // setting.head_groups
    width = heads * attention.head_dim * setting.layers
    keys, values = (
        tuple((bits, part * width * (2 if setting.joint else 1)) for bits, part in fractions.items() if part)
        for fractions in (share.keys, share.values)
    )
    sizes = [sum(tier_bytes(bits, round(channels)) for bits, channels in tiers) for tiers in (keys, values)]
    return [LatentGroup(heads, keys, values, *sizes)] * setting.head_groups


def _average(first: Share, second: Share) -> Share:
    def middle(one: dict[int, float], two: dict[int, float]) -> dict[int, float]:
        return {bits: (one[bits] + two[bits]) / 2 for bits in one}

    return Share(
        middle(first.keys, second.keys),
        middle(first.values, second.values),
        (first.loss + second.loss) / 2,
        (first.bytes + second.bytes) // 2,
    )


def run_roofline(moments: Moments, query_heads: int, ratio: float, report: Callable[[str], object]) -> None:
    """Print the roofline of the model that ``moments`` are of, and of Llama-3.1-8B with its channel fractions.

    Args:
        moments: Of keys and values, jointly over layer groups; bases of smaller groups follow from them.
        query_heads: Of that model.
        ratio: Full bytes over latent bytes per token.
        report: Takes every line.

    Raises:
        ValueError: If layers differ in heads, or query heads do not fit them.
    """
    layer = moments.shape.layers[0]
    recorded = max(len(group) for groups in moments.groups.values() for group in groups)
    if any((one.key.width, one.value.width) != (layer.key.width, layer.key.width) for one in moments.shape.layers):
        raise ValueError("moments must be of a model whose layers and sides are alike: the roofline averages over them")
    if query_heads % layer.key.heads:
        raise ValueError(f"query_heads must be a multiple of {layer.key.heads} KV heads, got {query_heads}")
    own = Attention(query_heads, layer.key.heads, layer.key.head_dim)
    shares = {}
    for frame_length in FRAME_LENGTHS:
        for joint in (False, True) if BOTH in moments.groups else (False,):
            for head_groups, layers in sorted({(layer.key.heads, 1), (1, 1), (1, recorded)}):
                setting = Setting(frame_length, head_groups, layers, joint)
                shares[setting] = measure_shares(moments, setting, ratio, report)
    report(ASSUMPTIONS)
    _table(f"{moments.shape.model_type}, measured", own, shares, ratio, report)
    scaled = {}
    for setting, share in shares.items():
        if setting.layers > 1:
            scaled[setting] = share
        elif setting.head_groups == 1:
            single = shares[Setting(setting.frame_length, layer.key.heads, 1, setting.joint)]
            for groups, fractions in ((4, single), (2, _average(single, share)), (1, share)):
                scaled[Setting(setting.frame_length, groups, 1, setting.joint)] = fractions
    report(
        f"\nLlama-3.1-8B has no moments here: its channels take the fractions measured above. Groups of 2 heads (a "
        f"quarter of its 8) take those of single heads (1 of {layer.key.heads}), groups of 4 the mean of single and "
        f"all heads. Its losses are those of the measured model."
    )
    _table("Llama-3.1-8B, scaled", LLAMA, scaled, ratio, report)


def _table(
    title: str, attention: Attention, shares: dict[Setting, Share], ratio: float, report: Callable[[str], object]
) -> None:
    report(f"\n{title}: {attention.q_heads} query heads, {attention.heads} KV heads of {attention.head_dim}")
    header = "| frame | heads | layers | latent | loss | channels | bytes | stored ratio | "
    report(header + " | ".join(card.name for card in CARDS) + " | bound on H100 |")
    report("| --- " * (9 + len(CARDS)) + "|")
    reached = []
    for setting, share in sorted(shares.items(), key=lambda item: (item[1].loss, str(item[0]))):
        latents = _latents(attention, setting, share)
        size = sum(latent.key_bytes + (0 if setting.joint else latent.value_bytes) for latent in latents)
        stored = 4.0 * attention.heads * attention.head_dim * setting.layers / size
        costs = kernel_costs(attention, latents, setting.frame_length)
        speeds = [dense_time(attention, card) / sum(cost.seconds(card) for cost in costs) for card in CARDS]
        ranks = [sum(round(channels) for _, channels in latents[0].keys)]
        ranks += [] if setting.joint else [sum(round(channels) for _, channels in latents[0].values)]
        report(
            f"| {setting.frame_length} | {attention.heads // setting.head_groups} | {setting.layers} | "
            f"{'joint' if setting.joint else 'separate'} | {share.loss:.4f} | {'+'.join(map(str, ranks))} | {size} | "
            f"{stored:.2f} | "
            + " | ".join(f"{speed:.2f}x ({speed / stored:.0%})" for speed in speeds)
            + f" | {_bound(costs, CARDS[1])} |"
        )
        if speeds[1] >= WANTED * stored:
            reached.append((share.loss, setting))
    if reached:
        loss, setting = min(reached, key=lambda entry: entry[0])
        report(f"Least predicted loss among settings that reach {WANTED:.0%} of the byte ratio at {ratio:g}x on H100: "
               f"{setting}, {loss:.4f} nats per token.")  # fmt: skip
    else:
        report(f"No setting reaches {WANTED:.0%} of the byte ratio at {ratio:g}x on H100.")


def _bound(costs: list, card: Card) -> str:
    """The slowest kernel and what bounds it."""
    slowest = max(costs, key=lambda cost: cost.seconds(card))
    times = slowest.times(card)
    return f"{slowest.kernel}: {max(times, key=lambda name: times[name])}"


def main(
    moments: Annotated[Path, typer.Argument(help="Statistics that eval, bench or calibrate --save-moments saved.")],
    ratio: Annotated[float, typer.Option(help="Target compression ratio per token in latents.")] = 8.0,
    query_heads: Annotated[int, typer.Option(help="Query heads of the model of MOMENTS; SmolLM2-135M has 9.")] = 9,
) -> None:
    """Estimate on paper how fast GPUs attend over latents, with the channels that calibration gives."""
    run_roofline(Moments.load(moments), query_heads, ratio, typer.echo)


if __name__ == "__main__":
    typer.run(main)
