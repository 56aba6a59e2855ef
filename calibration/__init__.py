"""Calibrate projections for a model: run text through it, take moments, derive bases."""

from typing import Any

from lowrank_cache.calibration.api import METHODS, Method, calibrate
from lowrank_cache.calibration.fisher import FISHER
from lowrank_cache.calibration.palu import PALU
from lowrank_cache.calibration.recalkv import RECALKV

__all__ = ["METHODS", "PRESETS", "Method", "calibrate"]

METHODS.update(fisher=FISHER, palu=PALU, recalkv=RECALKV)

# Named choices of calibrate's options.
# smallest: one latent for the keys and values of several layers, keys before rotation. Every layer reads the
# whole latent, and keys are reconstructed to be rotated, so decoding is slow.
# fastest: keys and values of each layer for themselves, so that no product reads channels it does not need, and keys
# in frames of 64 tokens, so that queries are absorbed once a frame. Measured in docs/results.md.
PRESETS: dict[str, dict[str, Any]] = {
    "smallest": {"layer_group_size": "auto", "frame_length": 1},
    "fastest": {"layer_group_size": 1, "joint": False, "frame_length": 64},
}
