"""Decode speed, prefill time and memory of many caches on one model, in one process, resumable.

Machines are noisy, so a context's caches decode in turn, one step each, and what counts is the median of each and its
ratio to the full cache's in the same minutes. ``DynamicCache`` runs on transformers' SDPA.
"""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from lowrank_cache.evaluation.caches import CacheEntry, CacheSizes, tensor_bytes
from lowrank_cache.evaluation.inputs import Run, append_result, prepare, resume_results
from lowrank_cache.evaluation.report import Table, check_installed
from lowrank_cache.evaluation.streaming import now, processor
from lowrank_cache.probe import cache_argument

WEIGHTS_ALONE = "weights-alone"  # a cache of one token: the floor of a decode step
_RECONSTRUCTED = ",attend=0"


@dataclass(frozen=True)
class BenchSettings(CacheSizes):
    """What is timed."""

    contexts: tuple[int, ...] = (1024, 4096, 8192)  # cached tokens before decoding starts
    batches: tuple[int, ...] = (1, 4)  # sequences
    new_tokens: int = 24  # timed decode steps a cache, after ``warm`` untimed ones
    warm: int = 2
    threads: int = 1  # of torch

    def needed(self) -> int:
        """Tokens of text that all contexts and their steps take."""
        return max(self.contexts) + self.warm + self.new_tokens


@dataclass(frozen=True)
class BenchEntry:
    """One cache at one context and batch; times in seconds, sizes in bytes."""

    name: str
    context: int
    batch: int
    prefill_seconds: float  # of one forward over the whole context; of one token for ``WEIGHTS_ALONE``
    step_seconds: list[float]  # of each timed decode step of the batch
    stored_bytes: int  # of the cache's tensors after decoding
    prefill_peak: int  # most bytes that the cache and its forwards had allocated at once in that phase
    decode_peak: int

    @property
    def tokens_per_second(self) -> float:
        return self.batch / statistics.median(self.step_seconds)


