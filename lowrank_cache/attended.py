"""What ``latent_attention`` and the cache agree on: which layers attend to latents, and how a view travels.

Between ``Cache.update`` and the attention function stands the model's own code, which hands on two tensors.
The view therefore rides on the key tensor.
"""

import weakref
from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["Attended", "attach_view", "attended_by", "set_attended", "view_of"]


@dataclass(frozen=True)
class Attended:
    """The cache layers of a model that attend to latents, and the kernels to use (``kernels.api.IMPLEMENTATIONS``)."""

    layers: frozenset[int] = frozenset()
    impl: str = "torch"


_ATTENDED: "weakref.WeakKeyDictionary[nn.Module, Attended]" = weakref.WeakKeyDictionary()
_NONE = Attended()


def set_attended(decoder: nn.Module, attended: Attended) -> None:
    """Tell the caches of ``decoder``, from its next forward on, which of its layers attend to latents."""
    _ATTENDED[decoder] = attended


def attended_by(decoder: nn.Module) -> Attended:
    return _ATTENDED.get(decoder, _NONE)


def attach_view(keys: Tensor, view: object) -> None:
    keys.latent_view = view  # type: ignore[attr-defined]  # tensors take attributes; the stubs do not know


def view_of(keys: Tensor) -> object | None:
    """What ``attach_view`` attached to this very tensor; nothing survives an operation on it."""
    return getattr(keys, "latent_view", None)
