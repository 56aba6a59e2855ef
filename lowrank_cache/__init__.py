"""A drop-in KV cache for transformers that stores quantized low-rank latents."""

from lowrank_cache.attention import latent_attention
from lowrank_cache.cache import LowRankCache
from lowrank_cache.projections import Projections

__all__ = ["LowRankCache", "Projections", "latent_attention"]
