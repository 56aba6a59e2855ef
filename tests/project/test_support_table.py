"""Refused models are refused early and clearly, and docs/support.md says what the tests find."""

from pathlib import Path

import pytest
import torch

from lowrank_cache import LowRankCache
from lowrank_cache.calibration import calibrate
from lowrank_cache.hooks import hook_count
from lowrank_cache.models import model_shape
from tests.oracle.models import (
    FAMILIES,
    MORE_FAMILIES,
    REFUSED,
    exact_cache,
    full_rank_projections,
    random_tokens,
    tiny_model,
)
from tests.tools.support_table import refusal_of, support_page

PAGE = Path(__file__).parents[2] / "docs" / "support.md"


def test_support_page_is_up_to_date():
    assert PAGE.read_text() == support_page(), "run `python -m tests.tools.support_table > docs/support.md`"
