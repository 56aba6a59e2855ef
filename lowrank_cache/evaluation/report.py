"""What an evaluation found: numbers of every cache beside those of the full cache, as JSON, Markdown and one HTML page.

Tables are written here, for every command; intervals are one method: a percentile bootstrap of paired differences.
"""

import importlib.util
import io
import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader

from lowrank_cache.evaluation.caches import CacheEntry

Records = dict[tuple, dict[str, Any]]
Metrics = dict[str, dict[str, Any]]
# How a cell is written: in the last of the forms whose fields have all been measured.
_PERPLEXITY = "{value:.3f}", "x{ratio:.4f} [{low:.4f}, {high:.4f}]"
_SCORE = "{score:.2f}", "{score:.2f}, {difference:+.2f} [{low:+.2f}, {high:+.2f}]"
_LOSS = "{loss:.3f}", "{difference:+.3f} [{low:+.3f}, {high:+.3f}]"
_EXACT = "{exact:.2f}", "{exact:.2f} ({kept:.2f})"  # in brackets the share among those that the full cache has exact
_SCALES = {"projection_bytes": 1e-6, "stored_bytes": 1e-6, "step_seconds": 1e3}  # of MB and ms
_COSTS = {"stored, MB": "{stored_bytes:.2f}", "to 16 bits": "{real_ratio:.2f}x", "filled in, s": "{fill_seconds:.2f}",
          "a token in, ms": "{step_seconds:.1f}"}  # fmt: skip
_CODES = {"lookup": "look-ups, {:d} facts", "needle": "needles, {:,} tokens"}


def check_installed() -> None:
    """Raise ImportError unless what intervals and plots need is there."""
    missing = [name for name in ("matplotlib", "scipy") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'this needs {" and ".join(missing)}: pip install "lowrank-cache[eval]"')


def paired_interval(differences: Sequence[Sequence[float]], *, draws: int = 10_000, seed: int = 0) -> tuple[float, ...]:
    """A mean over samples, of which ``differences`` to the baseline are given, and the ends of its interval (95 %).

    Args:
        differences: One list for each stratum (task, length, ...), one number a sample. Samples are drawn again within
            their stratum, and the means of the strata are averaged.
        draws: Of the percentile bootstrap.

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
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(sum(part.mean() for part in strata) / len(strata)), float(found.low), float(found.high)


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
            "lengths": _lengths(records[entry.name], full),
        }
        for entry in entries
    }


def _grouped(records: Records, kind: str) -> dict[tuple, Records]:
    """Records of one kind, by task and length."""
    found: dict[tuple, Records] = {}
    for key, record in records.items():
        if key[0] == kind:
            found.setdefault(key[1:3], {})[key] = record
    return found


def _summary(
    strata: Sequence[Records], full: Records, value: Callable[[dict[str, Any]], float],
    mean: str, difference: str = "difference", unit: Callable[[float], float] = float,
) -> dict[str, float]:  # fmt: skip
    """The mean over strata of their means, and the difference to the full cache with its interval.

    There is no difference for that cache itself, or if a stratum shares no key with it.
    """
    found = {mean: unit(fmean(fmean(map(value, part.values())) for part in strata))}
    paired = [
        [value(record) - value(full[key]) for key, record in part.items() if full.get(key, record) is not record]
        for part in strata
    ]
    if all(paired):
        found |= zip((difference, "low", "high"), map(unit, paired_interval(paired)), strict=True)
    return found


def _perplexity(records: Records, full: Records) -> dict[str, Any] | None:
    windows = _grouped(records, "window").get((None, None), {})
    if not windows:
        return None

    def summary(*path: Any) -> dict[str, float]:
        return _summary([windows], full, lambda record: _at(record, *path), "value", "ratio", math.exp)

    return {**summary("loss"), "windows": len(windows), "quarters": [summary("quarters", at) for at in range(4)]}


def _codes(records: Records, full: Records) -> dict[str, dict[str, dict[str, Any]]]:
    """By task and length: loss of forced answers and share of exact ones, also where the full cache has them exact."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for (task, length), part in _grouped(records, "codes").items():
        at: dict[str, Any] = _summary([part], full, lambda record: fmean(record["losses"]), "loss")
        exact = [answer for record in part.values() for answer in record["exact"]]
        at |= {"exact": fmean(exact), "questions": len(exact)}
        if "difference" in at:
            both = [(record["exact"], full[key]["exact"]) for key, record in part.items() if key in full]
            kept = [ours for pair in both for ours, theirs in zip(*pair, strict=True) if theirs]
            at["kept"] = fmean(kept) if kept else None
        found.setdefault(task, {})[str(length)] = at
    return found


