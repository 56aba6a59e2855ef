"""What an evaluation found: numbers of every cache beside those of the full cache, as JSON and as Markdown."""

import math
from collections.abc import Sequence
from typing import Any

from lowrank_cache.evaluation.bootstrap import paired_interval
from lowrank_cache.evaluation.cache_rows import CacheRow

__all__ = ["metrics_of", "report_markdown"]

Records = dict[tuple, dict[str, Any]]


def metrics_of(rows: list[CacheRow], records: dict[str, Records]) -> dict[str, dict[str, Any]]:
    """Numbers by cache, each with its difference to the first one's, which is the full cache.

    Differences are paired over what both have measured. ``ratio`` is a perplexity over that of the full cache,
    ``smaller`` the measured bytes of the full cache over stored bytes; intervals hold 95 % (see ``bootstrap``).
    """
    full = records[rows[0].name]
    return {
        row.name: {
            "latent_ratio": row.latent_ratio,
            "projection_bytes": row.projection_bytes,
            "perplexity": _perplexity(records[row.name], full),
            "lengths": _lengths(records[row.name], full, simulated=row.name.startswith("kivi")),
        }
        for row in rows
    }


def _of_kind(records: Records, kind: str) -> Records:
    return {key: record for key, record in records.items() if record["kind"] == kind}


def _perplexity(records: Records, full: Records) -> dict[str, Any] | None:
    windows = _of_kind(records, "window")
    if not windows:
        return None
    losses = [record["loss"] for record in windows.values()]
    found: dict[str, Any] = {"value": math.exp(sum(losses) / len(losses)), "windows": len(windows)}
    paired = [record["loss"] - full[key]["loss"] for key, record in windows.items() if key in full]
    if records is not full and paired:
        interval = paired_interval([paired])
        found |= {"ratio": math.exp(interval.mean), "low": math.exp(interval.low), "high": math.exp(interval.high)}
    return found


def _lengths(records: Records, full: Records, simulated: bool) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for key, cost in _of_kind(records, "cost").items():
        entry = found.setdefault(str(cost["length"]), {})
        entry["stored_bytes"] = cost["stored_bytes"]
        if key in full:
            entry["smaller"] = full[key]["stored_bytes"] / cost["stored_bytes"]
        # A simulated cache's times are not those of the cache that it stands for.
        entry["fill_seconds"] = None if simulated else cost["fill_seconds"]
        entry["step_seconds"] = None if simulated else cost["step_seconds"]
    answers = _of_kind(records, "answers")
    for length in sorted({record["length"] for record in answers.values()}):
        tasks: dict[str, Records] = {}
        for key, record in answers.items():
            if record["length"] == length:
                tasks.setdefault(record["task"], {})[key] = record
        entry = found.setdefault(str(length), {})
        entry["tasks"] = {task: _score([part], full, records is full) for task, part in tasks.items()}
        entry |= _score(list(tasks.values()), full, records is full)
    return found


def _score(strata: Sequence[Records], full: Records, is_full: bool) -> dict[str, Any]:
    """Mean over the strata of their mean score, and its difference to the full cache."""

    def mean(field: str) -> float:
        return sum(sum(record[field] for record in part.values()) / len(part) for part in strata) / len(strata)

    found: dict[str, Any] = {"score": mean("score"), "exact": mean("exact"), "samples": sum(map(len, strata))}
    paired = [[rec["score"] - full[key]["score"] for key, rec in part.items() if key in full] for part in strata]
    if not is_full and all(paired):
        interval = paired_interval(paired)
        found |= {"difference": interval.mean, "low": interval.low, "high": interval.high}
    return found


def report_markdown(metrics: dict[str, dict[str, Any]], config: dict[str, Any]) -> str:
    """The summary of an evaluation: conditions, one table of all caches, one of the tasks at each length, times."""
    lengths = list(dict.fromkeys(length for entry in metrics.values() for length in entry["lengths"]))
    parts = ["# Evaluation", _conditions(config), "## Size and quality", _summary(metrics, lengths)]
    for length in lengths:
        tasks = list(dict.fromkeys(task for entry in metrics.values() for task in _at(entry, length).get("tasks", {})))
        if tasks:
            parts += [f"## Tasks at {int(length):,} tokens", _tasks(metrics, length, tasks)]
    parts += ["## Bytes and times", _costs(metrics, lengths)]
    return "\n\n".join(parts) + "\n"


def _conditions(config: dict[str, Any]) -> str:
    settings = config["settings"]
    return (
        f"{config['model']} in {config['dtype']} on {config['device']}. Text: {config['text']}. Perplexity of "
        f"{settings['windows']} windows of {settings['window']} tokens; {settings['samples']} contexts of each task "
        f"and length. All of it is streamed {settings['chunk']} tokens a forward through caches with a window of "
        f"{settings['residual_length']} tokens and {settings['num_sink_tokens']} sinks, and answers are generated. "
        "Differences to the full cache are paired; brackets hold 95 % of a bootstrap over windows or contexts."
    )


def _table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _at(entry: dict[str, Any], length: str) -> dict[str, Any]:
    return entry["lengths"].get(length, {})


def _summary(metrics: dict[str, dict[str, Any]], lengths: list[str]) -> str:
    head = ["cache", "ratio in latents", *(f"smaller at {int(length):,}" for length in lengths), "perplexity"]
    head += [f"score at {int(length):,}" for length in lengths] + ["bases, MB"]
    lines = []
    for name, entry in metrics.items():
        ratio = entry["latent_ratio"]
        cells = [name, "–" if ratio is None else f"{ratio:.2f}x"]
        cells += [_times(_at(entry, length).get("smaller")) for length in lengths]
        cells += [_perplexity_cell(entry["perplexity"]), *(_score_cell(_at(entry, length)) for length in lengths)]
        lines.append([*cells, f"{entry['projection_bytes'] / 1e6:.1f}"])
    return _table(head, lines)


def _tasks(metrics: dict[str, dict[str, Any]], length: str, tasks: list[str]) -> str:
    lines = []
    for name, entry in metrics.items():
        found = _at(entry, length).get("tasks", {})
        lines.append([name, *(_score_cell(found.get(task, {})) for task in tasks)])
    return _table(["cache", *tasks], lines)


def _costs(metrics: dict[str, dict[str, Any]], lengths: list[str]) -> str:
    names = ("stored, MB", "filled in, s", "a token in, ms")
    head = ["cache", *(f"{int(length):,} tokens: {name}" for length in lengths for name in names)]
    lines = []
    for name, entry in metrics.items():
        cells = [name]
        for length in lengths:
            at = _at(entry, length)
            units = (("stored_bytes", 1e-6, 2), ("fill_seconds", 1, 2), ("step_seconds", 1e3, 1))
            cells += [_number(at.get(field), scale, digits) for field, scale, digits in units]
        lines.append(cells)
    return _table(head, lines)


def _number(value: float | None, scale: float, digits: int) -> str:
    return "–" if value is None else f"{value * scale:.{digits}f}"


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}x"


def _perplexity_cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    if "ratio" not in found:
        return f"{found['value']:.3f}"
    return f"x{found['ratio']:.4f} [{found['low']:.4f}, {found['high']:.4f}]"


def _score_cell(found: dict[str, Any]) -> str:
    if "score" not in found:
        return "–"
    if "difference" not in found:
        return f"{found['score']:.2f}"
    return f"{found['score']:.2f}, {found['difference']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"
