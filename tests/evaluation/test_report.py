"""The report: numbers are those of the records, intervals hold the truth, and the page stands alone."""

import dataclasses
import json
import math
import random
from html.parser import HTMLParser

import numpy as np
import pytest
from transformers import DynamicCache

from lowrank_cache.evaluation import report
from lowrank_cache.evaluation.caches import CacheEntry
from lowrank_cache.evaluation.evaluate import EvaluationSettings, record_key
from lowrank_cache.evaluation.report import metrics_of, paired_interval, report_text, write_report

NAMES = ["full", "quantized-fp8", "fisher:4", "xkv:2,groups=2"]
CONFIG = {
    "model": "wide",
    "dtype": "float32",
    "device": "cpu",
    "text": "prose",
    "settings": dataclasses.asdict(EvaluationSettings()),
}


@pytest.fixture(scope="module")
def found():
    """Entries, made-up records and metrics of an evaluation."""
    draw = random.Random(0)
    ratios = {"full": None, "quantized-fp8": None, "fisher:4": 4.03, "xkv:2,groups=2": 2.1}
    entries = [CacheEntry(name, DynamicCache, ratios[name], 1000 * index) for index, name in enumerate(NAMES)]
    records = {}
    for place, name in enumerate(NAMES):
        made = [window(index, draw, 0.1 * place) for index in range(3)]
        for task, length, texts in (("lookup", 6, 2), ("needle", 400, 1), ("needle", 500, 2)):
            made += [codes(task, length, index, draw) for index in range(texts)]
        for task in ("multi-key", "tracking"):
            for index in range(2):
                facts = {"score": draw.random(), "exact": draw.randrange(2)}
                made.append({"kind": "answers", "task": task, "length": 2000, "index": index, **facts})
        cost = {"stored_bytes": 840_000 // (1 + place), "fill_seconds": 1 + draw.random(), "step_seconds": 0.01}
        made.append({"kind": "cost", "length": 2000, "index": 0, **cost})
        records[name] = {record_key(record): record for record in made}
    records["full"]["cost", None, 2000, 0]["bytes_at_16_bits"] = 420_000
    return entries, records, json.loads(json.dumps(metrics_of(entries, records)))


def window(index, draw, more):
    quarters = [2 + more + draw.random() / 4 for _ in range(4)]
    return {"kind": "window", "index": index, "loss": sum(quarters) / 4, "quarters": quarters}


def codes(task, length, index, draw):
    facts = {"losses": [draw.random() for _ in range(4)], "exact": [float(draw.randrange(2)) for _ in range(4)]}
    return {"kind": "codes", "task": task, "length": length, "index": index, **facts}


def test_the_metrics_say_what_the_records_say(found):
    entries, records, metrics = found
    losses = {
        name: [found["window", None, None, index]["loss"] for index in range(3)] for name, found in records.items()
    }
    fp8 = metrics["quantized-fp8"]
    full = metrics["full"]["perplexity"]
    assert (full["value"], full["windows"]) == (pytest.approx(math.exp(sum(losses["full"]) / 3)), 3)
    assert "ratio" not in full
    ratio = math.exp(sum(losses["quantized-fp8"]) / 3 - sum(losses["full"]) / 3)
    assert fp8["perplexity"]["ratio"] == pytest.approx(ratio)
    assert fp8["perplexity"]["low"] <= ratio <= fp8["perplexity"]["high"]
    at = fp8["lengths"]["2000"]
    assert at["fill_seconds"] > 0
    scores = [record["score"] for key, record in records["quantized-fp8"].items() if key[0] == "answers"]
    assert at["score"] == pytest.approx(sum(scores) / 4) and at["samples"] == 4
    assert at["smaller"] == 2 and metrics["full"]["lengths"]["2000"]["smaller"] == 1
    windows = [("window", None, None, index) for index in range(3)]
    last = {name: sum(records[name][key]["quarters"][3] for key in windows) / 3 for name in ("quantized-fp8", "full")}
    assert fp8["perplexity"]["quarters"][3]["ratio"] == pytest.approx(math.exp(last["quantized-fp8"] - last["full"]))
    assert at["real_ratio"] == pytest.approx(at["smaller"] / 2)  # a float32 model's full cache is twice that at 16 bits
    needles = [record for key, record in records["quantized-fp8"].items() if key[:3] == ("codes", "needle", 500)]
    code = fp8["codes"]["needle"]["500"]
    assert code["loss"] == pytest.approx(sum(sum(record["losses"]) for record in needles) / 8)
    assert code["questions"] == 8 and code["low"] <= code["difference"] <= code["high"]
    assert list(fp8["codes"]["lookup"]) == ["6"] and list(fp8["codes"]["needle"]) == ["400", "500"]


def test_exact_answers_are_counted_in_all_and_where_the_full_cache_is_right():
    def record(exact):
        return {"kind": "codes", "task": "lookup", "length": 22, "index": 0, "losses": [1.0] * 4, "exact": exact}

    entries = [CacheEntry(name, DynamicCache, None, 0) for name in ("full", "a")]
    key = ("codes", "lookup", 22, 0)
    records = {"full": {key: record([1.0, 1.0, 0.0, 0.0])}, "a": {key: record([1.0, 0.0, 1.0, 1.0])}}
    metrics = metrics_of(entries, records)
    code = metrics["a"]["codes"]["lookup"]["22"]
    assert (code["exact"], code["kept"], code["difference"]) == (0.75, 0.5, 0.0)
    table = report_text("md", metrics, CONFIG).splitlines()
    assert "| full | 1.000 | 0.50 |" in table and "| a | +0.000 [+0.000, +0.000] | 0.75 (0.50) |" in table


def test_the_markdown_has_a_line_for_each_cache_in_each_table(found):
    _, _, metrics = found
    table = report_text("md", metrics, CONFIG)
    assert all(table.count(f"| {name} |") == 5 for name in NAMES) and "## Tasks at 2,000 tokens" in table
    widths = [line.count("|") for line in table.splitlines() if line.startswith("|")]
    assert widths == [7] * 6 + [6] * 6 + [8] * 6 + [5] * 6 + [6] * 6  # five tables of four caches


class Page(HTMLParser):
    """What a page holds: tags that are open, references, and the cells of its tables."""

    EMPTY = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self):
        super().__init__()
        self.open, self.references, self.cells, self.tags, self.ids = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        self.references += [value for name, value in attributes if name.endswith(("href", "src", "data", "action"))]
        if tag not in self.EMPTY:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


