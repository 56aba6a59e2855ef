"""One evaluation of many caches: perplexity, look-ups, long-context tasks, bytes and times, by sample, resumable.

Everything is read through a cache that was filled ``chunk`` tokens at a time, so that what is measured is what the
cache stores (see ``streaming``).
"""

import json
import platform
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from typer import Option

from lowrank_cache.calibration.text import ids_within, opening_of
from lowrank_cache.evaluation import report, tasks
from lowrank_cache.evaluation.caches import CacheEntry, CacheSizes, tensor_bytes
from lowrank_cache.evaluation.inputs import Run, append_result, prepare, resume_results
from lowrank_cache.evaluation.streaming import fill, force_answers, greedy_answer, now, processor, stream, windows_of
from lowrank_cache.evaluation.tasks import QUESTIONS, TASKS, CodeText, Prompter, Question
from lowrank_cache.probe import cache_argument

# Keys of records that are measured together, the tokens that this takes, and what gives the facts of each of them.
_Job = tuple[list[tuple], int, Callable[[CacheEntry], list[dict[str, Any]]]]
_KEY = ("kind", "task", "length", "index")


@dataclass(frozen=True)
class EvaluationSettings(CacheSizes):
    """What is measured, and how; annotated fields are options of the command line."""

    # Tokens of a task's context, question and answer together, and of the contexts that are timed
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    tasks: tuple[str, ...] = tuple(TASKS)  # of ``tasks.TASKS``
    samples: Annotated[int, Option(help="Contexts of each task and length; 0 for none.")] = 16
    lookups: Annotated[int, Option(help="Questions about key–value lists of 22 entries, 4 a list.")] = 64
    facts: int = 22  # entries of such a list
    # Pairs of tokens of prose, and questions about codes hidden in texts of that length, 4 a text
    needles: tuple[tuple[int, int], ...] = ()
    windows: Annotated[int, Option(help="Windows of text for the perplexity, evenly spaced; 0 for none.")] = 16
    window: Annotated[int, Option(help="Tokens per window.")] = 1024
    chunk: Annotated[int, Option(help="Tokens per forward.")] = 128
    prompt: Annotated[int, Option(help="Tokens of a first, unscored forward; 0 for a chunk, all scored.")] = 0
    batch: Annotated[int, Option(help="Windows, lists or texts per forward.")] = 4
    steps: int = 8  # timed decode steps after a context of each length
    chat: Annotated[bool, Option(help="Ask in the model's chat template.")] = False
    attend: Annotated[bool, Option(help="Attend to latents, or reconstruct keys and values.")] = True
    seed: Annotated[int, Option(help="Of look-ups, needles and tasks.")] = 0

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
        """What all runs that write into one file must have in common; a record says which of the others it is of."""
        growing = ("lengths", "tasks", "samples", "lookups", "needles")
        return {name: value for name, value in asdict(self).items() if name not in growing}


def record_key(record: dict[str, Any]) -> tuple:
    """What a record is of, its cache apart: kind, task, length and index."""
    return tuple(map(record.get, _KEY))


def evaluate(
    model: PreTrainedModel, tokenizer, text: str, entries: list[CacheEntry], settings: EvaluationSettings,
    results: Path, identity: dict[str, Any],
) -> dict[str, dict[tuple, dict[str, Any]]]:  # fmt: skip
    """Measure what ``results``, a JSON Lines file with one record a sample, does not hold yet.

    Args:
        text: Evaluation text; never the one calibrated on.
        entries: The caches, the full one first: others are compared with it.
        identity: What else ``results`` belongs to, e.g. the model's name.

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
    pending = [(entry, *job) for entry in entries for job in jobs if not known[entry.name].keys() >= set(job[0])]
    with tqdm(total=sum(tokens for *_, tokens, _ in pending), unit=" tokens", unit_scale=True) as bar:
        for entry, keys, tokens, measure in pending:
            bar.set_description(entry.name)
            measured = measure(replace(entry, make=partial(entry.make, settings.attend)))
            for key, facts in zip(keys, measured, strict=True):
                named = {name: value for name, value in zip(_KEY, key, strict=True) if value is not None}
                known[entry.name][key] = {"cache": entry.name, **named, **facts}
                append_result(results, known[entry.name][key])
            bar.update(tokens)
    asked = {key for keys, *_ in jobs for key in keys}
    return {one.name: {key: found for key, found in known[one.name].items() if key in asked} for one in entries}


def _jobs(model, tokenizer, text: str, settings: EvaluationSettings) -> Iterator[_Job]:
    """Windows first, then codes and tasks, then times, by when the machine is warm."""

    def batches(kind: str, task: str | None, length: int | None, contexts, measure: Callable) -> Iterator[_Job]:
        for start in range(0, len(contexts), settings.batch):
            part = slice(start, start + settings.batch)
            sizes = list(map(len, contexts[part]))
            yield [(kind, task, length, start + at) for at in range(len(sizes))], sum(sizes), partial(measure, part)

    ids = torch.tensor(ids_within(tokenizer, text))
    if settings.windows:
        windows = windows_of(ids, settings.window, settings.windows, opening_of(tokenizer))
        yield from batches("window", None, None, windows, partial(_windows, model, settings, windows))
    makers = {"lookup": partial(tasks.lookup_texts, tokenizer), "needle": partial(tasks.needle_texts, tokenizer, ids)}
    asked = [("lookup", settings.facts, settings.lookups), *(("needle", *needles) for needles in settings.needles)]
    for task, length, questions in asked:
        texts = makers[task](questions // QUESTIONS, length, settings.seed)
        measure = partial(_codes, model, settings.chunk, settings.prompt if task == "lookup" else 0, texts)
        yield from batches("codes", task, length, [context for context, _ in texts], measure)
    prompter = Prompter(tokenizer, settings.chat)
    if settings.samples and settings.tasks and settings.lengths:
        haystack, overhead = tasks.Haystack(text), len(prompter.context("")) + len(prompter.question("", ""))
        for length, task, index in product(settings.lengths, settings.tasks, range(settings.samples)):
            sample = tasks.sample_of(task, prompter.count, haystack, length, index, settings.seed, overhead)
            context = prompter.context(sample[0])
            measure = partial(_answers, model, settings, prompter, context, sample[1])
            yield [("answers", task, length, index)], len(context), measure
    for length in settings.lengths:
        needed = length + settings.steps + 1
        read = ids.repeat(-(-needed // len(ids)))[:needed]
        yield [("cost", None, length, 0)], needed, partial(_cost, model, settings, read, length)


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
    are calibrated are kept in ``projections``, their statistics in ``moments.safetensors``. Specifications are those of
    ``caches.parse``; the full cache is always measured, first.

    An ImportError says what is missing for the report, a ValueError which cache cannot be made, before anything is
    measured; or that the folder holds an evaluation with other settings.
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
    given = found.model, found.tokenizer, found.text, found.entries
    metrics = report.metrics_of(found.entries, evaluate(*given, settings, samples, found.identity))
    _write_json(run.out / "metrics.json", metrics)
    say(report.write_report(run.out, metrics, config))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
