"""The check against the papers runs from text to table; what it says of OVC is an identity and no luck."""

import re

import pytest
import torch

from lowrank_cache.probe import model_shape
from tests.experiments import load

papers = load("papers")

TEXT = "".join(f"line {number}: {number * number % 997} and {number % 13} times a word\n" for number in range(12_000))


@pytest.fixture
def small(monkeypatch):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8}
    monkeypatch.setattr(papers, "_COMMON", {**papers._COMMON, **sizes})
    monkeypatch.setattr(papers, "WINDOW", 64)


def test_writes_every_table_and_keeps_its_models(small, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    said = []
    papers.check_papers(tmp_path, text, steps=4, windows=3, calibration_windows=8, report=said.append)
    table = (tmp_path / "papers.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    for name in (
        "Palu, 50 %",
        "ReCalKV, 70 %",
        "neither",
        "HSR",
        "OVC",
        "both",
        "similar heads",
        "whitened SVD",
        "xKV",
    ):
        assert any(line.startswith(f"| {name}") for line in rows), name
    lost = {name: float(error) for name, error in re.findall(r"\| ((?:plain|whitened) SVD[^|]*) \| ([\d.]+) \|", table)}
    whitened = [error for name, error in lost.items() if name.startswith("whitened")]
    assert len(whitened) == 4 and max(whitened) - min(whitened) <= 1e-6  # OVC changes nothing there
    assert lost["plain SVD"] > lost["plain SVD, 1 OVC step"] >= whitened[0]
    grouped = {name: float(error) for name, error in re.findall(r"\| ([^|]*(?:heads|ways)[^|]*) \| ([\d.]+) \|", table)}
    best = grouped.pop("best of all 35 ways")
    assert len(grouped) == 3 and 0 < best <= min(grouped.values())
    weights = [path.read_bytes() for path in sorted(tmp_path.glob("*/model.safetensors"))]
    assert len(weights) == 2
    kept = papers.trained(papers.multi_head_config(), torch.zeros(1), tmp_path / "multi-head", 4, said.append)
    assert kept.config.hidden_size == 32


def test_shapes_are_those_the_papers_need():
    with torch.random.fork_rng(devices=[]):
        many, latent = (
            model_shape(papers.AutoModelForCausalLM.from_config(config()).eval())
            for config in (papers.multi_head_config, papers.mla_config)
        )
    assert many.layers[0].key.heads >= 8
    assert (latent.layers[0].key.width, latent.layers[0].value.width) == (64, 16)
    assert latent.layers[0].key.rope is None and latent.layers[0].value.rope is not None


def test_held_out_text_is_apart():
    tokens, held_out = papers.byte_tokens("a" * 180_000 + "b" * 20_000 + "a" * 100)
    assert set(held_out.tolist()) == {ord("b")} and set(tokens.tolist()) == {ord("a")}
