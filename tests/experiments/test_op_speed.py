"""The operation over latents alone, at the plan of a layer."""

import pytest
import torch

from lowrank_cache.calibration.collect import collect_moments
from lowrank_cache.probe import model_shape
from lowrank_cache.shapes import layer_groups
from tests.experiments import load
from tests.oracle.models import full_rank_projections, random_tokens, tiny_model

op_speed = load("op_speed")


@pytest.mark.parametrize("joint", [True, False])
def test_the_op_is_timed_at_the_plan_of_a_layer(joint):
    projections = full_rank_projections("llama", 4, 1, joint)
    entry = op_speed.time_ops("fisher:4", projections, 4.0, 4, context=96, batch=2, dtype=torch.float32, repeats=3)
    assert entry.dense_seconds > 0 and entry.latent_seconds > 0
    assert "| 96 | 2 | fisher:4 |" in op_speed.op_table([entry]).markdown()


def test_command(tmp_path, capsys):
    model, path = tiny_model("llama"), tmp_path / "moments.safetensors"
    groups = {"both": layer_groups(model_shape(model), "both", 2)}
    collect_moments(model, [random_tokens(2, 40)], groups).save(path)
    options = {"contexts": "64,96", "batches": "1", "query_heads": 4, "dtype": "float32"}
    op_speed.main(path, cache=["fisher:4,groups=1,frame=4,joint=0"], **options)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["64", "96"]
    with pytest.raises(ValueError, match="cache must be calibrated, got 'xkv:4'"):
        op_speed.main(path, cache=["xkv:4"], **options)
