"""Attention over the latents of one layer, alone, against the best dense attention on the same machine.

The dense baseline is PyTorch's SDPA with the query heads of a KV head folded into the query length, which is
faster than repeating keys and than ``enable_gqa``. Inputs rotate over several layers' worth, so that neither side
finds its cache in the processor's.
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from lowrank_cache.budget import GroupPlan
from lowrank_cache.calibration.moments import Moments
from lowrank_cache.evaluation.caches import XKV, make_bases, parse
from lowrank_cache.evaluation.report import Table
from lowrank_cache.kernels.api import attend_stored
from lowrank_cache.kernels.packed import LatentSide, PackedTier, RotaryFrames, StoredSide, padded_channels
from lowrank_cache.kernels.rope import angle_tables
from lowrank_cache.projections import Projections
from lowrank_cache.shapes import BOTH

__all__ = ["OpEntry", "main", "op_table", "time_ops"]

_LAYERS = 12  # rotated over


@dataclass(frozen=True)
class OpEntry:
    """Median seconds of one decode step's attention in one layer."""

    name: str
    context: int
    batch: int
    dense_seconds: float
    latent_seconds: float


@torch.no_grad()
def time_ops(
    name: str,
    projections: Projections,
    compression_ratio: float,
    q_heads: int,
    context: int,
    batch: int,
    dtype: torch.dtype,
    repeats: int = 25,
) -> OpEntry:
    """Time both sides in turn, with the channels that calibration gives to the model's median layer.

    Args:
        q_heads: Query heads of the model.
        context: Tokens, all latents but for one.
    """
    sides = _median_sides(projections, compression_ratio, context, batch)
    shape = projections.shape.layers[0].key
    dense = [torch.randn(2, batch, shape.heads, context, shape.head_dim, dtype=dtype) for _ in range(_LAYERS)]
    query = torch.randn(batch, q_heads, 1, shape.head_dim, dtype=dtype)
    folded = query.view(batch, shape.heads, -1, shape.head_dim)
    times: dict[str, list[float]] = {"dense": [], "latent": []}
    for repeat in range(repeats + 2):
        keys, values = dense[repeat % _LAYERS]
        key, value = (_stored(side, dtype) for side in sides[repeat % _LAYERS])
        start = time.perf_counter()
        torch.nn.functional.scaled_dot_product_attention(folded, keys, values)
        middle = time.perf_counter()
        attend_stored(query, key, value, scaling=shape.head_dim**-0.5)
        end = time.perf_counter()
        if repeat >= 2:
            times["dense"].append(middle - start)
            times["latent"].append(end - middle)
    return OpEntry(name, context, batch, statistics.median(times["dense"]), statistics.median(times["latent"]))


def _median_sides(
    projections: Projections, ratio: float, context: int, batch: int
) -> list[tuple[LatentSide, LatentSide]]:
    """Random latents of ``_LAYERS`` layers, with the plan of the layer that stores the median number of channels."""
    plans: dict[tuple[int, ...], dict[str, GroupPlan]] = {}
    for plan in projections.plan(ratio):
        plans.setdefault(plan.bases[0].layers, {})[plan.bases[0].side] = plan
    ordered = sorted(plans.values(), key=_channels)
    chosen = ordered[len(ordered) // 2]
    layer = projections.shape.layers[0]
    frames = None
    if layer.key.rope is not None:
        length = projections.frame_length
        inv_freq = 10_000.0 ** (-torch.arange(layer.key.rope.rotary_dim // 2) * 2 / layer.key.rope.rotary_dim)
        tables = angle_tables(torch.arange(0, context, length)[None], inv_freq)
        frames = RotaryFrames(*tables, length, layer.key.rope.layout)
    sides = []
    for _ in range(_LAYERS):
        tiers = {side: _random_tiers(plan, context, batch) for side, plan in chosen.items()}
        key_tiers, value_tiers = (tiers.get(BOTH, tiers.get(side, ())) for side in ("key", "value"))
        sides.append((_side(key_tiers, layer.key, frames), _side(value_tiers, layer.value, None)))
    return sides


def _stored(latents: LatentSide, dtype: torch.dtype) -> StoredSide:
    batch, (_, heads, head_dim) = latents.tiers[0].codes.shape[0], latents.up_proj.shape
    tail = torch.zeros(batch, heads, 1, head_dim, dtype=dtype)
    return StoredSide(tail[:, :, :0], latents, tail)


def _channels(plans: dict[str, GroupPlan]) -> int:
    return sum(len(channels) for plan in plans.values() for _, channels in plan.tiers)


def _random_tiers(plan: GroupPlan, context: int, batch: int) -> tuple[PackedTier, ...]:
    tiers = []
    for bits, channels in plan.tiers:
        row = padded_channels(bits, len(channels)) * bits // 8
        if bits == 16:
            tiers.append(PackedTier(16, len(channels), torch.randn(batch, context, row // 2).half(), None))
            continue
        codes = torch.randint(0, 256, (batch, context, row), dtype=torch.uint8)
        steps = (torch.rand(batch, context) + 0.5).div_(2 ** (bits - 1)).half()
        tiers.append(PackedTier(bits, len(channels), codes, steps))
    return tuple(tiers)


def _side(tiers: tuple[PackedTier, ...], shape, frames: RotaryFrames | None) -> LatentSide:
    rank = sum(tier.channels for tier in tiers)
    up_proj: Tensor = (torch.randn(rank, shape.heads, shape.head_dim) / rank**0.5).half()
    return LatentSide(tiers, up_proj, torch.zeros(shape.heads, shape.head_dim), frames)


def op_table(entries: list[OpEntry]) -> Table:
    """Times in milliseconds."""
    head = ["context", "batch", "latents", "dense SDPA, ms", "latent attention, ms", "faster"]
    lines = [
        [
            f"{entry.context:,}",
            str(entry.batch),
            entry.name,
            f"{1e3 * entry.dense_seconds:.3f}",
            f"{1e3 * entry.latent_seconds:.3f}",
            f"{entry.dense_seconds / entry.latent_seconds:.2f}x",
        ]
        for entry in entries
    ]
    return Table(head, lines)


def main(
    moments: Annotated[Path, typer.Argument(help="Statistics that eval, bench or calibrate --save-moments saved.")],
    cache: Annotated[list[str] | None, typer.Option(help="Calibrated caches, as for 'lowrank-cache eval'.")] = None,
    contexts: Annotated[str, typer.Option(help="Tokens in the cache, separated by commas.")] = "1024,4096,8192",
    batches: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,4",
    query_heads: Annotated[int, typer.Option(help="Query heads of the model of MOMENTS; SmolLM2-135M has 9.")] = 9,
    threads: Annotated[int, typer.Option(help="Threads of PyTorch.")] = 1,
    dtype: Annotated[str, typer.Option(help="Dtype of the model: float32, bfloat16, float16.")] = "bfloat16",
) -> None:
    """Time attention over the latents of one layer, alone, against dense attention."""
    torch.set_num_threads(threads)
    statistics, entries = Moments.load(moments), []
    for name in cache or ["fisher:8,groups=1,joint=0", "fisher:8"]:
        configuration = parse(name)
        if configuration is None or configuration.method == XKV:
            raise ValueError(f"cache must be calibrated, got {name!r}")
        made, ratio = make_bases(configuration, statistics), configuration.compression_ratio
        entries += [
            time_ops(name, made, ratio, query_heads, context, batch, getattr(torch, dtype))
            for context in map(int, contexts.split(","))
            for batch in map(int, batches.split(","))
        ]
    typer.echo(op_table(entries).markdown())


if __name__ == "__main__":
    typer.run(main)
