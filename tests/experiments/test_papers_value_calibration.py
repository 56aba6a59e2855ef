"""The papers' one-step value calibration: nothing after whitening on the same data, never better than whitening."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

PAPERS = Path(__file__).resolve().parents[2] / "docs" / "experiments" / "papers.py"


def load_papers():
    """The experiment is a script beside the page that quotes it, not a part of the package."""
    specification = importlib.util.spec_from_file_location("papers", PAPERS)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


calibrate_once = load_papers().calibrate_once


def error(down: Tensor, up: Tensor, second: Tensor) -> float:
    left = torch.eye(len(second)).double() - down @ up
    return float((left.T @ second @ left).trace() / second.trace())


def random_states(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(30, 30, generator=generator, dtype=torch.float64)
    return torch.randn(400, 30, generator=generator, dtype=torch.float64) @ mix


def test_is_the_identity_after_whitening_on_the_same_data():
    states = random_states(0)
    second = states.T @ states / len(states)
    for rank in (3, 10, 29):
        down = torch.linalg.eigh(second)[1][:, -rank:]
        calibrated, up = calibrate_once(down, second)
        torch.testing.assert_close(calibrated @ up, down @ down.T, rtol=0, atol=1e-9)
        assert error(calibrated, up, second) == pytest.approx(error(down, down.T, second), rel=1e-9)


def test_improves_an_unwhitened_start_towards_the_whitened_optimum():
    states = random_states(0)
    second = states.T @ states / len(states)
    down = torch.eye(30, dtype=torch.float64)[:, :8]
    errors = [error(down, down.T, second)]
    for _ in range(3):
        down, up = calibrate_once(down, second)
        errors.append(error(down, up, second))
    optimum = float(torch.linalg.eigvalsh(second)[:-8].sum() / second.trace())
    assert errors == sorted(errors, reverse=True) and errors[0] > errors[-1] >= optimum * (1 - 1e-9)


def test_on_drifted_data_one_whitening_is_at_least_as_good():
    states, drift = random_states(0), random_states(1)
    clean = states.T @ states
    drifted = (states + drift).T @ (states + drift)
    down = torch.linalg.eigh(clean)[1][:, -8:]
    before = error(down, down.T, drifted)
    after = error(*calibrate_once(down, drifted), drifted)
    whitened = torch.linalg.eigh(drifted)[1][:, -8:]
    assert error(whitened, whitened.T, drifted) <= after < before
