"""Decode speed, prefill time and memory of many caches on one model, in one process, resumable.

Machines are noisy, so a context's caches decode in turn, one step each, and what counts is the median of each
and its ratio to the full cache's in the same minutes. ``DynamicCache`` runs on transformers' SDPA.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from lowrank_cache.attention import latent_attention
from lowrank_cache.cache_argument import cache_argument
from lowrank_cache.evaluation.baselines import tensor_bytes
from lowrank_cache.evaluation.cache_rows import CacheSizes, cache_row
from lowrank_cache.evaluation.memory import watch_allocated
from lowrank_cache.evaluation.results_file import append_result, resume_results
from lowrank_cache.projections import Projections

__all__ = ["BenchRow", "BenchSettings", "bench_markdown", "run_bench"]


@dataclass(frozen=True)
class BenchSettings(CacheSizes):
    """What is timed.

    Attributes:
        contexts: Cached tokens before decoding starts.
        batches: Rows.
        new_tokens: Timed decode steps a cache, after ``warm`` untimed ones.
        threads: Of torch.
    """

    contexts: tuple[int, ...] = (1024, 4096, 8192)
    batches: tuple[int, ...] = (1, 4)
    new_tokens: int = 24
    warm: int = 2
    threads: int = 1


@dataclass(frozen=True)
class BenchRow:
    """One cache at one context and batch; times in seconds, sizes in bytes.

    Attributes:
        prefill_seconds: Of one forward over the whole context.
        step_seconds: Of each timed decode step of the batch.
        stored_bytes: Of the cache's tensors after decoding.
        prefill_peak, decode_peak: Most bytes that the cache and its forwards had allocated at once in that phase.
    """

    name: str
    context: int
    batch: int
    prefill_seconds: float
    step_seconds: list[float]
    stored_bytes: int
    prefill_peak: int
    decode_peak: int

    @property
    def tokens_per_second(self) -> float:
        return self.batch / statistics.median(self.step_seconds)


def run_bench(
    model: PreTrainedModel,
    ids: Tensor,
    configurations: dict[str, tuple[Projections | None, dict]],
    settings: BenchSettings,
    out: Path,
    progress: Callable[[str], object] = print,
    identity: Mapping[str, Any] | None = None,
) -> list[BenchRow]:
    """Time every configuration at every context and batch that ``out`` does not hold yet, and return all it holds.

    Args:
        model: In eval mode; switched to ``latent_attention`` for the while.
        ids: ``[tokens]``, at least the longest context and the new tokens.
        configurations: By name: projections and further arguments of ``LowRankCache``, or None for a baseline. A name
            that ends in ``,attend=0`` rebuilds keys and values instead of attending to latents.
        out: JSON Lines file, one row a line; its first line holds the settings.
        progress: Called with a line of text as rows start.
        identity: What else the rows of one file have in common: model, text, bases.

    Raises:
        ValueError: If the text is too short, or ``out`` was made with other settings or another identity.
    """
    needed = max(settings.contexts) + settings.warm + settings.new_tokens
    if len(ids) < needed:
        raise ValueError(f"ids must hold at least {needed} tokens, got {len(ids)}")
    torch.set_num_threads(settings.threads)
    done = _resume(out, settings, identity or {})
    names = ["full", *(name for name in configurations if name != "full")]
    for context in settings.contexts:
        for batch in settings.batches:
            missing = [name for name in names if (name, context, batch) not in done]
            if missing == ["full"] or not missing:
                continue
            chosen = ["full", *(name for name in missing if name != "full")]  # a ratio needs its baseline beside it
            # A row's bases are made once for all its caches, and before the prefill that is timed.
            makers = {
                name: cache_row(name, *configurations.get(name, (None, {})), model, settings.sizes()).make
                for name in chosen
            }
            for row in _measure_together(model, ids, makers, context, batch, settings, progress):
                done[row.name, context, batch] = row
                append_result(out, asdict(row))
    # Earlier runs' rows too, as the file holds them: a table is not less for being measured in parts.
    return sorted(done.values(), key=lambda row: (row.context, row.batch, row.name != "full"))


def _resume(out: Path, settings: BenchSettings, identity: Mapping[str, Any]) -> dict[tuple[str, int, int], BenchRow]:
    # Contexts and batches may grow from run to run: a row holds its own.
    fixed = {name: value for name, value in asdict(settings).items() if name not in ("contexts", "batches")}
    rows = [BenchRow(**fields) for fields in resume_results(out, {**fixed, **identity})]
    return {(row.name, row.context, row.batch): row for row in rows}


@torch.no_grad()
def _measure_together(
    model: PreTrainedModel,
    ids: Tensor,
    makers: dict[str, Callable[[], Cache]],
    context: int,
    batch: int,
    settings: BenchSettings,
    progress: Callable[[str], object],
) -> Iterator[BenchRow]:
    tokens = ids.to(model.device).expand(batch, -1)
    caches: dict[str, Cache] = {}
    prefills: dict[str, tuple[float, int]] = {}
    for name, make in makers.items():
        progress(f"prefill of {context} tokens, batch {batch}: {name}")
        with _attention(model, name), watch_allocated(model.device) as allocated:
            start = time.perf_counter()
            caches[name] = make()
            model(tokens[:, :context], **cache_argument(model, caches[name]), logits_to_keep=1)
            seconds = time.perf_counter() - start
        prefills[name] = (seconds, allocated.highest)
    progress(f"decode after {context} tokens, batch {batch}: {', '.join(makers)}")
    arguments = {name: cache_argument(model, cache) for name, cache in caches.items()}  # found before steps are timed
    steps: dict[str, list[float]] = {name: [] for name in makers}
    peaks = dict.fromkeys(makers, 0)
    for step in range(settings.warm + settings.new_tokens):
        token = tokens[:, context + step : context + step + 1]
        for name, argument in arguments.items():
            with _attention(model, name):
                if step < settings.warm:  # watching memory takes time, so it is done apart
                    with watch_allocated(model.device) as allocated:
                        model(token, **argument)
                    peaks[name] = max(peaks[name], allocated.highest)
                    continue
                start = time.perf_counter()
                model(token, **argument)
                steps[name].append(time.perf_counter() - start)
    for name, cache in caches.items():
        seconds, prefill_peak = prefills[name]
        stored = tensor_bytes(cache)
        yield BenchRow(name, context, batch, seconds, steps[name], stored, prefill_peak, stored + peaks[name])


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Attention over latents for compressed caches; the model's own for all others."""
    if ":" not in name or name.endswith(",attend=0"):
        yield
        return
    with latent_attention(model):
        yield


def bench_markdown(rows: list[BenchRow]) -> str:
    """A Markdown table: every row beside the full cache of the same context and batch."""
    lines = [
        "| context | batch | cache | decode, tokens/s | to full | prefill, s | to full | stored, MB | smaller "
        "| peak of prefill, MB | peak of decode, MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    full = {(row.context, row.batch): row for row in rows if row.name == "full"}
    for row in rows:
        base = full[row.context, row.batch]
        cells = [
            f"{row.context:,}",
            str(row.batch),
            row.name,
            f"{row.tokens_per_second:.2f}",
            f"{row.tokens_per_second / base.tokens_per_second:.2f}x",
            f"{row.prefill_seconds:.2f}",
            f"{row.prefill_seconds / base.prefill_seconds:.2f}x",
            f"{row.stored_bytes / 1e6:.1f}",
            f"{base.stored_bytes / row.stored_bytes:.2f}x",
            f"{row.prefill_peak / 1e6:.0f}",
            f"{row.decode_peak / 1e6:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
