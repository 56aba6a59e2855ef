"""Projections truncated to a ratio: the same cache, in less memory."""

import pytest
import torch

from lowrank_cache import LowRankCache, Projections
from tests.oracle.models import full_rank_projections, random_tokens, tiny_model

SIZES = {"residual_length": 4, "num_sink_tokens": 2, "block_size": 4}


@pytest.mark.parametrize("frame_length", [1, 4])
@pytest.mark.parametrize("ratio", [2.0, 5.0, 9.0])
def test_a_truncated_artefact_gives_the_same_logits(ratio, frame_length):
    model = tiny_model("qwen2")
    projections = full_rank_projections("qwen2", frame_length)
    truncated = projections.truncate(ratio)
    assert truncated.nbytes < projections.nbytes or ratio == 2  # random weights: every channel is kept at 2x
    tokens = random_tokens(2, 40)
    logits = []
    for bases in (projections, truncated):
        cache = LowRankCache(model, bases, compression_ratio=ratio, **SIZES)
        with torch.no_grad():
            model(tokens[:, :30], past_key_values=cache)
            logits.append(model(tokens[:, 30:], past_key_values=cache).logits)
    # Dropped channels are read as a constant that is summed in another order: rounding only.
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


def test_a_truncated_artefact_serves_larger_ratios_and_refuses_smaller_ones():
    model, truncated = tiny_model("llama"), full_rank_projections("llama").truncate(4)
    assert LowRankCache(model, truncated, compression_ratio=6).target_compression_ratio == 6
    with pytest.raises(ValueError, match="at least 4, for which these projections were truncated, got 3"):
        LowRankCache(model, truncated, compression_ratio=3)


def test_loading_at_a_ratio_keeps_only_what_the_ratio_needs(tmp_path):
    projections = full_rank_projections("llama", 1, 3)
    projections.save_pretrained(tmp_path / "full")
    loaded = Projections.from_pretrained(tmp_path / "full", compression_ratio=5)
    expected = projections.truncate(5)
    assert loaded.nbytes == expected.nbytes < 0.7 * projections.nbytes
    for one, other in zip(loaded.bases, expected.bases, strict=True):
        assert torch.equal(one.down_proj, other.down_proj)
    loaded.save_pretrained(tmp_path / "small")
    assert Projections.from_pretrained(tmp_path / "small").min_compression_ratio == 5


def test_a_cache_built_again_reuses_its_bases():
    model, projections = tiny_model("llama"), full_rank_projections("llama")
    one, other = (LowRankCache(model, projections, compression_ratio=4) for _ in range(2))
    assert one._coders is other._coders
    assert LowRankCache(model, projections, compression_ratio=5)._coders is not one._coders


def test_neither_loading_nor_making_a_cache_decomposes_anything(tmp_path, monkeypatch):
    """All that is slow was done by calibration: a cache only chooses channels."""
    full_rank_projections("llama").save_pretrained(tmp_path)

    def refuse(*args, **kwargs):
        raise AssertionError("a decomposition at load")

    for name in ("eigh", "eigvalsh", "svd", "svdvals", "qr", "cholesky", "inv", "lstsq", "solve"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    loaded = Projections.from_pretrained(tmp_path, compression_ratio=4)
    assert LowRankCache(tiny_model("llama"), loaded, compression_ratio=5).projection_bytes() > 0
