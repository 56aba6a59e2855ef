"""One evaluation of many caches: streamed perplexity, long-context tasks, bytes and times, sample by sample, resumable.

Everything is read through a cache that was filled ``chunk`` tokens at a time, so that what is measured is what the
cache stores: a single long prefill attends exactly to its own tokens and would show no loss.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_cache.cache_argument import cache_argument
from lowrank_cache.evaluation.answers import Prompter, fill, greedy_answer
from lowrank_cache.evaluation.baselines import tensor_bytes
from lowrank_cache.evaluation.cache_rows import CacheRow, CacheSizes
from lowrank_cache.evaluation.perplexity import stream, windows_of
from lowrank_cache.evaluation.results_file import append_result, resume_results
from lowrank_cache.evaluation.ruler import TASKS, Haystack, RulerSample, answer_tokens, recall_of, ruler_sample

__all__ = ["EvaluationSettings", "evaluate", "record_key"]

_GROWING = ("lengths", "tasks", "samples")  # a record says which of them it is, so a later run may ask for more


@dataclass(frozen=True)
class EvaluationSettings(CacheSizes):
    """What is measured, and how.

    Attributes:
        lengths: Tokens of a task's context, question and answer together, and of the contexts that are timed.
        tasks: Of ``ruler.TASKS``.
        samples: Contexts of each task and length.
        windows: Windows of text for the perplexity, evenly spaced; 0 for none.
        window: Tokens per window.
        chunk: Tokens per forward.
        prompt: Tokens of the first forward, of which windows score none; 0 for ``chunk``, all scored.
        batch: Windows per forward.
        steps: Timed decode steps after a context of each length.
        chat: Put context and question into a message of the model's chat template.
        attend: Attend to latents (``latent_attention``) instead of rebuilding keys and values.
        seed: Of the tasks.
    """

    lengths: tuple[int, ...] = (1024, 2048, 4096)
    tasks: tuple[str, ...] = tuple(TASKS)
    samples: int = 8
    windows: int = 16
    window: int = 1024
    chunk: int = 128
    prompt: int = 0
    batch: int = 4
    steps: int = 8
    chat: bool = False
    attend: bool = False
    seed: int = 0

    def __post_init__(self):
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown:
            raise ValueError(f"tasks must be of {sorted(TASKS)}, got {unknown}")
        least = {"samples": 0, "windows": 0, "prompt": 0, "window": 2, "chunk": 1, "batch": 1, "steps": 1}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {getattr(self, name)}")

    def fixed(self) -> dict[str, Any]:
        """What all runs that write into one file must have in common."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _GROWING}


@dataclass(frozen=True)
class _Job:
    """Some records, measured together, and the tokens that this takes."""

    keys: list[tuple]
    tokens: int
    run: Callable[[CacheRow], list[dict[str, Any]]]


def record_key(record: dict[str, Any]) -> tuple:
    """What a record is of, its cache apart: kind, task, length and index."""
    return record["kind"], record.get("task"), record.get("length"), record["index"]


def evaluate(
    model: PreTrainedModel,
    tokenizer,
    text: str,
    rows: list[CacheRow],
    settings: EvaluationSettings,
    results: Path,
    identity: dict[str, Any],
    progress: Callable[[str, int, int], object] = lambda name, done, total: None,
) -> dict[str, dict[tuple, dict[str, Any]]]:
    """Measure what ``results`` does not hold yet.

    Args:
        model: In eval mode.
        tokenizer: Of transformers.
        text: Evaluation text; never the one calibrated on.
        rows: The caches, the full one first: others are compared with it.
        results: JSON Lines file with one record a sample.
        identity: What else ``results`` belongs to, e.g. the model's name.
        progress: Called with the name of a cache, and tokens done and in all.

    Returns:
        By name of the cache and ``record_key``: a ``"window"`` with its mean ``loss``, ``"answers"`` about a context
        with their mean ``score``, or a ``"cost"`` with bytes and seconds at a length.

    Raises:
        ValueError: If ``results`` was made with other settings, or the text is too short.
    """
    known: dict[str, dict[tuple, dict[str, Any]]] = {}
    for record in resume_results(results, {**settings.fixed(), **identity}):
        known.setdefault(record["cache"], {})[record_key(record)] = record
    jobs = _jobs(model, tokenizer, text, settings)
    pending = {row.name: [job for job in jobs if not set(job.keys) <= set(known.get(row.name, {}))] for row in rows}
    total, done = sum(job.tokens for part in pending.values() for job in part), 0
    for row in rows:
        for job in pending[row.name]:
            progress(row.name, done, total)
            for record in job.run(row):
                record = {"cache": row.name, **record}
                append_result(results, record)
                known.setdefault(row.name, {})[record_key(record)] = record
            done += job.tokens
    progress("", done, total)
    asked = {key for job in jobs for key in job.keys}
    return {row.name: {key: known[row.name][key] for key in known.get(row.name, {}) if key in asked} for row in rows}


