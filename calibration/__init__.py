"""Calibrate projections for a model: run text through it, take moments, derive bases."""

from typing import Any

from lowrank_cache.calibration.api import METHODS, Method, calibrate, projections_for
from lowrank_cache.calibration.fisher import FISHER
from lowrank_cache.calibration.palu import PALU
from lowrank_cache.calibration.recalkv import RECALKV

__all__ = ["METHODS", "PRESETS", "Method", "calibrate", "projections_for"]

METHODS.update(fisher=FISHER, palu=PALU, recalkv=RECALKV)

# Named choices of calibrate's options. Measured in docs/results.md.
# default: one latent for the keys and values of several layers, keys in frames of 64 tokens, so that queries are
# absorbed once a frame and nothing is reconstructed.
# smallest: keys before rotation, which compress a little better from 10x on. They are reconstructed in every step.
# fastest: keys and values of each layer for themselves: no product reads channels it does not need.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "smallest": {"frame_length": 1},
    "fastest": {"layer_group_size": 1, "joint": False},
}
