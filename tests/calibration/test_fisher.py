"""The fisher basis: an inverse at full rank, unit variances, and losses that are what dropping a channel costs."""

import torch

from lowrank_cache.calibration.fisher import weighted_basis


def random_moments(width, tokens=4000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix, blame = torch.randn(2, width, width, generator=generator, dtype=torch.float64)
    states = torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mix + 2.0
    gradients = 0.1 * torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ blame
    return states, gradients


def basis_of(states, gradients):
    second, sensitivity = states.T @ states / len(states), gradients.T @ gradients / len(gradients)
    arrays = weighted_basis(second, states.mean(0), sensitivity)
    return [arrays[name] for name in ("down_proj", "up_proj", "offset", "loss")], second, sensitivity


def test_full_rank_basis_inverts():
    (down, up, _, _), _, _ = basis_of(*random_moments(24))
    torch.testing.assert_close(down.double() @ up.double(), torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-4)
    torch.testing.assert_close(up.double() @ down.double(), torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-4)


def test_latents_have_unit_variance_and_the_stated_mean():
    states, gradients = random_moments(24)
    (down, _, offset, loss), _, _ = basis_of(states, gradients)
    latents = states @ down.double()
    torch.testing.assert_close(latents.mean(0), offset.double(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(latents.var(0), torch.ones(24, dtype=torch.float64), rtol=1e-2, atol=1e-2)
    assert bool((loss.diff() <= 0).all()), "channels must be sorted by loss"


def test_loss_is_the_weighted_error_of_dropping_a_channel():
    states, gradients = random_moments(16)
    (down, up, offset, loss), _, sensitivity = basis_of(states, gradients)
    down, up, offset = down.double(), up.double(), offset.double()
    for channel in range(16):
        latents = states @ down
        latents[:, channel] = offset[channel]  # a dropped channel is read as its mean
        error = latents @ up - states
        predicted = ((error @ sensitivity) * error).sum(-1).mean()
        torch.testing.assert_close(predicted, loss[channel].double(), rtol=1e-3, atol=1e-9)


def test_losses_are_the_weighted_moment_diagonalised():
    states, gradients = random_moments(16)
    centred = states - states.mean(0)  # with no mean, variance and second moment are the same
    (_, _, _, loss), second, sensitivity = basis_of(centred, gradients)
    values, vectors = torch.linalg.eigh(sensitivity)
    root = vectors * values.sqrt() @ vectors.T
    expected = torch.linalg.eigvalsh(root @ second @ root).flip(0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=1e-9)


def test_no_other_basis_of_the_rank_has_less_weighted_error():
    states, gradients = random_moments(12)
    centred = states - states.mean(0)
    (down, up, _, _), second, sensitivity = basis_of(centred, gradients)

    def weighted_error(projector):
        error = torch.eye(12, dtype=torch.float64) - projector
        return float((error.T @ second @ error @ sensitivity).trace())

    ours = weighted_error(down[:, :5].double() @ up[:5].double())
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        noise = 0.05 * torch.randn(2, 12, 12, generator=generator, dtype=torch.float64)
        other = (down.double() + noise[0] * down.double().abs().mean())[:, :5]
        # The best up-projection for that down-projection, in the same weighted sense, is least squares.
        fit = torch.linalg.solve(other.T @ second @ other, other.T @ second)
        assert weighted_error(other @ fit) >= ours * (1 - 1e-9)
