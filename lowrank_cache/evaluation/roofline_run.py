"""The paper roofline of measured channel counts: which setting reaches most of its byte ratio, and on which card."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_cache.budget import ChannelCosts, TierCounts, spend, tier_bytes
from lowrank_cache.calibration.fisher import weighted_basis
from lowrank_cache.calibration.moments import Moments
from lowrank_cache.evaluation.roofline import (
    ASSUMPTIONS,
    CARDS,
    Attention,
    Card,
    LatentGroup,
    dense_time,
    kernel_costs,
)
from lowrank_cache.models import BOTH, SIDES, layer_groups

__all__ = ["Setting", "Share", "measure_shares", "run_roofline"]

WANTED = 0.8  # of the byte ratio
FRAME_LENGTHS = (1, 16, 64, 128)
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
    stores: list[tuple[str, int, ChannelCosts]] = []
    for side in (BOTH,) if setting.joint else SIDES:
        for group in layer_groups(moments.shape, side, setting.layers):
            second, mean, sensitivity = moments.of_group(side, group, setting.frame_length)
            for rows in _head_rows(moments, side, group, setting.head_groups):
                part = rows[:, None], rows
                loss = weighted_basis(second[part], mean[rows], sensitivity[part])["loss"].double().numpy()
                stores.append((side, len(rows), ChannelCosts(loss, loss)))
    full = 2 * sum(layer.key.width + layer.value.width for layer in moments.shape.layers)
    counts = spend([costs for _, _, costs in stores], full / ratio)
    spent = [(side, width, count) for (side, width, _), count in zip(stores, counts, strict=True)]
    fractions = {
        side: _fractions([(width, count) for name, width, count in spent if name == side])
        for side in {name for name, _, _ in spent}
    }
    total = sum(costs.loss(count) for (_, _, costs), count in zip(stores, counts, strict=True))
    keys, values = (fractions[BOTH],) * 2 if setting.joint else (fractions[side] for side in SIDES)
    return Share(keys, values, total, sum(count.bytes_per_token for count in counts))


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


def _fractions(counts: list[tuple[int, TierCounts]]) -> dict[int, float]:
    width = sum(width for width, _ in counts)
    kept = {16: 0, 8: 0, 4: 0, 2: 0}
    for _, count in counts:
        for bits, channels in count.items():
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
