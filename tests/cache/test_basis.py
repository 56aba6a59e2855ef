"""One basis and the set of them: what is not finite, of another shape, or does not cover a model is refused."""

import dataclasses

import pytest

from lowrank_cache import Projections
from tests.oracle.models import full_rank_projections


@pytest.fixture
def projections():
    return full_rank_projections("llama")


@pytest.mark.parametrize("joint, side", [(True, "both"), (False, "key")])
@pytest.mark.parametrize("name", ["down_proj", "up_proj", "offset", "loss", "constant"])
def test_bases_with_nan(name, joint, side):
    basis = full_rank_projections("llama", joint=joint).bases[0]
    broken = getattr(basis, name).clone()
    broken.view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match=f"{side}.layers_0_0.heads_0-1: {name} must be finite"):
        dataclasses.replace(basis, **{name: broken})


def test_bases_that_do_not_cover_the_model(projections):
    with pytest.raises(ValueError, match=r"cover each key head of layer 0 once, heads \[0, 1\], got \[\]"):
        Projections(projections.bases[1:], projections.shape, method="fisher")
    with pytest.raises(ValueError, match=r"cover each key head of layer 0 once, .*got \[0, 0, 1, 1\]"):
        Projections([projections.bases[0], *projections.bases], projections.shape, method="fisher")
    apart = full_rank_projections("llama", joint=False).bases
    values = [basis for basis in apart if basis.side == "value"]
    with pytest.raises(ValueError, match=r"cover each key head of layer 0 once, heads \[0, 1\], got \[\]"):
        Projections(values, projections.shape, method="fisher")
    with pytest.raises(ValueError, match=r"cover each value head of layer 2 once, .*got \[0, 0, 1, 1\]"):
        Projections([*projections.bases, values[-1]], projections.shape, method="fisher")
    with pytest.raises(ValueError, match=r"both.layers_0_0.heads_0-1: down_proj must have 64 rows, got 32"):
        Projections([dataclasses.replace(apart[0], side="both")], projections.shape, method="fisher")
    with pytest.raises(ValueError, match="side must be 'key', 'value' or 'both', got 'query'"):
        dataclasses.replace(projections.bases[0], side="query")
    with pytest.raises(ValueError, match=r"up_proj must have shape \[64, 64\], got \[63, 64\]"):
        dataclasses.replace(projections.bases[0], up_proj=projections.bases[0].up_proj[1:])
