"""The operations over packed latents, and the one place that chooses who computes them.

``encode``, ``reconstruct`` and ``latent_attention`` are specified in ``reference``, and computed by ``torch_ops`` or,
on GPUs, by the ``triton_*`` files, which are imported when they are first used. ``attend_stored`` joins a layer's
latents with its exact tokens; on CPUs ``native`` computes it in one call.
"""

import os
import warnings
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lowrank_cache.kernels import native, reference, torch_ops, trust
from lowrank_cache.kernels.ambient import without_autocast
from lowrank_cache.kernels.packed import LatentSide, PackedTier, RotaryFrames, StoredSide, tiles
from lowrank_cache.kernels.segments import attend, merge

IMPLEMENTATIONS = ("auto", "native", "torch", "triton", "reference")
MAX_KERNEL_QUERIES = 16  # longer queries reconstruct keys and values tile by tile, where dense products are best
_TILE_TOKENS = 4096


def _operations(impl: str, device: torch.device, *head_dims: int) -> ModuleType | SimpleNamespace:
    """Who computes for heads of these sizes on this device: what has the three operations as attributes.

    ``"auto"`` takes Triton on a GPU that ``trust`` trusts, if every head_dim is a multiple of 16 up to 256, and torch
    elsewhere; ``"triton"`` takes it on any device, come what may (on a CPU it needs ``TRITON_INTERPRET=1``).
    Here ``"native"`` is torch: compiled code has ``attend_stored`` only.

    Raises:
        ValueError: If ``impl`` is none of ``IMPLEMENTATIONS``.
    """
    impl = _chosen(impl)
    if impl == "auto":
        if device.type == "cuda" and all(map(_fits, head_dims)) and trust.serves(device):
            return _guarded_triton()
        impl = "torch"
    return {"torch": torch_ops, "native": torch_ops, "reference": reference}.get(impl) or _triton()


def _chosen(impl: str) -> str:
    """``impl``; the environment's ``LOWRANK_CACHE_IMPL`` instead of ``"auto"``."""
    chosen = os.environ.get("LOWRANK_CACHE_IMPL", "auto") if impl == "auto" else impl
    if chosen not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {IMPLEMENTATIONS}, got {chosen!r}")
    return chosen


def _fits(head_dim: int) -> bool:
    return head_dim % 16 == 0 and head_dim <= 256


@cache
def _triton() -> SimpleNamespace:
    from lowrank_cache.kernels import triton_decode, triton_encode, triton_reconstruct  # CPU installations lack triton

    return SimpleNamespace(
        encode=triton_encode.encode,
        reconstruct=triton_reconstruct.reconstruct,
        latent_attention=triton_decode.latent_attention,
        attend_stored=triton_decode.attend_stored,
    )


@cache
def _guarded_triton() -> SimpleNamespace:
    names = "encode", "reconstruct", "latent_attention"
    fallback = SimpleNamespace(**{name: getattr(torch_ops, name) for name in names}, attend_stored=_attend_segments)
    return trust.guarded(_triton(), fallback)


@without_autocast
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
    """See ``reference.encode``; ``impl`` is one of ``IMPLEMENTATIONS``."""
    impl = _chosen(impl)
    if impl in ("auto", "triton") and not (down_proj.dim() == 2 and tiers):
        impl = "torch"  # kernels take one basis for the whole batch
    operations = _operations(impl, down_proj.device, *{part.shape[3] for part in states})
    return operations.encode(states, constants, frames, down_proj, tiers, weight, latent_dtype)


@without_autocast
def reconstruct(side: LatentSide, dtype: torch.dtype, *, impl: str = "auto") -> Tensor:
    """See ``reference.reconstruct``; ``impl`` is one of ``IMPLEMENTATIONS``."""
    impl = _chosen(impl)
    if impl in ("auto", "triton") and not (side.up_proj.dim() == 3 and side.tiers and _fits(side.up_proj.shape[-1])):
        impl = "torch"
    return _operations(impl, side.up_proj.device, side.up_proj.shape[-1]).reconstruct(side, dtype)


