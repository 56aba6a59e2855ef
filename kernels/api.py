"""Which implementation serves an operation: Triton on GPUs, torch elsewhere."""

from importlib.util import find_spec

from torch import Tensor

from lowrank_cache.kernels import reference, torch_decode
from lowrank_cache.kernels.packed import LatentSide

__all__ = ["IMPLEMENTATIONS", "MAX_KERNEL_QUERIES", "latent_decode"]

IMPLEMENTATIONS = ("auto", "torch", "triton", "reference")
MAX_KERNEL_QUERIES = 16  # a longer query rebuilds keys and values tile by tile, where dense products are best


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
    """See ``reference.latent_decode``.

    Args:
        impl: ``"auto"`` takes Triton on a GPU where it is installed and head_dim is a multiple of 16 up to 256, else
            torch. ``"triton"`` takes it on any
            device (on a CPU it needs ``TRITON_INTERPRET=1``). Queries of more than ``MAX_KERNEL_QUERIES`` tokens
            are torch's in both cases.

    Raises:
        ValueError: If ``impl`` is none of ``IMPLEMENTATIONS``.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {IMPLEMENTATIONS}, got {impl!r}")
    taken = impl == "triton" or (impl == "auto" and query.is_cuda and _fits_kernels(key, value))
    if taken and query.shape[2] <= MAX_KERNEL_QUERIES:
        from lowrank_cache.kernels import triton_decode  # needs triton, which CPU installations lack

        function = triton_decode.latent_decode
    else:
        function = reference.latent_decode if impl == "reference" else torch_decode.latent_decode
    return function(query, key, value, scaling=scaling, mask=mask, softcap=softcap)


def _fits_kernels(key: LatentSide, value: LatentSide) -> bool:
    """Whether Triton is there and its kernels take heads of these sizes."""
    sizes = {key.up_proj.shape[2], value.up_proj.shape[2]}
    return find_spec("triton") is not None and all(size % 16 == 0 and size <= 256 for size in sizes)