def _lengths(records: Records, full: Records) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for (_, length), part in _grouped(records, "cost").items():
        ((key, cost),) = part.items()
        entry = found[str(length)] = {name: cost[name] for name in ("stored_bytes", "fill_seconds", "step_seconds")}
        if key in full:
            entry["smaller"] = full[key]["stored_bytes"] / cost["stored_bytes"]
            entry["real_ratio"] = full[key]["bytes_at_16_bits"] / cost["stored_bytes"]
    answers = _grouped(records, "answers")
    for length in sorted({length for _, length in answers}):
        tasks = {task: part for (task, at), part in answers.items() if at == length}
        entry = found.setdefault(str(length), {})
        entry["tasks"] = {task: _score([part], full) for task, part in tasks.items()}
        entry |= _score(list(tasks.values()), full)
    return found


def _score(strata: Sequence[Records], full: Records) -> dict[str, Any]:
    """Mean over the strata of their mean score, and its difference to the full cache."""
    exact = fmean(fmean(record["exact"] for record in part.values()) for part in strata)
    return {"samples": sum(map(len, strata)), "exact": exact, **_summary(strata, full, itemgetter("score"), "score")}


class Table(NamedTuple):
    """A head and lines of cells, all of them text."""

    head: list[str]
    lines: list[list[str]]

    def markdown(self) -> str:
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (self.head, ["---"] * len(self.head), *self.lines))


def report_text(kind: str, metrics: Metrics, config: dict[str, Any]) -> str:
    """The report as ``"md"``, with one picture beside it, or as ``"html"``, one page that needs no other file."""
    found = {"config": config, "tables": _tables(metrics), "pareto": bool(_lengths_of(metrics))}
    if kind == "html":
        found["figures"] = {title: _svg(figure, title) for title, draw in _FIGURES.items() if (figure := draw(metrics))}
    files = FileSystemLoader(Path(__file__).parent / "templates")
    template = Environment(autoescape=kind == "html", loader=files).get_template(f"report.{kind}")
    return template.render(found).strip() + "\n"


def write_report(out: Path, metrics: Metrics, config: dict[str, Any]) -> str:
    """Write ``report.html``, ``report.md`` and its picture into ``out``; returns the Markdown."""
    texts = {kind: report_text(kind, metrics, config) for kind in ("html", "md")}
    for kind, text in texts.items():
        (out / f"report.{kind}").write_text(text, encoding="utf-8")
    if figure := _pareto(metrics):
        figure.savefig(out / "pareto.png", dpi=120)
    return texts["md"]


def _lengths_of(metrics: Metrics) -> list[str]:
    return list(dict.fromkeys(length for entry in metrics.values() for length in entry["lengths"]))


def _at(entry: Any, *path: Any) -> Any:
    """What is found there in an entry; None if something on the way is missing."""
    for step in path:
        entry = entry[step] if isinstance(entry, list) else (entry or {}).get(step)
    return entry


def _tables(metrics: Metrics) -> list[tuple[str, Table]]:
    """Titles and tables in which something was measured.

    A column is its head, the path in an entry to the fields that it shows, and the forms of its cells.
    """
    lengths = {length: f"{int(length):,}" for length in _lengths_of(metrics)}
    found: dict[str, list[tuple]] = {
        "Size and quality": [
            ("ratio in latents", (), "{latent_ratio:.2f}x"),
            *((f"smaller at {shown}", ("lengths", length), "{smaller:.2f}x") for length, shown in lengths.items()),
            ("perplexity", ("perplexity",), *_PERPLEXITY),
            *((f"score at {shown}", ("lengths", length), "{score:.2f}") for length, shown in lengths.items()),
            ("bases, MB", (), "{projection_bytes:.1f}"),
        ],
        "Perplexity by quarter of the windows": [
            (head, ("perplexity", "quarters", at), *_PERPLEXITY)
            for at, head in enumerate(("first quarter", "second", "third", "last"))
        ],
        "Look-ups and needles": [],
    }
    for task, length in dict.fromkeys(
        (task, at) for one in metrics.values() for task, of in one["codes"].items() for at in of
    ):
        head, at = _CODES[task].format(int(length)), ("codes", task, length)
        found["Look-ups and needles"] += [(f"{head}: loss, nats", at, *_LOSS), ("exact", at, *_EXACT)]
    for length, shown in lengths.items():
        path = "lengths", length
        tasks = dict.fromkeys(task for entry in metrics.values() for task in _at(entry, *path, "tasks") or ())
        columns = [("all of them", path, *_SCORE), *((task, (*path, "tasks", task), *_SCORE) for task in tasks)]
        found[f"Tasks at {shown} tokens"] = columns
    found["Bytes and times"] = [
        (f"{shown} tokens: {head}", ("lengths", length), form)
        for length, shown in lengths.items()
        for head, form in _COSTS.items()
    ]
    tables = []
    for title, columns in found.items():
        lines = [[_cell(_at(entry, *path), forms) for _, path, *forms in columns] for entry in metrics.values()]
        if any(cell != "–" for line in lines for cell in line):
            named = [[name, *line] for name, line in zip(metrics, lines, strict=True)]
            tables.append((title, Table(["cache", *(column[0] for column in columns)], named)))
    return tables


