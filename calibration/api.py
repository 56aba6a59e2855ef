"""``calibrate``: from a model and token batches to ``Projections``."""

from collections.abc import Iterable
from importlib.metadata import version

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowrank_cache.calibration.fisher import fisher_bases
from lowrank_cache.calibration.moments import Moments, collect_moments, layer_groups
from lowrank_cache.calibration.palu import palu_bases
from lowrank_cache.models import model_shape
from lowrank_cache.projections import Projections

__all__ = ["calibrate", "projections_from_moments"]

METHODS = {"fisher": fisher_bases, "palu": palu_bases}


def calibrate(
    model: PreTrainedModel,
    batches: Iterable,
    *,
    method: str = "fisher",
    frame_length: int = 1,
    layer_group_size: int | tuple[int, int] = 1,
    progress: bool = True,
) -> Projections:
    """Calibrate projections on token batches.

    One forward and one backward pass per batch; memory does not grow with their number. Pads and each
    sequence's first four real tokens are skipped.

    Args:
        model: The model to compress; it is not changed. Any dtype or quantization gradients pass through.
        batches: Iterable of LongTensors ``[batch, tokens]``, or of mappings with ``input_ids`` and
            ``attention_mask``. 20,000 tokens are enough for a 135M model.
        method: ``"fisher"`` (default) or ``"palu"``.
        frame_length: Slots per rotary frame in which keys are stored; 1 stores them pre-RoPE.
        layer_group_size: Adjacent layers that share a latent, for keys and values, or a pair.
        progress: Show a tqdm bar of tokens.

    Returns:
        Projections at full rank: the cache chooses how much of them to use.

    Raises:
        ValueError: If an option is unknown or out of range, or the batches hold no usable or only
            non-finite numbers.
        TypeError: If a batch is not a tensor of token ids.
        NotImplementedError: If the model's cache cannot be compressed.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {sorted(METHODS)}, got {method!r}")
    if not isinstance(frame_length, int) or frame_length < 1:
        raise ValueError(f"frame_length must be an integer of at least 1, got {frame_length!r}")
    sizes = layer_group_size if isinstance(layer_group_size, tuple) else (layer_group_size, layer_group_size)
    if len(sizes) != 2 or any(not isinstance(size, int) or size < 1 for size in sizes):
        raise ValueError(
            f"layer_group_size must be an integer of at least 1 or a pair of them, got {layer_group_size!r}"
        )
    shape = model_shape(model)
    groups = {side: layer_groups(shape, side, size) for side, size in zip(("key", "value"), sizes, strict=True)}
    with tqdm(desc="calibrating", unit=" tokens", disable=None if progress else True) as bar:
        moments = collect_moments(model, batches, groups, progress=bar.update)
    return projections_from_moments(
        moments, method=method, frame_length=frame_length, base_model=getattr(model.config, "_name_or_path", None)
    )


def projections_from_moments(
    moments: Moments, *, method: str = "fisher", frame_length: int = 1, base_model: str | None = None
) -> Projections:
    """Derive bases from moments: the part of ``calibrate`` that needs no model."""
    provenance = {
        "base_model": base_model or None,
        "calibration_tokens": moments.tokens,
        "calibration_sequences": moments.sequences,
        "calibration_loss": moments.loss / max(moments.predicted, 1),
        "versions": {name: version(name) for name in ("lowrank-cache", "torch", "transformers")},
    }
    bases = METHODS[method](moments, frame_length)
    return Projections(bases, moments.shape, method=method, frame_length=frame_length, provenance=provenance)
