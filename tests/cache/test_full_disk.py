"""A disk that fills while something is saved: the old artefact stays whole, and no part of a new one is left."""

import pytest

from lowrank_cache.calibration import calibrate
from lowrank_cache.calibration.moments import Moments
from tests.oracle.models import random_tokens, tiny_model


@pytest.fixture(scope="module")
def moments(tmp_path_factory):
    path = tmp_path_factory.mktemp("moments") / "moments.safetensors"
    calibrate(tiny_model("llama"), [random_tokens(2, 12)], save_moments=path, progress=False)
    return Moments.load(path)
