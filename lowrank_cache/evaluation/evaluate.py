"""One evaluation of many caches: perplexity, look-ups, long-context tasks, bytes and times, by sample, resumable.

Everything is read through a cache that was filled ``chunk`` tokens at a time, so that what is measured is what the
cache stores (see ``streaming``).
"""

import json
import platform
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowrank_cache.evaluation import report, tasks
from lowrank_cache.evaluation.caches import CacheEntry, CacheSizes, tensor_bytes
from lowrank_cache.evaluation.inputs import Run, append_result, prepare, processor, resume_results
from lowrank_cache.evaluation.streaming import fill, force_answers, greedy_answer, now, stream, windows_of
from lowrank_cache.evaluation.tasks import QUESTIONS, TASKS, CodeText, Prompter, Question
from lowrank_cache.probe import cache_argument

__all__ = ["EvaluationSettings", "evaluate", "record_key", "run_evaluation"]

_KEY = ("kind", "task", "length", "index")
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
    attend: bool = True  # attend to latents; False reconstructs keys and values
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


class _Job(NamedTuple):
    """Records that are measured together, the tokens that this takes, and what gives the facts of each of them."""

    keys: list[tuple]
    tokens: int
    run: Callable[[CacheEntry], list[dict[str, Any]]]


def record_key(record: dict[str, Any]) -> tuple:
    """What a record is of, its cache apart: kind, task, length and index."""
    return tuple(map(record.get, _KEY))


