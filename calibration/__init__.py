"""Calibrate projections for a model: run text through it, take moments, derive bases."""

from lowrank_cache.calibration.api import calibrate
from lowrank_cache.calibration.presets import PRESETS

__all__ = ["PRESETS", "calibrate"]