@without_autocast
def latent_attention(
    query: Tensor,
    key: LatentSide,
    value: LatentSide,
    *,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """See ``reference.latent_attention``; ``impl`` is one of ``IMPLEMENTATIONS``."""
    operations = _operations(impl, query.device, key.up_proj.shape[2], value.up_proj.shape[2])
    if operations in (torch_ops, reference) or query.shape[2] <= MAX_KERNEL_QUERIES:
        return operations.latent_attention(query, key, value, scaling=scaling, mask=mask, softcap=softcap)
    frame = 1 if key.rope is None else key.rope.frame_length
    tile = max(frame, _TILE_TOKENS // frame * frame)
    parts = []
    for *sides, seen in tiles(key, value, mask, tile):
        keys, values = (operations.reconstruct(side, query.dtype) for side in sides)
        parts.append(attend(query, keys, values, scaling=scaling, mask=seen, softcap=softcap))
    return merge(parts)


@without_autocast
def attend_stored(
    query: Tensor,
    key: StoredSide,
    value: StoredSide,
    *,
    scaling: float,
    masks: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention over everything that a layer holds: sinks, latents and tail, in one softmax.

    Args:
        query: ``[batch, q_heads, q_tokens, head_dim]``, post-RoPE.
        scaling, softcap: See ``segments.attend``.
        masks: Of sinks, latents and tail: bool ``[1 or batch, 1, q_tokens, tokens]``, True where a query sees a token;
            None where all are seen.
        sink_logits: ``[q_heads]``, see ``segments.merge``.
        impl: One of ``IMPLEMENTATIONS``.

    Returns:
        ``[batch, q_heads, q_tokens, value_dim]``, dtype of ``query`` or float32.
    """
    impl = _chosen(impl)
    options: dict[str, Any] = {"scaling": scaling, "masks": masks, "softcap": softcap, "sink_logits": sink_logits}
    if impl in ("auto", "native") and native.serves(query, key, value) and _native_works(impl):
        return native.attend(query, key, value, **options)
    if key.latents is not None and value.latents is not None and query.shape[2] <= MAX_KERNEL_QUERIES:
        operations = _operations(impl, query.device, key.latents.up_proj.shape[-1], value.latents.up_proj.shape[-1])
        together = getattr(operations, "attend_stored", None)
        if together is not None:
            return together(query, key, value, **options)
    return _attend_segments(query, key, value, impl=impl, **options)


def _attend_segments(
    query: Tensor,
    key: StoredSide,
    value: StoredSide,
    *,
    scaling: float,
    masks: tuple[Tensor | None, Tensor | None, Tensor | None],
    softcap: float | None,
    sink_logits: Tensor | None,
    impl: str = "torch",
) -> Tensor:
    """``attend_stored``, segment by segment."""
    sinks, seen, tail = masks
    mask = None if sinks is None or tail is None else torch.cat([sinks.expand(tail.shape[0], -1, -1, -1), tail], dim=3)
    keys, values = (torch.cat([side.sinks, side.tail], dim=2) for side in (key, value))
    segments = [attend(query, keys, values, scaling=scaling, mask=mask, softcap=softcap)]
    if key.latents is not None and value.latents is not None:
        segments.append(
            latent_attention(query, key.latents, value.latents, scaling=scaling, mask=seen, softcap=softcap, impl=impl)
        )
    return merge(segments, sink_logits)[0]


@cache
def _native_works(impl: str) -> bool:
    """Whether compiled code serves CPUs here; asked once.

    Raises:
        RuntimeError: If ``impl`` is ``"native"`` and nothing compiles.
    """
    library, description = native.build()
    if library is None:
        if impl == "native":
            raise RuntimeError(f"impl='native' needs a C compiler: {description}")
        warnings.warn(f"attention over latents runs in torch, slower than compiled code: {description}", stacklevel=2)
    return library is not None
