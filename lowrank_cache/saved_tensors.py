"""Named tensors on their way to a file or back; what comes from a file is checked as it is taken."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["SavedTensors", "whole_number"]


class SavedTensors:
    """What the parts of a cache put down, or take up again.

    Args:
        tensors: What a file held; nothing for tensors that are to be written.
    """

    def __init__(self, tensors: Mapping[str, Tensor] | None = None):
        self._tensors = dict(tensors or {})

    def put(self, name: str, tensor: Tensor) -> None:
        """Add a tensor, without the unused room of the buffer it may be a view of."""
        self._tensors[name] = tensor.detach().cpu().contiguous()

    def all(self) -> dict[str, Tensor]:
        """Every tensor by name, on the CPU."""
        return self._tensors

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors.values())

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Remove a tensor and return it in memory of its own on ``device``.

        Raises:
            ValueError: If there is none of that name, or its shape or dtype is another.
        """
        tensor = self._tensors.pop(name, None)
        if tensor is None:
            raise ValueError(f"tensor {name} is missing")
        if list(tensor.shape) != list(shape) or tensor.dtype != dtype:
            raise ValueError(
                f"tensor {name} must be {dtype} of shape {list(shape)}, got {tensor.dtype} of shape "
                f"{list(tensor.shape)}"
            )
        return tensor.to(device, copy=True)

    def finish(self) -> None:
        """Raise ValueError if a tensor was not taken."""
        if self._tensors:
            raise ValueError(f"tensors {sorted(self._tensors)} belong to nothing")


def whole_number(number: Any, name: str, least: int = 0, most: int | None = None) -> int:
    """``number`` if it is an integer of at least ``least`` and at most ``most``; else ValueError."""
    whole = isinstance(number, int) and not isinstance(number, bool)
    if not whole or number < least or (most is not None and number > most):
        limits = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"{name} must be an integer, {limits}, got {number!r}")
    return number
