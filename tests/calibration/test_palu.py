"""Palu: groups of adjacent heads."""

import itertools

import pytest

from lowrank_cache.calibration import calibrate
from lowrank_cache.calibration.api import projections_from_moments
from tests.calibration.test_collect import moments_of
from tests.oracle.models import random_tokens, tiny_model


@pytest.mark.parametrize("size, expected", [(1, 6), (2, 3), (3, 2), (4, 2), (8, 1)])
def test_palu_groups_adjacent_heads_of_the_size_asked_for(size, expected):
    moments = moments_of(tiny_model("qwen2-six-heads"), [random_tokens(4, 32)])
    made = projections_from_moments(moments, method="palu", head_group_size=size)
    heads = [basis.heads for basis in made.bases if basis.layers == (0,) and basis.side == "key"]
    assert len(heads) == expected and tuple(itertools.chain(*heads)) == tuple(range(6))


@pytest.mark.parametrize("size", [0, -1, 2.5, "4"])
def test_head_group_size_must_be_a_number_of_heads(size):
    with pytest.raises(ValueError, match="head_group_size must be an integer of at least 1"):
        calibrate(tiny_model("llama"), [random_tokens(4, 32)], method="palu", head_group_size=size, progress=False)