def evaluate(
    model: PreTrainedModel, tokenizer, text: str, entries: list[CacheEntry], settings: EvaluationSettings,
    results: Path, identity: dict[str, Any],
    progress: Callable[[str, int, int], object] = lambda name, done, total: None,
) -> dict[str, dict[tuple, dict[str, Any]]]:  # fmt: skip
    """Measure what ``results`` does not hold yet.

    Args:
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
    known: dict[str, dict[tuple, dict[str, Any]]] = {entry.name: {} for entry in entries}
    for record in resume_results(results, {**settings.fixed(), **identity}):
        known.setdefault(record["cache"], {})[record_key(record)] = record
    jobs = list(_jobs(model, tokenizer, text, settings))
    pending = [(entry, job) for entry in entries for job in jobs if not known[entry.name].keys() >= set(job.keys)]
    total, done = sum(job.tokens for _, job in pending), 0
    for entry, job in pending:
        progress(entry.name, done, total)
        measured = job.run(replace(entry, make=partial(entry.make, settings.attend)))
        for key, facts in zip(job.keys, measured, strict=True):
            named = {name: value for name, value in zip(_KEY, key, strict=True) if value is not None}
            known[entry.name][key] = {"cache": entry.name, **named, **facts}
            append_result(results, known[entry.name][key])
        done += job.tokens
    progress("", done, total)
    asked = {key for job in jobs for key in job.keys}
    return {one.name: {key: found for key, found in known[one.name].items() if key in asked} for one in entries}


def _jobs(model, tokenizer, text: str, settings: EvaluationSettings) -> Iterator[_Job]:
    """Windows first, then codes and tasks, then times, by when the machine is warm."""

    def batches(kind: str, task: str | None, length: int | None, contexts, measure: Callable) -> Iterator[_Job]:
        for start in range(0, len(contexts), settings.batch):
            part = slice(start, start + settings.batch)
            sizes = list(map(len, contexts[part]))
            keys: list[tuple] = [(kind, task, length, start + offset) for offset in range(len(sizes))]
            yield _Job(keys, sum(sizes), partial(measure, part))

    ids = torch.tensor(tokenizer(text)["input_ids"])
    if settings.windows:
        windows = windows_of(ids, settings.window, settings.windows)
        yield from batches("window", None, None, windows, partial(_windows, model, settings, windows))
    makers = {"lookup": partial(tasks.lookup_texts, tokenizer), "needle": partial(tasks.needle_texts, tokenizer, ids)}
    asked = [("lookup", settings.facts, settings.lookups), *(("needle", *needles) for needles in settings.needles)]
    for task, length, questions in asked:
        texts = makers[task](questions // QUESTIONS, length, settings.seed)
        measure = partial(_codes, model, settings.chunk, settings.prompt if task == "lookup" else 0, texts)
        yield from batches("codes", task, length, [text.context for text in texts], measure)
    prompter = Prompter(tokenizer, settings.chat)
    if settings.samples and settings.tasks and settings.lengths:
        haystack, overhead = tasks.Haystack(text), prompter.overhead()
        for length, task, index in product(settings.lengths, settings.tasks, range(settings.samples)):
            sample = tasks.sample_of(task, prompter.count, haystack, length, index, settings.seed, overhead)
            context = prompter.context(sample.context)
            measure = partial(_answers, model, settings, prompter, context, sample.questions)
            yield _Job([("answers", task, length, index)], len(context), measure)
    for length in settings.lengths:
        needed = length + settings.steps + 1
        read = ids.repeat(-(-needed // len(ids)))[:needed]
        yield _Job([("cost", None, length, 0)], needed, partial(_cost, model, settings, read, length))


def _windows(model, settings: EvaluationSettings, windows: Tensor, part: slice, entry: CacheEntry) -> list[dict]:
    options = {"chunk": settings.chunk, "batch": settings.batch, "prompt": settings.prompt}
    losses = stream(model, windows[part], entry.make, **options)[:, max(settings.prompt - 1, 0) :]
    quarters = torch.stack([quarter.mean(1) for quarter in losses.tensor_split(4, dim=1)], 1)
    return [{"loss": loss, "quarters": of} for loss, of in zip(losses.mean(1).tolist(), quarters.tolist(), strict=True)]


def _codes(model, chunk: int, prompt: int, texts: list[CodeText], part: slice, entry: CacheEntry) -> list[dict]:
    contexts, questions = (list(column) for column in zip(*texts[part], strict=True))
    scores = force_answers(model, contexts, questions, entry.make, chunk=chunk, prompt=prompt)
    columns = (zip(*answers, strict=True) for answers in scores)
    return [{"losses": list(losses), "exact": list(map(float, exact))} for losses, exact in columns]


def _answers(
    model, settings: EvaluationSettings, prompter: Prompter, context: Tensor, questions: list[Question],
    entry: CacheEntry,
) -> list[dict]:  # fmt: skip
    ends = model.generation_config.eos_token_id  # one, several or None
    stop = {*(ends if isinstance(ends, list) else [ends]), prompter.tokenizer.eos_token_id}
    cache, answers = entry.make(), []
    fill(model, cache, context, chunk=settings.chunk, first=settings.prompt)
    for question in questions:
        ids = prompter.question(question.text, question.prefix)
        generated = greedy_answer(model, cache, ids, tasks.answer_tokens(prompter.count, question), stop)
        answer = prompter.tokenizer.decode(generated, skip_special_tokens=True)
        found = {"answer": answer, "score": tasks.score(question.expected, answer)}
        answers.append(question._asdict() | found)
    scores = [answer["score"] for answer in answers]
    means = {"score": statistics.fmean(scores), "exact": statistics.fmean(one == 1 for one in scores)}
    return [{"tokens": len(context), **means, "answers": answers}]


@torch.no_grad()
def _cost(model, settings: EvaluationSettings, tokens: Tensor, length: int, entry: CacheEntry) -> list[dict]:
    cache, start = entry.make(), now(model.device)
    fill(model, cache, tokens[:length], chunk=settings.chunk, first=settings.prompt)
    record: dict[str, Any] = {"fill_seconds": now(model.device) - start, "stored_bytes": tensor_bytes(cache)}
    if entry.name == "full":
        states = [getattr(layer, side, None) for layer in cache.layers for side in ("keys", "values")]
        record["bytes_at_16_bits"] = 2 * sum(part.numel() for part in states if isinstance(part, Tensor))
    steps, argument = [], cache_argument(model, cache)
    for token in tokens[length:].to(model.device):
        start = now(model.device)
        model(input_ids=token.view(1, 1), **argument, use_cache=True)
        steps.append(now(model.device) - start)
    return [{**record, "step_seconds": statistics.median(steps[1:])}]  # the first one warms up


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
    versions = {name: version(name) for name in ("lowrank-cache", "torch", "transformers")}
    machine = {"processor": processor(), "threads": torch.get_num_threads()}
    if found.identity["device"] == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    config = {**found.identity, "text": found.source, "caches": names, "settings": asdict(settings)}
    config |= {"versions": {**versions, "python": platform.python_version()}, "machine": machine}
    _write_json(run.out / "config.json", config)
    given = (found.model, found.tokenizer, found.text, found.entries, settings, samples, found.identity)
    with tqdm(desc="evaluating", unit=" tokens", unit_scale=True) as bar:

        def progress(name: str, done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.set_description(name or "evaluated")

        records = evaluate(*given, progress)
    metrics = report.metrics_of(found.entries, records)
    _write_json(run.out / "metrics.json", metrics)
    say(report.write_report(run.out, metrics, config))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
