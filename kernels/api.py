"""Which implementation serves an operation: Triton on GPUs, torch elsewhere."""

from importlib.util import find_spec

import torch
from torch import Tensor

from lowrank_cache.kernels import reference, torch_decode
from lowrank_cache.kernels.packed import LatentSide, PackedTier, RotaryFrames

__all__ = ["IMPLEMENTATIONS", "MAX_KERNEL_QUERIES", "attend", "encode", "latent_decode", "merge", "triton_serves"]

IMPLEMENTATIONS = ("auto", "torch", "triton", "reference")
MAX_KERNEL_QUERIES = 16  # a longer query rebuilds keys and values tile by tile, where dense products are best
_TILE_TOKENS = 4096

attend, merge = reference.attend, reference.merge  # of exact states: torch's own products on every device


def triton_serves(impl: str, device: torch.device, head_dims: set[int]) -> bool:
    """Whether ``impl`` means the Triton kernels for heads of these sizes on this device.

    ``"auto"`` takes Triton on a GPU where it is installed and every head_dim is a multiple of 16 up to 256, else torch;
    ``"triton"`` takes it on any device (on a CPU it needs ``TRITON_INTERPRET=1``).

    Raises:
        ValueError: If ``impl`` is none of ``IMPLEMENTATIONS``.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {IMPLEMENTATIONS}, got {impl!r}")
    fits = all(size % 16 == 0 and size <= 256 for size in head_dims)
    return impl == "triton" or (impl == "auto" and device.type == "cuda" and fits and find_spec("triton") is not None)


def latent_decode(
    query: Tensor,
    key: LatentSide,
    value: LatentSide,
    *,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """See ``reference.latent_decode``; ``impl`` as ``triton_serves`` takes it."""
    if not triton_serves(impl, query.device, {key.up_proj.shape[2], value.up_proj.shape[2]}):
        function = reference.latent_decode if impl == "reference" else torch_decode.latent_decode
    elif query.shape[2] <= MAX_KERNEL_QUERIES:
        from lowrank_cache.kernels import triton_decode  # needs triton, which CPU installations lack

        function = triton_decode.latent_attention
    else:
        function = _rebuilt_decode
    return function(query, key, value, scaling=scaling, mask=mask, softcap=softcap)


def _rebuilt_decode(
    query: Tensor,
    key: LatentSide,
    value: LatentSide,
    *,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``latent_decode`` of many queries: keys and values are rebuilt by Triton, a tile of tokens at a time."""
    from lowrank_cache.kernels.triton_reconstruct import reconstruct

    frame = 1 if key.rope is None else key.rope.frame_length
    tile = max(frame, _TILE_TOKENS // frame * frame)
    parts = []
    for start in range(0, key.tokens, tile):
        stop = min(start + tile, key.tokens)
        keys, values = (reconstruct(side.between(start, stop), query.dtype) for side in (key, value))
        seen = mask if mask is None or mask.shape[-1] == 1 else mask[..., start:stop]
        parts.append(attend(query, keys, values, scaling=scaling, mask=seen, softcap=softcap))
    return merge(parts)


def encode(
    states: list[Tensor],
    constants: list[Tensor],
    frames: list[RotaryFrames | None],
    down_proj: Tensor,
    tiers: tuple[tuple[int, int], ...],
    weight: Tensor,
    latent_dtype: torch.dtype,
    *,
    impl: str = "auto",
) -> tuple[PackedTier, ...]:
    """See ``reference.encode``; ``impl`` as ``triton_serves`` takes it."""
    if triton_serves(impl, states[0].device, {part.shape[3] for part in states}):
        from lowrank_cache.kernels import triton_encode

        return triton_encode.encode(states, constants, frames, down_proj, tiers, weight, latent_dtype)
    return reference.encode(states, constants, frames, down_proj, tiers, weight, latent_dtype)
