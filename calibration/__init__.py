"""Calibrate projections for a model: run text through it, take moments, derive bases."""

from lowrank_cache.calibration.api import calibrate

__all__ = ["calibrate"]