@contextmanager
def watch_allocated(device: torch.device) -> Iterator[SimpleNamespace]:
    """Watch torch's allocator on ``device`` while the block runs; on a CPU through its profiler, which costs time.

    Yields:
        ``highest`` and ``left``, bytes beyond what was allocated when the block began, known when it has ended.
    """
    allocated = SimpleNamespace(highest=0, left=0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield allocated
        allocated.highest = torch.cuda.max_memory_allocated(device) - before
        allocated.left = torch.cuda.memory_allocated(device) - before
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield allocated
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated.left += event.nbytes()
        allocated.highest = max(allocated.highest, allocated.left)


def run_bench(
    model: PreTrainedModel, ids: Tensor, caches: list[CacheEntry], settings: BenchSettings, out: Path,
    progress: Callable[[str], object] = print, identity: Mapping[str, Any] | None = None,
) -> list[BenchEntry]:  # fmt: skip
    """Time every cache at every context and batch that ``out`` does not hold yet, and return all it holds, sorted.

    Args:
        model: In eval mode.
        ids: ``[tokens]``, at least ``settings.needed()``.
        caches: The full one among them. One that holds latents is attended to in them, unless its name ends in
            ``,attend=0``; ``WEIGHTS_ALONE`` gets one token instead of the context.
        out: JSON Lines file, one entry a line; its first line holds the settings.
        progress: Called with a line of text as measurements start.
        identity: What else the entries of one file have in common: model, text, bases.

    Raises:
        ValueError: If the text is too short, or ``out`` was made with other settings or another identity.
    """
    if len(ids) < settings.needed():
        raise ValueError(f"ids must hold at least {settings.needed()} tokens, got {len(ids)}")
    torch.set_num_threads(settings.threads)
    # Contexts and batches may grow from run to run: an entry holds its own.
    fixed = {name: value for name, value in asdict(settings).items() if name not in ("contexts", "batches")}
    found = [BenchEntry(**fields) for fields in resume_results(out, {**fixed, **(identity or {})})]
    done = {(entry.name, entry.context, entry.batch): entry for entry in found}
    for context in settings.contexts:
        for batch in settings.batches:
            missing = [one for one in caches if one.name != "full" and (one.name, context, batch) not in done]
            if not missing and ("full", context, batch) in done:
                continue
            chosen = [*(one for one in caches if one.name == "full"), *missing]  # a ratio needs its baseline beside it
            for entry in _measure_together(model, ids, chosen, context, batch, settings, progress):
                done[entry.name, context, batch] = entry
                append_result(out, asdict(entry))
    # Earlier runs' entries too, as the file holds them: a table is not less for being measured in parts.
    return sorted(done.values(), key=lambda entry: (entry.context, entry.batch, entry.name != "full"))


@torch.no_grad()
def _measure_together(
    model: PreTrainedModel, ids: Tensor, chosen: list[CacheEntry], context: int, batch: int,
    settings: BenchSettings, progress: Callable[[str], object],
) -> Iterator[BenchEntry]:  # fmt: skip
    tokens = ids.to(model.device).expand(batch, -1)
    names = [entry.name for entry in chosen]
    caches: list[Cache] = []
    arguments: list[dict[str, Any]] = []  # found before steps are timed
    prefills: list[tuple[float, int]] = []
    for entry in chosen:
        progress(f"prefill of {context} tokens, batch {batch}: {entry.name}")
        prompt = tokens[:, : 1 if entry.name == WEIGHTS_ALONE else context]
        with watch_allocated(model.device) as allocated:
            start = now(model.device)
            caches.append(entry.make(not entry.name.endswith(_RECONSTRUCTED)))
            arguments.append(cache_argument(model, caches[-1]))
            model(prompt, **arguments[-1], logits_to_keep=1)
            seconds = now(model.device) - start
        prefills.append((seconds, allocated.highest))
    progress(f"decode after {context} tokens, batch {batch}: {', '.join(names)}")
    steps: dict[str, list[float]] = {name: [] for name in names}
    peaks = dict.fromkeys(names, 0)
    for step in range(settings.warm + settings.new_tokens):
        token = tokens[:, context + step : context + step + 1]
        # Watching memory takes time, so it is done in the steps that are not timed.
        watch = watch_allocated if step < settings.warm else lambda device: nullcontext(SimpleNamespace(highest=0))
        for entry, argument in zip(chosen, arguments, strict=True):
            with watch(model.device) as allocated:
                start = now(model.device)
                model(token, **argument)
                steps[entry.name].append(now(model.device) - start)
            peaks[entry.name] = max(peaks[entry.name], allocated.highest)
    for name, cache, (seconds, peak) in zip(names, caches, prefills, strict=True):
        stored, timed = tensor_bytes(cache), steps[name][settings.warm :]
        yield BenchEntry(name, context, batch, seconds, timed, stored, peak, stored + peaks[name])


def bench_table(entries: list[BenchEntry]) -> Table:
    """Every entry beside the full cache of the same context and batch."""
    head = ["context", "batch", "cache", "decode, tokens/s", "to full", "prefill, s", "to full", "stored, MB"]
    head += ["smaller", "peak of prefill, MB", "peak of decode, MB"]
    full = {(entry.context, entry.batch): entry for entry in entries if entry.name == "full"}
    lines = []
    for entry in entries:
        base, speed = full[entry.context, entry.batch], entry.tokens_per_second
        cells = [f"{entry.context:,}", str(entry.batch), entry.name, f"{speed:.2f}"]
        cells += [f"{speed / base.tokens_per_second:.2f}x", f"{entry.prefill_seconds:.2f}"]
        cells += [f"{entry.prefill_seconds / base.prefill_seconds:.2f}x", f"{entry.stored_bytes / 1e6:.1f}"]
        cells += [f"{base.stored_bytes / entry.stored_bytes:.2f}x"]
        cells += [f"{peak / 1e6:.0f}" for peak in (entry.prefill_peak, entry.decode_peak)]
        if entry.name == WEIGHTS_ALONE:  # it has no context, so only its decode step says something
            cells[5:] = ["–"] * 6
        lines.append(cells)
    return Table(head, lines)


def bench(run: Run, specifications: list[str], settings: BenchSettings, say: Callable[[str], object]) -> None:
    """Write ``bench.jsonl``, ``bench.json``, ``table.md`` and ``bench.png`` into the run's folder.

    Args:
        specifications: Caches as ``caches.parse`` reads them, and ``WEIGHTS_ALONE``. One may end in ``,attend=0``: the
            same cache, keys and values reconstructed in every step.
    """
    plain = {name: name.removesuffix(_RECONSTRUCTED) for name in ("full", *specifications) if name != WEIGHTS_ALONE}
    found = prepare(run, list(dict.fromkeys(plain.values())), settings.sizes(), say)
    model, entries = found.model, {entry.name: entry for entry in found.entries}
    caches = [replace(entries[one], name=name) for name, one in plain.items()]
    if WEIGHTS_ALONE in specifications:
        caches.append(CacheEntry(WEIGHTS_ALONE, lambda attend=True: DynamicCache(config=model.config), None, 0))
    ids = torch.tensor(found.tokenizer(found.text[: 12 * settings.needed()])["input_ids"])
    where = torch.cuda.get_device_name() if found.identity["device"] == "cuda" else processor()
    heading = f"{found.name} in {found.identity['dtype']} on {where}, {settings.threads} thread(s)"
    say(f"{heading}, text from {found.source}")
    measured = run_bench(model, ids, caches, settings, run.out / "bench.jsonl", say, {**found.identity, "where": where})
    table = f"{heading}\n\n{bench_table(measured).markdown()}"
    (run.out / "table.md").write_text(table + "\n", encoding="utf-8")
    numbers = [{**asdict(entry), "tokens_per_second": entry.tokens_per_second} for entry in measured]
    (run.out / "bench.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    say(table)
    try:
        plot_bench(measured, run.out / "bench.png")
    except ImportError as error:
        say(str(error))


def plot_bench(entries: list[BenchEntry], path: Path) -> None:
    """Write a PNG of what ``run_bench`` returned: tokens a second and bytes by context, panels for each batch size."""
    check_installed()
    from matplotlib.figure import Figure

    batches, ticks = (sorted({getattr(entry, name) for entry in entries}) for name in ("batch", "context"))
    figure = Figure(figsize=(13, 4.5 * len(batches)), layout="constrained")
    for (speed, size), batch in zip(figure.subplots(len(batches), 2, squeeze=False), batches, strict=True):
        for name in dict.fromkeys(entry.name for entry in entries):
            members = [one for one in entries if (one.name, one.batch) == (name, batch)]
            contexts = [one.context for one in members]
            speed.plot(contexts, [one.tokens_per_second for one in members], marker="o", label=name)
            if name != WEIGHTS_ALONE:
                size.plot(contexts, [one.stored_bytes / 1e6 for one in members], marker="o", label=name)
        speed.set_ylim(bottom=0)
        speed.set(title=f"batch {batch}", ylabel="decoded tokens a second")
        size.set(yscale="log", ylabel="bytes of the cache, MB")
        for axis in (speed, size):
            axis.set(xscale="log", xlabel="tokens in the cache")
            axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
