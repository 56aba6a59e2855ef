"""Caches by specification, baselines, and the bytes that each holds."""

import pytest
import torch

from lowrank_cache.calibration.collect import collect_moments
from lowrank_cache.evaluation.caches import (
    BASELINES,
    XKV,
    CacheSizes,
    Configuration,
    cache_entry,
    make_bases,
    parse,
    tensor_bytes,
)
from lowrank_cache.probe import model_shape
from lowrank_cache.shapes import layer_groups
from tests.oracle.models import random_tokens, tiny_model, wide_llama


@pytest.mark.parametrize(
    "specification, expected",
    [
        ("full", None),
        ("fisher:8.5", Configuration("fisher", 8.5)),
        ("fisher:10,groups=1,frame=16,joint=0", Configuration("fisher", 10, 1, 16, False)),
        ("palu:2,bits=4,groups=auto,ranks=9", Configuration("palu", 2, "auto", None, None, 4, 9)),
        ("xkv:8,bits=4,groups=2,new=exact", Configuration("xkv", 8, 2, bits=4, new="exact")),
    ],
)
def test_specifications(specification, expected):
    assert parse(specification) == expected


@pytest.mark.parametrize(
    "wrong", ["fisher", "fisher:x", "nothing:8", "fisher:8,speed=1", "quantized-3", "fisher:8,groups=a"]
)
def test_wrong_specifications_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match="cache must be one of"):
        parse(wrong)


def test_values_of_recalkv_are_refitted_at_the_ratio_of_the_ranks():
    model = wide_llama()
    shape = model_shape(model)
    groups = {side: layer_groups(shape, side, 1) for side in ("key", "value")}
    moments = collect_moments(model, [random_tokens(4, 30)], groups)
    asked = []

    def refit(projections, ratio):
        asked.append(ratio)
        assert projections.method == "recalkv"
        return moments

    names = ["recalkv:4", "recalkv:12,bits=4", "recalkv:2,bits=4", "recalkv:4,bits=16", "palu:4"]
    found = {configuration.bases_name: configuration for configuration in map(parse, names)}
    made = {name: make_bases(configuration, moments, refit) for name, configuration in found.items()}
    assert asked == [4.0, 3.0]  # at 4 bits, 2x keeps every channel; equal bases are made once
    assert made[parse("recalkv:4").bases_name].provenance["calibrate_values"]
    assert not made[parse("recalkv:2,bits=4").bases_name].provenance["calibrate_values"]


def entries_of(names, moments, model, sizes):
    entries = []
    for name in names:
        found = parse(name)
        bases = make_bases(found, moments) if found and found.method != XKV else None
        entries.append(cache_entry(name, bases, found.options() if found else {}, model, sizes))
    return entries


def test_the_ratio_in_latents_counts_what_is_kept_exactly():
    model, sizes = wide_llama(), CacheSizes().sizes()
    moments = collect_moments(model, [random_tokens(2, 60)], {"both": layer_groups(model_shape(model), "both", 2)})
    names = ["full", "fisher:4", "xkv:2,groups=3", "fisher:12,groups=1,joint=0"]
    entries = entries_of(names, moments, model, sizes)
    full = 2 * sum(layer.key.width + layer.value.width for layer in model_shape(model).layers)
    cache = entries[1].make()
    assert entries[0].latent_ratio is None and entries[0].projection_bytes == 0
    assert entries[1].latent_ratio == pytest.approx(full / cache.latent_bytes_per_token())
    assert entries[1].latent_ratio >= 4
    assert entries[1].projection_bytes == cache.projection_bytes()
    tiers = [group.tiers for group in entries[3].make().groups()]
    assert entries[3].latent_ratio == full / entries[3].make().latent_bytes_per_token() and () in tiers
    assert entries[2].latent_ratio == pytest.approx(2, rel=0.1) and entries[2].projection_bytes == 0


def test_bytes_of_baselines_are_those_of_their_tensors():
    model = tiny_model("llama")
    full, fp8 = BASELINES["full"](model, 8), BASELINES["quantized-fp8"](model, 8)
    with torch.no_grad():
        for cache in (full, fp8):
            model(random_tokens(2, 50), past_key_values=cache)
    numbers = 3 * 2 * 2 * 50 * 2 * 16
    assert tensor_bytes(full) == 4 * numbers
    assert numbers <= tensor_bytes(fp8) <= numbers + 200  # one scale a layer and side