def test_the_page_needs_nothing_else_and_holds_the_numbers(found, tmp_path):
    _, _, metrics = found
    text = write_report(tmp_path, metrics, CONFIG)
    html = (tmp_path / "report.html").read_text()
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == [] and page.tags.count("svg") == 2 and page.tags.count("table") == 5
    assert "://" not in html and "url(" not in html.replace("url(#", "") and "@import" not in html
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(page.tags)
    assert page.references and all(reference.startswith("#") for reference in page.references)
    assert len(page.ids) == len(set(page.ids)) and {reference[1:] for reference in page.references} <= set(page.ids)
    lines = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    assert page.cells == [cell.strip() for line in lines for cell in line.strip("|").split(" | ")]
    entry, at = metrics["fisher:4"], metrics["fisher:4"]["lengths"]["2000"]
    numbers = f"{at['smaller']:.2f}x", f"{at['stored_bytes'] / 1e6:.2f}", f"x{entry['perplexity']['ratio']:.4f}"
    assert all(any(number in cell for cell in page.cells) for number in numbers)
    assert (tmp_path / "report.md").read_text() == text and "](pareto.png)" in text
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_names_are_escaped(found):
    _, _, metrics = found
    html = report_text("html", metrics, {**CONFIG, "model": "<b>&model", "versions": {"torch": "<2>"}})
    assert "<b>" not in html and "&lt;b&gt;&amp;model" in html and "torch &lt;2&gt;" in html


def test_a_run_of_one_kind_of_measurement_has_a_report_too(found, tmp_path):
    entries, records, _ = found
    for kind in ("window", "codes", "cost"):
        part = {
            name: {key: record for key, record in own.items() if record["kind"] == kind}
            for name, own in records.items()
        }
        (tmp_path / kind).mkdir()
        write_report(tmp_path / kind, metrics_of(entries, part), CONFIG)
        assert (tmp_path / kind / "pareto.png").exists() is (kind == "cost")


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None if name == "scipy" else object())
    with pytest.raises(ImportError, match=r"this needs scipy: pip install .lowrank-cache\[eval\]"):
        report.check_installed()


def test_an_interval_holds_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(1)
    held = 0
    for index in range(300):
        part = paired_interval([generator.exponential(size=40), generator.normal(1, 2, size=60)], draws=500, seed=index)
        mean, low, high = part
        assert low <= mean <= high
        held += low <= 1 <= high
    assert 0.9 < held / 300 < 0.985


def test_strata_count_alike_and_equal_differences_have_no_spread():
    part = paired_interval([[1.0], [0.0, 0.0, 0.0]])
    assert part == (0.5, 0.5, 0.5)
    assert paired_interval([[0.0, 1.0]], seed=3) == paired_interval([[0.0, 1.0]], seed=3)
    for empty in ([], [[1.0], []]):
        with pytest.raises(ValueError, match="must have samples in each stratum"):
            paired_interval(empty)