def _cell(found: dict[str, Any] | None, forms: Sequence[str]) -> str:
    known = {name: value for name, value in (found or {}).items() if value is not None}
    known |= {name: known[name] * scale for name, scale in _SCALES.items() if name in known}
    for form in reversed(forms):
        with suppress(KeyError):
            return form.format_map(known)
    return "–"


def _svg(figure, title: str) -> str:
    """A figure as inline SVG: text stays text, and nothing points out of the page."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    left_out = r'^.*?(?=<svg)|<metadata>.*?</metadata>| xmlns(?::\w+)?="[^"]*"| id="[\w.]+_\d+"'
    return re.sub(left_out, "", buffer.getvalue(), flags=re.DOTALL).replace("xlink:href", "href")


def _figure(height: float, panels: int = 2):
    """A figure and its axes, at most two a row."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"axes.grid": True, "grid.alpha": 0.3, "axes.formatter.useoffset": False}):
        figure = Figure(figsize=(10, height), layout="constrained")
        return figure, figure.subplots(-(-panels // 2), min(panels, 2), squeeze=False).flatten()


def _style(index: int) -> dict[str, Any]:
    """Colour and marker of a cache; both repeat after long."""
    return {"color": f"C{index % 10}", "marker": "os^Dv"[index // 10 % 5], "markersize": 7}


def _pareto(metrics: Metrics):
    """Perplexity ratio at the longest length and task scores at each, against stored bytes; None without any."""
    from matplotlib.ticker import LogLocator, NullLocator

    lengths = _lengths_of(metrics)
    if not lengths:
        return None
    panels = [(lengths[-1], "perplexity to the full cache", -1)]  # -1: less is better
    panels += [(length, "mean score of the tasks", 1) for length in lengths
               if any(_at(entry, "lengths", length, "tasks") for entry in metrics.values())]  # fmt: skip
    figure, axes = _figure(3.6 * -(-len(panels) // 2) + 0.25 * (len(metrics) / 3 + 1), len(panels))
    for axis, (length, label, sign) in zip(axes, panels, strict=False):
        points = []
        for index, (name, entry) in enumerate(metrics.items()):
            at, perplexity = _at(entry, "lengths", length) or {}, entry["perplexity"]
            value = at.get("score") if sign > 0 else perplexity and perplexity.get("ratio", 1.0)
            if "smaller" in at and value is not None:
                points.append((100 / at["smaller"], sign * value))
                axis.plot(100 / at["smaller"], value, linestyle="", label=name, **_style(index))
        points.sort(key=lambda point: (point[0], -point[1]))
        front = [one for at, one in enumerate(points) if all(one[1] > other for _, other in points[:at])]
        axis.plot([size for size, _ in front], [sign * value for _, value in front], color="#b9c2cd", zorder=1)
        axis.set(xscale="log", ylabel=label, xlabel=f"bytes stored at {int(length):,} tokens, % of the full cache")
        axis.margins(0.08)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.xaxis.set_major_formatter("{x:g} %")
        axis.xaxis.set_minor_locator(NullLocator())
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _ratios(metrics: Metrics):
    """Perplexity ratios with their intervals, and by quarter of the windows; None without any."""
    found = {name: entry["perplexity"] for name, entry in metrics.items() if _at(entry, "perplexity", "ratio")}
    if not found:
        return None
    figure, (whole, quarters) = _figure(max(3.2, 0.32 * len(found) + 1.2))
    for place, (name, one) in enumerate(found.items()):
        style, bars = _style(list(metrics).index(name)), [[one["ratio"] - one["low"]], [one["high"] - one["ratio"]]]
        whole.errorbar(one["ratio"], place, xerr=bars, capsize=3, **style)
        quarters.plot(("first", "second", "third", "last"), [part["ratio"] for part in one["quarters"]], **style)
    whole.axvline(1, color="grey", linestyle=":")
    quarters.axhline(1, color="grey", linestyle=":")
    whole.set(xlabel="perplexity to the full cache", yticks=range(len(found)), yticklabels=found)
    whole.invert_yaxis()
    quarters.set(xlabel="quarter of the windows", ylabel="perplexity to the full cache")
    return figure


# Titles of the tables that have one below; the page holds their captions.
_FIGURES = {"Size and quality": _pareto, "Perplexity by quarter of the windows": _ratios}