def _jobs(model, tokenizer, text: str, settings: EvaluationSettings) -> list[_Job]:
    """Windows first, then tasks, then times, by when the machine is warm."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    jobs = list(_window_jobs(model, ids, settings)) if settings.windows else []
    prompter = Prompter(tokenizer, settings.chat)
    if settings.samples and settings.tasks and settings.lengths:
        haystack = Haystack(text)
        for length in settings.lengths:
            for task in settings.tasks:
                for index in range(settings.samples):
                    sample = ruler_sample(
                        task, prompter.count, haystack, length, index, settings.seed, prompter.overhead()
                    )
                    jobs.append(_answers_job(model, prompter, sample, settings))
    jobs.extend(_cost_job(model, ids, length, settings) for length in settings.lengths)
    return jobs


def _window_jobs(model, ids: Tensor, settings: EvaluationSettings) -> Iterator[_Job]:
    windows = windows_of(ids, settings.window, settings.windows)
    scored = max(settings.prompt - 1, 0)
    for start in range(0, len(windows), settings.batch):
        part = windows[start : start + settings.batch]

        def run(row: CacheRow, part=part, start=start) -> list[dict[str, Any]]:
            make = row.maker(settings.attend)
            with row.attention(model, settings.attend):
                losses = stream(model, part, make, chunk=settings.chunk, batch=len(part), prompt=settings.prompt)
            means = losses[:, scored:].mean(1).tolist()
            return [{"kind": "window", "index": start + offset, "loss": loss} for offset, loss in enumerate(means)]

        keys: list[tuple] = [("window", None, None, start + offset) for offset in range(len(part))]
        yield _Job(keys, part.numel(), run)


def _answers_job(model, prompter: Prompter, sample: RulerSample, settings: EvaluationSettings) -> _Job:
    context = prompter.context(sample.context)

    def run(row: CacheRow) -> list[dict[str, Any]]:
        stop = _end_tokens(model, prompter.tokenizer)
        cache = row.maker(settings.attend)()
        answers = []
        with row.attention(model, settings.attend):
            fill(model, cache, context, chunk=settings.chunk, first=settings.prompt)
            for question in sample.questions:
                ids = prompter.question(question.text, question.prefix)
                generated = greedy_answer(model, cache, ids, answer_tokens(prompter.count, question), stop)
                answer = prompter.tokenizer.decode(generated, skip_special_tokens=True)
                answers.append({**asdict(question), "answer": answer, "recall": recall_of(question.expected, answer)})
        recalls = [answer["recall"] for answer in answers]
        record = {
            "kind": "answers",
            "task": sample.task,
            "length": sample.length,
            "index": sample.index,
            "tokens": len(context),
            "score": sum(recalls) / len(recalls),
            "exact": sum(recall == 1 for recall in recalls) / len(recalls),
            "answers": answers,
        }
        return [record]

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

    def run(row: CacheRow) -> list[dict[str, Any]]:
        cache = row.make()
        with torch.no_grad(), row.attention(model, settings.attend):
            start = _now(model.device)
            fill(model, cache, tokens[:length], chunk=settings.chunk, first=settings.prompt)
            filled = _now(model.device) - start
            stored = tensor_bytes(cache)
            steps, argument = [], cache_argument(model, cache)
            for token in tokens[length:].to(model.device):
                start = _now(model.device)
                model(input_ids=token.view(1, 1), **argument, use_cache=True)
                steps.append(_now(model.device) - start)
        record = {
            "kind": "cost",
            "length": length,
            "index": 0,
            "stored_bytes": stored,
            "fill_seconds": filled,
            "step_seconds": statistics.median(steps[1:]),  # the first one warms up
        }
        return [record]

    return _Job([("cost", None, length, 0)], needed, run)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
