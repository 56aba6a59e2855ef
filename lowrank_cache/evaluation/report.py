"""What an evaluation found: numbers of every cache beside those of the full cache, as JSON, Markdown and one HTML page.

Tables are written here, for every command; intervals are one method: a percentile bootstrap of paired differences.
"""

import html
import importlib.util
import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from lowrank_cache.evaluation.caches import CacheEntry

__all__ = [
    "Interval", "Table", "check_installed", "metrics_of", "paired_interval", "percent_ticks", "report_html",
    "report_markdown", "write_report",
]  # fmt: skip

Records = dict[tuple, dict[str, Any]]
Metrics = dict[str, dict[str, Any]]
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; background: #fff; max-width: 68rem; margin: 2rem auto;
  padding: 0 1.5rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
p { max-width: 46rem } footer { margin: 2.5rem 0; color: #5b6675; font-size: .85rem }
.table { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; text-align: right; vertical-align: top; max-width: 8rem }
td { border-bottom: 1px solid #e3e7ec }
th { vertical-align: bottom; min-width: 3.5rem; border-bottom: 2px solid #b9c2cd; font-weight: 600 }
td:first-child, td span { white-space: nowrap }
th:first-child, td:first-child { text-align: left; max-width: none; position: sticky; left: 0; background: #fff }
tbody tr:hover td { background: #f4f7fa } figure { margin: 1rem 0 } svg { max-width: 100%; height: auto }
figcaption { color: #5b6675; font-size: .87rem; max-width: 46rem }
"""


def check_installed() -> None:
    """Raise ImportError unless what intervals and plots need is there."""
    missing = [name for name in ("matplotlib", "scipy") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'this needs {" and ".join(missing)}: pip install "lowrank-cache[eval]"')


class Interval(NamedTuple):
    """A mean and the ends of its interval; all three are equal where nothing differs."""

    mean: float
    low: float
    high: float


def paired_interval(
    differences: Sequence[Sequence[float]], *, level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> Interval:
    """The percentile interval of a mean over samples, of which ``differences`` to the baseline are given.

    Args:
        differences: One list for each stratum (task, length, ...), one number a sample. Samples are drawn again within
            their stratum, and the means of the strata are averaged.
        level: Share of the draws' means within the interval.
        draws: Of the bootstrap.

    Raises:
        ValueError: If there are no samples in a stratum, or no strata.

    Source: Efron (1979). With fewer than about ten samples a percentile interval is too short.
    """
    from scipy.stats import bootstrap

    if not differences or not all(len(stratum) for stratum in differences):
        raise ValueError(f"differences must have samples in each stratum, got {[len(part) for part in differences]}")
    strata = [np.asarray(part, dtype=np.float64) for part in differences]
    found = bootstrap(
        [part.repeat(2) if len(part) == 1 else part for part in strata],  # which are drawn again as the one is
        lambda *parts, axis: sum(part.mean(axis) for part in parts) / len(parts),
        n_resamples=draws,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(sum(part.mean() for part in strata) / len(strata)), float(found.low), float(found.high))


def metrics_of(entries: list[CacheEntry], records: dict[str, Records]) -> Metrics:
    """Numbers by cache, each with its difference to the first one's, which is the full cache.

    Differences are paired over what both have measured. ``ratio`` is a perplexity over that of the full cache,
    ``smaller`` the measured bytes of the full cache over stored bytes, ``real_ratio`` its bytes at 16 bits a number
    over them; intervals hold 95 %.
    """
    full = records[entries[0].name]
    return {
        entry.name: {
            "latent_ratio": entry.latent_ratio,
            "projection_bytes": entry.projection_bytes,
            "perplexity": _perplexity(records[entry.name], full),
            "codes": _codes(records[entry.name], full),
            "lengths": _lengths(records[entry.name], full, simulated=entry.name.startswith("kivi")),
        }
        for entry in entries
    }


def _grouped(records: Records, field: str) -> dict[Any, Records]:
    found: dict[Any, Records] = {}
    for key, record in records.items():
        found.setdefault(record[field], {})[key] = record
    return found


def _perplexity(records: Records, full: Records) -> dict[str, Any] | None:
    windows = _grouped(records, "kind").get("window", {})
    if not windows:
        return None

    def summary(loss_of: Callable[[dict[str, Any]], float]) -> dict[str, float]:
        found = {"value": math.exp(fmean(map(loss_of, windows.values())))}
        paired = [loss_of(record) - loss_of(full[key]) for key, record in windows.items() if key in full]
        if records is not full and paired:
            found |= dict(zip(("ratio", "low", "high"), map(math.exp, paired_interval([paired])), strict=True))
        return found

    def quarter(at: int) -> dict[str, float]:
        return summary(lambda record: record["quarters"][at])

    whole = summary(lambda record: record["loss"])
    return {**whole, "windows": len(windows), "quarters": list(map(quarter, range(4)))}


def _codes(records: Records, full: Records) -> dict[str, dict[str, dict[str, Any]]]:
    """By task and length: loss of forced answers and share of exact ones, also where the full cache has them exact."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for task, of_task in _grouped(_grouped(records, "kind").get("codes", {}), "task").items():
        for length, part in _grouped(of_task, "length").items():
            losses = [loss for record in part.values() for loss in record["losses"]]
            exact = [right for record in part.values() for right in record["exact"]]
            at: dict[str, Any] = {"loss": fmean(losses), "exact": fmean(exact), "questions": len(exact)}
            paired = [(record, full[key]) for key, record in part.items() if key in full]
            if records is not full and paired:
                means = [fmean(ours["losses"]) - fmean(theirs["losses"]) for ours, theirs in paired]
                at |= dict(zip(("difference", "low", "high"), paired_interval([means]), strict=True))
                answers = [pair for both in paired for pair in zip(*(one["exact"] for one in both), strict=True)]
                at["kept"] = fmean(kept) if (kept := [ours for ours, theirs in answers if theirs]) else None
            found.setdefault(task, {})[str(length)] = at
    return found


def _lengths(records: Records, full: Records, simulated: bool) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for key, cost in _grouped(records, "kind").get("cost", {}).items():
        entry = found.setdefault(str(cost["length"]), {})
        entry["stored_bytes"] = cost["stored_bytes"]
        if key in full:
            entry["smaller"] = full[key]["stored_bytes"] / cost["stored_bytes"]
            entry["real_ratio"] = full[key]["bytes_at_16_bits"] / cost["stored_bytes"]
        # A simulated cache's times are not those of the cache that it stands for.
        entry["fill_seconds"] = None if simulated else cost["fill_seconds"]
        entry["step_seconds"] = None if simulated else cost["step_seconds"]
    for length, answers in sorted(_grouped(_grouped(records, "kind").get("answers", {}), "length").items()):
        tasks = _grouped(answers, "task")
        entry = found.setdefault(str(length), {})
        entry["tasks"] = {task: _score([part], full, records is full) for task, part in tasks.items()}
        entry |= _score(list(tasks.values()), full, records is full)
    return found


def _score(strata: Sequence[Records], full: Records, is_full: bool) -> dict[str, Any]:
    """Mean over the strata of their mean score, and its difference to the full cache."""
    found: dict[str, Any] = {"samples": sum(map(len, strata))}
    for field in ("score", "exact"):
        found[field] = fmean(fmean(record[field] for record in part.values()) for part in strata)
    paired = [[rec["score"] - full[key]["score"] for key, rec in part.items() if key in full] for part in strata]
    if not is_full and all(paired):
        found |= dict(zip(("difference", "low", "high"), paired_interval(paired), strict=True))
    return found


class Table(NamedTuple):
    """A head and lines of cells, all of them text."""

    head: list[str]
    lines: list[list[str]]

    def markdown(self) -> str:
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (self.head, ["---"] * len(self.head), *self.lines))

    def html(self) -> str:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.head)
        ranged = (re.sub(r"\[.*?]", r"<span>\g<0></span>", html.escape(cell)) for cells in self.lines for cell in cells)
        lines = ["".join(f"<td>{next(ranged)}</td>" for _ in cells) for cells in self.lines]
        body = "\n".join(f"<tr>{line}</tr>" for line in lines)
        return f'<div class="table"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def report_markdown(metrics: Metrics, config: dict[str, Any]) -> str:
    """The report without its pictures, but for the one beside it."""
    parts = ["# Evaluation", _conditions(config)]
    for title, table in _tables(metrics):
        parts += [f"## {title}", table.markdown()]
    if _lengths_of(metrics):
        parts.append("![Quality against stored bytes](pareto.png)")
    return "\n\n".join(parts) + "\n"


def report_html(metrics: Metrics, config: dict[str, Any]) -> str:
    """The report as one page that needs no other file: tables, and plots as inline SVG."""
    figures: dict[str, str] = {}
    if _lengths_of(metrics):
        caption = (
            "Better is to the left, and low for the perplexity, high for scores. A line joins the caches that no other "
            "one beats in size and quality at once."
        )
        figures["Size and quality"] = _svg(_pareto(metrics), "Quality against stored bytes", caption)
    if any((entry["perplexity"] or {}).get("ratio") for entry in metrics.values()):
        caption = (
            "Left: the ratio over whole windows with its interval. Right: by quarter of the windows, in the same "
            "colours; a line that rises shows errors that build up."
        )
        figures["Perplexity by quarter of the windows"] = _svg(_ratios(metrics), "Perplexity ratios", caption)
    parts = []
    for title, table in _tables(metrics):
        parts.append(f"<h2>{html.escape(title)}</h2>\n{table.html()}\n{figures.get(title, '')}")
    name, conditions = html.escape(config["model"]), html.escape(_conditions(config))
    packages = ", ".join(f"{package} {found}" for package, found in config.get("versions", {}).items())
    machine = ", ".join(f"{fact} {found}" for fact, found in config.get("machine", {}).items())
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>Caches on {name}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>Caches on {name}</h1>\n<p>{conditions}</p>\n"
        + "\n".join(parts)
        + f"\n<footer>{html.escape('; '.join(filter(None, (packages, machine))))}</footer>\n</body>\n</html>\n"
    )


def write_report(out: Path, metrics: Metrics, config: dict[str, Any]) -> str:
    """Write ``report.html``, ``report.md`` and its picture into ``out``; returns the Markdown."""
    text = report_markdown(metrics, config)
    (out / "report.md").write_text(text, encoding="utf-8")
    (out / "report.html").write_text(report_html(metrics, config), encoding="utf-8")
    if _lengths_of(metrics):
        _pareto(metrics).savefig(out / "pareto.png", dpi=120)
    return text


def _conditions(config: dict[str, Any]) -> str:
    settings = config["settings"]
    return (
        f"{config['model']} in {config['dtype']} on {config['device']}. Text: {config['text']}. Perplexity of "
        f"{settings['windows']} windows of {settings['window']} tokens; {settings['samples']} contexts of each task "
        f"and length. All of it is streamed {settings['chunk']} tokens a forward through caches with a window of "
        f"{settings['residual_length']} tokens and {settings['num_sink_tokens']} sinks. Answers to tasks are "
        "generated, codes of look-ups and needles are forced. Differences to the full cache are paired; brackets "
        "hold 95 % of a bootstrap over windows, texts or contexts."
    )


def _lengths_of(metrics: Metrics) -> list[str]:
    return list(dict.fromkeys(length for entry in metrics.values() for length in entry["lengths"]))


def _at(entry: dict[str, Any], length: str) -> dict[str, Any]:
    return entry["lengths"].get(length, {})


def _tables(metrics: Metrics) -> list[tuple[str, Table]]:
    """Titles and tables: all caches, quarters, codes, tasks at each length, bytes and times."""
    lengths = _lengths_of(metrics)
    head = ["cache", "ratio in latents", *(f"smaller at {int(length):,}" for length in lengths), "perplexity"]
    head += [*(f"score at {int(length):,}" for length in lengths), "bases, MB"]
    lines = []
    for name, entry in metrics.items():
        smaller, scores = ([_at(entry, length).get(what) for length in lengths] for what in ("smaller", "score"))
        cells = [_number(value, "{:.2f}x") for value in (entry["latent_ratio"], *smaller)]
        cells += [_perplexity_cell(entry["perplexity"]), *(_number(value, "{:.2f}") for value in scores)]
        lines.append([name, *cells, f"{entry['projection_bytes'] / 1e6:.1f}"])
    found = [("Size and quality", Table(head, lines))]
    if any(entry["perplexity"] for entry in metrics.values()):
        quarters = {name: (entry["perplexity"] or {}).get("quarters", [None] * 4) for name, entry in metrics.items()}
        lines = [[name, *map(_perplexity_cell, of_cache)] for name, of_cache in quarters.items()]
        head = ["cache", "first quarter", "second", "third", "last"]
        found.append(("Perplexity by quarter of the windows", Table(head, lines)))
    kinds = list(dict.fromkeys((task, length) for one in metrics.values() for task in one["codes"]
                               for length in one["codes"][task]))  # fmt: skip
    if kinds:
        units = {"lookup": "look-ups, {} facts", "needle": "needles, {:,} tokens"}
        head = ["cache"]
        for task, length in kinds:
            head += [f"{units[task].format(int(length))}: loss, nats", "exact"]
        lines = []
        for name, entry in metrics.items():
            pairs = [_code_cells(entry["codes"].get(task, {}).get(length)) for task, length in kinds]
            lines.append([name, *(cell for pair in pairs for cell in pair)])
        found.append(("Look-ups and needles", Table(head, lines)))
    for length in lengths:
        tasks = list(dict.fromkeys(task for entry in metrics.values() for task in _at(entry, length).get("tasks", {})))
        lines = []
        for name, entry in metrics.items():
            of_task = _at(entry, length).get("tasks", {})
            lines.append([name, *map(_score_cell, (_at(entry, length), *(of_task.get(task, {}) for task in tasks)))])
        if tasks:
            found.append((f"Tasks at {int(length):,} tokens", Table(["cache", "all of them", *tasks], lines)))
    if lengths:
        found.append(("Bytes and times", _costs(metrics, lengths)))
    return found


def _costs(metrics: Metrics, lengths: list[str]) -> Table:
    units = [("stored, MB", "stored_bytes", 1e-6, "{:.2f}"), ("to 16 bits", "real_ratio", 1, "{:.2f}x")]
    units += [("filled in, s", "fill_seconds", 1, "{:.2f}"), ("a token in, ms", "step_seconds", 1e3, "{:.1f}")]
    head = ["cache", *(f"{int(length):,} tokens: {name}" for length in lengths for name, *_ in units)]
    lines = []
    for name, entry in metrics.items():
        found = ((_at(entry, length).get(field), form, scale) for length in lengths for _, field, scale, form in units)
        lines.append([name, *(_number(*one) for one in found)])
    return Table(head, lines)


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return "–" if value is None else form.format(value * scale)


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


def _code_cells(found: dict[str, Any] | None) -> tuple[str, str]:
    """Loss, and share of exact answers; in brackets that among those that the full cache has exact."""
    if found is None:
        return "–", "–"
    if "difference" not in found:
        return f"{found['loss']:.3f}", f"{found['exact']:.2f}"
    kept = "" if found["kept"] is None else f" ({found['kept']:.2f})"
    return f"{found['difference']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]", f"{found['exact']:.2f}{kept}"


def _svg(figure, title: str, caption: str) -> str:
    """A figure as inline SVG: text stays text, and nothing points out of the page."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawn = buffer.getvalue()
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    drawn = re.sub(r' (?:xmlns(?::\w+)?="[^"]*"|id="[\w.]+_\d+")', "", drawn).replace("xlink:href", "href")
    drawn = drawn.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
    return f"<figure>\n{drawn}<figcaption>{html.escape(caption)}</figcaption>\n</figure>"


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each cache; both repeat after long."""
    return {
        name: {"color": f"C{index % 10}", "marker": "os^Dv"[index // 10 % 5], "markersize": 7}
        for index, name in enumerate(names)
    }


def _pareto(metrics: Metrics):
    """Perplexity ratio at the longest length and task scores at each, against stored bytes."""
    from matplotlib.figure import Figure

    lengths, styles = _lengths_of(metrics), _styles(list(metrics))
    panels = [("ratio", lengths[-1], "perplexity to the full cache")]
    panels += [("score", one, "mean score of the tasks") for one in lengths
               if any("score" in _at(entry, one) for entry in metrics.values())]  # fmt: skip
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(10, 3.6 * rows + 0.25 * (len(metrics) / 3 + 1)), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).flat
    for axis, (what, length, label) in zip(axes, panels, strict=False):
        points = [(name, *point) for name, entry in metrics.items() if (point := _point(entry, what, length))]
        sign = 1 if what == "score" else -1
        front = _front([(size, sign * value) for _, size, value in points])
        axis.plot([size for size, _ in front], [sign * value for _, value in front], color="#b9c2cd", zorder=1)
        for name, size, value in points:
            axis.plot(size, value, linestyle="", label=name, **styles[name])
        axis.set(xscale="log", ylabel=label, xlabel=f"bytes stored at {int(length):,} tokens, % of the full cache")
        axis.grid(alpha=0.3)
        axis.margins(0.08)
        percent_ticks(axis)
    for axis in list(axes)[len(panels) :]:
        axis.set_axis_off()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _point(entry: dict[str, Any], what: str, length: str) -> tuple[float, float] | None:
    """Percentage of the full cache's bytes, and value; None for what was not measured."""
    at, perplexity = _at(entry, length), entry["perplexity"]
    value = at.get("score") if what == "score" else perplexity and perplexity.get("ratio", 1.0)
    return None if "smaller" not in at or value is None else (100 / at["smaller"], value)


def _front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points with no other one at most as large and at least as good, by size."""
    front: list[tuple[float, float]] = []
    for size, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or value > front[-1][1]:
            front.append((size, value))
    return front


def _ratios(metrics: Metrics):
    """Perplexity ratios with their intervals, and by quarter of the windows."""
    from matplotlib.figure import Figure

    styles = _styles(list(metrics))
    found = {name: entry["perplexity"] for name, entry in metrics.items() if (entry["perplexity"] or {}).get("ratio")}
    figure = Figure(figsize=(10, max(3.2, 0.32 * len(found) + 1.2)), layout="constrained")
    whole, quarters = figure.subplots(1, 2)
    for place, (name, one) in enumerate(found.items()):
        bars = [[one["ratio"] - one["low"]], [one["high"] - one["ratio"]]]
        whole.errorbar(one["ratio"], place, xerr=bars, capsize=3, **styles[name])
        quarters.plot(range(4), [quarter["ratio"] for quarter in one["quarters"]], **styles[name])
    whole.set_yticks(range(len(found)), list(found))
    whole.invert_yaxis()
    whole.axvline(1, color="grey", linestyle=":")
    quarters.axhline(1, color="grey", linestyle=":")
    quarters.set_xticks(range(4), ["first", "second", "third", "last"])
    whole.set_xlabel("perplexity to the full cache")
    quarters.set(xlabel="quarter of the windows", ylabel="perplexity to the full cache")
    for axis in (whole, quarters):
        axis.grid(alpha=0.3)
        axis.ticklabel_format(useOffset=False, axis="x" if axis is whole else "y")
    return figure


def percent_ticks(axis) -> None:
    """Ticks on a logarithmic x axis that stay apart, within what is drawn."""
    low, high = axis.get_xlim()
    ticks = [tick for tick in (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150) if low <= tick <= high]
    axis.set_xticks(ticks, [f"{tick} %" for tick in ticks])
    axis.set_xticks([], minor=True)
