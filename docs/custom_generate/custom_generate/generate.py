"""``model.generate(custom_generate=...)`` with a compressed cache; the work is done by the package lowrank-cache."""

import os

from lowrank_cache import LowRankCache, Projections


def generate(
    model,
    *,
    projections=None,
    method=None,
    compression_ratio=8.0,
    attend_to_latents=True,
    cache_options=None,
    past_key_values=None,
    cache=None,
    **arguments,
):
    """``model.generate`` with a new ``LowRankCache``.

    Args:
        projections: ``Projections``, or the folder or repository that holds them.
        method: ``"xkv"`` instead of projections.
        compression_ratio: Bytes per token of the full cache over those of the latents, at least 1.
        attend_to_latents: Attend to latents where the model can; False reconstructs keys and values.
        cache_options: More arguments of ``LowRankCache``.
        arguments: Everything that ``generate`` takes.

    Returns:
        What ``generate`` returns; with ``return_dict_in_generate=True`` its ``past_key_values`` is the cache.

    Raises:
        ValueError: If a cache is given, or an argument of ``LowRankCache`` is out of range.
        NotImplementedError: If the model's cache cannot be compressed.
    """
    if past_key_values is not None or cache is not None:
        raise ValueError(
            "past_key_values must not be given, nor cache, as transformers 5.24 calls it: this recipe makes a cache "
            "for every call. To go on with a cache, call model.generate without custom_generate"
        )
    if isinstance(projections, (str, os.PathLike)):
        projections = Projections.from_pretrained(projections, compression_ratio=compression_ratio)
    options = {"attend": "auto" if attend_to_latents else "reconstruct", **(cache_options or {})}
    cache = LowRankCache(model, projections, method=method, compression_ratio=compression_ratio, **options)
    return model.generate(past_key_values=cache, **arguments)
