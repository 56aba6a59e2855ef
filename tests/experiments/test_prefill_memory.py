"""What a prefill keeps alive, found by looking into the process."""

import pytest
from transformers import DynamicCache

from lowrank_cache import LowRankCache
from lowrank_cache.probe import model_shape
from tests.experiments import load
from tests.oracle.character_tokenizer import character_tokenizer
from tests.oracle.models import full_rank_projections, random_tokens, tiny_model

prefill_memory = load("prefill_memory")


@pytest.mark.parametrize("group, joint", [(1, True), (3, True), (3, False)])
def test_the_peak_of_a_prefill_is_counted_in_the_process(group, joint):
    """The experiment looks into the process, not into the cache; both must agree."""
    model, tokens = tiny_model("llama"), 600
    layer = model_shape(model).layers[0]
    dense_layer = 4 * tokens * (layer.key.width + layer.value.width)
    cache = LowRankCache(model, full_rank_projections("llama", 1, group, joint), compression_ratio=8)
    peak = prefill_memory.prefill_peak(model, cache, random_tokens(1, tokens))
    assert peak.dense == group * dense_layer
    assert peak.left >= cache.stored_bytes() and peak.allocated > peak.left
    full = prefill_memory.prefill_peak(model, DynamicCache(config=model.config), random_tokens(1, tokens))
    assert full.dense >= 3 * dense_layer and full.left >= 3 * dense_layer


def test_command(tmp_path, capsys):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    full_rank_projections("llama").save_pretrained(tmp_path / "projections")
    prefill_memory.main(str(tmp_path / "projections"), str(tmp_path / "model"), 64, 4.0, "float32")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["full", "low-rank"]
