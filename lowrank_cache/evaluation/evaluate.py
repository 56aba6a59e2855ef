"""One evaluation of many caches: perplexity, look-ups, long-context tasks, bytes and times, by sample, resumable.

Everything is read through a cache that was filled ``chunk`` tokens at a time, so that what is measured is what the
cache stores (see ``streaming``).
"""

import json
import platform
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowrank_cache.evaluation import report, tasks
from lowrank_cache.evaluation.caches import CacheEntry, CacheSizes, tensor_bytes
from lowrank_cache.evaluation.inputs import Prepared, Run, append_result, prepare, resume_results
from lowrank_cache.evaluation.streaming import fill, force_answers, greedy_answer, now, stream, windows_of
from lowrank_cache.evaluation.tasks import QUESTIONS, TASKS, CodeText, Prompter, Sample
from lowrank_cache.probe import cache_argument

__all__ = ["EvaluationSettings", "evaluate", "record_key", "run_evaluation"]

_GROWING = ("lengths", "tasks", "samples", "lookups", "needles")  # a record says which of them it is of


@dataclass(frozen=True)
class EvaluationSettings(CacheSizes):
    """What is measured, and how."""

    # Tokens of a task's context, question and answer together, and of the contexts that are timed
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    tasks: tuple[str, ...] = tuple(TASKS)  # of ``tasks.TASKS``
    samples: int = 16  # contexts of each task and length
    lookups: int = 64  # questions about key–value lists of ``facts`` entries, 4 a list
    facts: int = 22
    # Pairs of tokens of prose, and questions about codes hidden in texts of that length, 4 a text
    needles: tuple[tuple[int, int], ...] = ()
    windows: int = 16  # windows of text for the perplexity, evenly spaced; 0 for none
    window: int = 1024  # tokens per window
    chunk: int = 128  # tokens per forward
    prompt: int = 0  # tokens of the first forward, of which windows score none; 0 for ``chunk``, all scored
    batch: int = 4  # windows, lists or texts per forward
    steps: int = 8  # timed decode steps after a context of each length
    chat: bool = False  # put a task's context and question into a message of the model's chat template
    attend: bool = False  # attend to latents (``latent_attention``) instead of reconstructing keys and values
    seed: int = 0  # of the tasks

    def __post_init__(self):
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown:
            raise ValueError(f"tasks must be of {sorted(TASKS)}, got {unknown}")
        least = {"samples": 0, "windows": 0, "prompt": 0, "window": 2, "chunk": 1, "batch": 1, "steps": 1, "facts": 4}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {getattr(self, name)}")
        for name, questions in (("lookups", self.lookups), *((f"needles of {t}", n) for t, n in self.needles)):
            if questions < 0 or questions % QUESTIONS:
                raise ValueError(f"{name} must be a multiple of {QUESTIONS}, asked of each text, got {questions}")

    def fixed(self) -> dict[str, Any]:
        """What all runs that write into one file must have in common."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _GROWING}


@dataclass(frozen=True)
class _Job:
    """Some records, measured together, and the tokens that this takes."""

    keys: list[tuple]
    tokens: int
    run: Callable[[CacheEntry], list[dict[str, Any]]]


def record_key(record: dict[str, Any]) -> tuple:
    """What a record is of, its cache apart: kind, task, length and index."""
    return record["kind"], record.get("task"), record.get("length"), record["index"]


def evaluate(
    model: PreTrainedModel, tokenizer, text: str, entries: list[CacheEntry], settings: EvaluationSettings,
    results: Path, identity: dict[str, Any],
    progress: Callable[[str, int, int], object] = lambda name, done, total: None,
) -> dict[str, dict[tuple, dict[str, Any]]]:  # fmt: skip
    """Measure what ``results`` does not hold yet.

    Args:
        model: In eval mode.
        tokenizer: Of transformers.
        text: Evaluation text; never the one calibrated on.
        entries: The caches, the full one first: others are compared with it.
        results: JSON Lines file with one record a sample.
        identity: What else ``results`` belongs to, e.g. the model's name.
        progress: Called with the name of a cache, and tokens done and in all.

    Returns:
        By name of the cache and ``record_key``: a ``"window"`` with its mean ``loss`` and that of its ``quarters``,
        ``"codes"`` of a look-up list or a text with needles with ``losses`` and ``exact`` of its questions,
        ``"answers"`` about a context with their mean ``score``, or a ``"cost"`` with bytes and seconds at a length.

    Raises:
        ValueError: If ``results`` was made with other settings, or the text is too short.
    """
    known: dict[str, dict[tuple, dict[str, Any]]] = {}
    for record in resume_results(results, {**settings.fixed(), **identity}):
        known.setdefault(record["cache"], {})[record_key(record)] = record
    jobs = list(_jobs(model, tokenizer, text, settings))
    pending = {one.name: [job for job in jobs if not set(job.keys) <= set(known.get(one.name, {}))] for one in entries}
    total, done = sum(job.tokens for part in pending.values() for job in part), 0
    for entry in entries:
        for job in pending[entry.name]:
            progress(entry.name, done, total)
            with entry.attention(model, settings.attend):
                records = job.run(entry)
            for record in records:
                record = {"cache": entry.name, **record}
                append_result(results, record)
                known.setdefault(entry.name, {})[record_key(record)] = record
            done += job.tokens
    progress("", done, total)
    asked = {key for job in jobs for key in job.keys}
    return {one.name: {key: known[one.name][key] for key in known.get(one.name, {}) if key in asked} for one in entries}


def _jobs(model, tokenizer, text: str, settings: EvaluationSettings) -> Iterator[_Job]:
    """Windows first, then tasks, then times, by when the machine is warm."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    if settings.windows:
        yield from _window_jobs(model, ids, settings)
    texts = tasks.lookup_texts(tokenizer, settings.lookups // QUESTIONS, settings.facts, settings.seed)
    yield from _code_jobs(model, "lookup", settings.facts, texts, settings)
    for tokens, count in settings.needles:
        texts = tasks.needle_texts(tokenizer, ids, count // QUESTIONS, tokens, settings.seed)
        yield from _code_jobs(model, "needle", tokens, texts, settings)
    prompter = Prompter(tokenizer, settings.chat)
    if settings.samples and settings.tasks and settings.lengths:
        haystack, overhead = tasks.Haystack(text), prompter.overhead()
        for length in settings.lengths:
            for task in settings.tasks:
                for index in range(settings.samples):
                    sample = tasks.sample_of(task, prompter.count, haystack, length, index, settings.seed, overhead)
                    yield _answers_job(model, prompter, sample, settings)
    for length in settings.lengths:
        yield _cost_job(model, ids, length, settings)


def _window_jobs(model, ids: Tensor, settings: EvaluationSettings) -> Iterator[_Job]:
    windows, scored = windows_of(ids, settings.window, settings.windows), max(settings.prompt - 1, 0)
    for start in range(0, len(windows), settings.batch):
        part = windows[start : start + settings.batch]

        def run(entry: CacheEntry, part=part, start=start) -> list[dict[str, Any]]:
            options = {"chunk": settings.chunk, "batch": len(part), "prompt": settings.prompt}
            losses = stream(model, part, entry.make, **options)[:, scored:]
            records = []
            for index, window in enumerate(losses, start):
                quarters = [float(quarter.mean()) for quarter in window.tensor_split(4)]
                records.append({"kind": "window", "index": index, "loss": float(window.mean()), "quarters": quarters})
            return records

        yield _Job([("window", None, None, start + offset) for offset in range(len(part))], part.numel(), run)


def _code_jobs(model, task: str, length: int, texts: list[CodeText], settings: EvaluationSettings) -> Iterator[_Job]:
    for start in range(0, len(texts), settings.batch):
        part = texts[start : start + settings.batch]

        def run(entry: CacheEntry, part=part, start=start) -> list[dict[str, Any]]:
            contexts, questions = [text.context for text in part], [text.questions for text in part]
            options = {"chunk": settings.chunk, "prompt": settings.prompt if task == "lookup" else 0}
            scores = force_answers(model, contexts, questions, entry.make, **options)
            records = []
            for index, answers in enumerate(scores, start):
                found = {"losses": [loss for loss, _ in answers], "exact": [float(exact) for _, exact in answers]}
                records.append({"kind": "codes", "task": task, "length": length, "index": index, **found})
            return records

        keys: list[tuple] = [("codes", task, length, start + offset) for offset in range(len(part))]
        yield _Job(keys, sum(len(text.context) for text in part), run)


def _answers_job(model, prompter: Prompter, sample: Sample, settings: EvaluationSettings) -> _Job:
    context = prompter.context(sample.context)

    def run(entry: CacheEntry) -> list[dict[str, Any]]:
        stop, cache, answers = _end_tokens(model, prompter.tokenizer), entry.make(), []
        fill(model, cache, context, chunk=settings.chunk, first=settings.prompt)
        for question in sample.questions:
            ids = prompter.question(question.text, question.prefix)
            generated = greedy_answer(model, cache, ids, tasks.answer_tokens(prompter.count, question), stop)
            answer = prompter.tokenizer.decode(generated, skip_special_tokens=True)
            answers.append({**asdict(question), "answer": answer, "score": tasks.score(question.expected, answer)})
        scores = [answer["score"] for answer in answers]
        means = {"score": statistics.fmean(scores), "exact": statistics.fmean(one == 1 for one in scores)}
        record = {"kind": "answers", "task": sample.task, "length": sample.length, "index": sample.index}
        return [{**record, "tokens": len(context), **means, "answers": answers}]

    return _Job([("answers", sample.task, sample.length, sample.index)], len(context), run)


def _end_tokens(model, tokenizer) -> set[int]:
    """Ids that end an answer, of the model's generation settings and the tokenizer."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {found} if isinstance(found, int) else set(found or ())
    own = getattr(tokenizer, "eos_token_id", None)
    return ends if own is None else ends | {own}


def _cost_job(model, ids: Tensor, length: int, settings: EvaluationSettings) -> _Job:
    needed = length + settings.steps + 1
    tokens = ids.repeat(-(-needed // len(ids)))[:needed]

    @torch.no_grad()
    def run(entry: CacheEntry) -> list[dict[str, Any]]:
        cache = entry.make()
        start = now(model.device)
        fill(model, cache, tokens[:length], chunk=settings.chunk, first=settings.prompt)
        record: dict[str, Any] = {"kind": "cost", "length": length, "index": 0}
        record |= {"fill_seconds": now(model.device) - start, "stored_bytes": tensor_bytes(cache)}
        if entry.name == "full":
            states = [getattr(layer, side, None) for layer in cache.layers for side in ("keys", "values")]
            record["bytes_at_16_bits"] = 2 * sum(part.numel() for part in states if isinstance(part, Tensor))
        steps, argument = [], cache_argument(model, cache)
        for token in tokens[length:].to(model.device):
            start = now(model.device)
            model(input_ids=token.view(1, 1), **argument, use_cache=True)
            steps.append(now(model.device) - start)
        return [{**record, "step_seconds": statistics.median(steps[1:])}]  # the first one warms up

    return _Job([("cost", None, length, 0)], needed, run)


def run_evaluation(
    run: Run, specifications: list[str], settings: EvaluationSettings, say: Callable[[str], object]
) -> None:
    """Write ``config.json``, ``samples.jsonl``, ``metrics.json`` and the report into the run's folder.

    The report is ``report.html``, one page that needs nothing else, and ``report.md`` with ``pareto.png``. Bases that
    are calibrated are kept in ``projections``, their statistics in ``moments.safetensors``.

    Args:
        specifications: Caches as ``caches.parse`` reads them; the full cache is always measured, first.

    Raises:
        ValueError: If a cache cannot be made, with its name, before anything is measured; or if the folder holds an
            evaluation with other settings.
        ImportError: If what the report needs is not installed, before anything is measured.
    """
    report.check_installed()
    names = ["full", *(name for name in dict.fromkeys(specifications) if name != "full")]
    found = prepare(run, names, settings.sizes(), say)
    most = getattr(found.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if most is not None and settings.lengths and max(settings.lengths) > most:
        say(f"{found.name} is made for {most} tokens, and lengths go to {max(settings.lengths)}")
    samples = run.out / "samples.jsonl"
    resume_results(samples, {**settings.fixed(), **found.identity})  # fails before config.json is replaced
    config = _config(found, names, settings)
    _write_json(run.out / "config.json", config)
    given = (found.model, found.tokenizer, found.text, found.entries, settings, samples, found.identity)
    with tqdm(desc="evaluating", unit=" tokens", unit_scale=True) as bar:

        def progress(name: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_description(name or "evaluated", refresh=False)
            bar.update(done - bar.n)

        records = evaluate(*given, progress)
    metrics = report.metrics_of(found.entries, records)
    _write_json(run.out / "metrics.json", metrics)
    say(report.write_report(run.out, metrics, config))


def _config(found: Prepared, specifications: list[str], settings: EvaluationSettings) -> dict[str, Any]:
    versions = {name: version(name) for name in ("lowrank-cache", "torch", "transformers")}
    versions["python"] = platform.python_version()
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    if found.identity["device"] == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    facts = {"text": found.source, "caches": specifications, "settings": asdict(settings)}
    return {**found.identity, **facts, "versions": versions, "machine": machine}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
