"""What projections store: the inspection agrees with the cache, and is drawn."""

import math

import pytest

from lowrank_cache import LowRankCache
from lowrank_cache.budget import full_bytes_per_token
from lowrank_cache.calibration import calibrate
from lowrank_cache.evaluation.inspection import inspect_projections, plot_projections
from tests.oracle.models import full_rank_projections, random_tokens, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def projections(model):
    return calibrate(model, [random_tokens(2, 48, seed=1)], progress=False)


def test_inspection_agrees_with_the_cache(model, projections):
    inspection = inspect_projections(projections, 3.0)
    cache = LowRankCache(model, projections, compression_ratio=3.0)
    assert inspection.basis_bytes == cache.projection_bytes()
    assert inspection.full_bytes == full_bytes_per_token(projections.shape)
    assert inspection.latent_bytes <= inspection.full_bytes / 3
    assert 2 * sum(basis.width for plan in inspection.plans for basis in plan.bases) == inspection.full_bytes
    assert len(inspection.plans) == len(projections.groups())


@pytest.mark.parametrize("batch", [1, 8])
def test_break_even_is_the_first_length_at_which_bases_are_earned_back(projections, batch):
    inspection, exact = inspect_projections(projections, 3.0), 40
    tokens = inspection.break_even(exact_tokens=exact, batch=batch)

    def saved(tokens):
        cached = exact * inspection.full_bytes + (tokens - exact) * inspection.latent_bytes
        return batch * (tokens * inspection.full_bytes - cached) - inspection.basis_bytes

    assert saved(tokens) >= 0 > saved(tokens - 1)


def test_break_even_is_infinite_where_nothing_is_saved(projections):
    assert inspect_projections(projections, 1.0).break_even() == math.inf


@pytest.mark.parametrize("joint", [True, False])
def test_projections_are_drawn(tmp_path, joint):
    projections = full_rank_projections("llama", 1, 3 if joint else (3, 3))
    plot_projections(projections.truncate(2), 4, tmp_path / "bits.png")
    assert (tmp_path / "bits.png").stat().st_size > 5000
