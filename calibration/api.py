"""``calibrate``: from a model and token batches to ``Projections``."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import version
from math import ceil
from pathlib import Path

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowrank_cache.calibration.compressed_stream import CompressedRecorder
from lowrank_cache.calibration.fisher import fisher_bases
from lowrank_cache.calibration.moments import Moments, collect_moments
from lowrank_cache.calibration.palu import palu_bases
from lowrank_cache.calibration.recalkv import recalkv_bases
from lowrank_cache.models import BOTH, SIDES, Group, ModelShape, layer_groups, model_shape
from lowrank_cache.projections import Basis, Projections

__all__ = ["METHODS", "auto_group_size", "calibrate", "projections_from_moments", "refit_values"]

MAX_GROUP_LAYERS = 5
MAX_GROUP_WIDTH = 4096
# Open to additions at run time: (moments, groups, frame_length, **options) -> bases; docs/new_method.md.
METHODS: dict[str, Callable[..., list[Basis]]] = {"fisher": fisher_bases, "palu": palu_bases, "recalkv": recalkv_bases}


def calibrate(
    model: PreTrainedModel,
    batches: Iterable,
    *,
    method: str = "fisher",
    frame_length: int = 1,
    layer_group_size: int | tuple[int, int] | str = "auto",
    joint: bool | None = None,
    head_group_size: int = 4,
    reorder: bool = True,
    calibrate_values: bool = True,
    refit_ratio: float = 3.0,
    sensitivity: str = "gradient",
    save_moments: str | Path | None = None,
    provenance: dict | None = None,
    progress: bool = True,
) -> Projections:
    """Calibrate projections on token batches.

    The defaults give the smallest caches; ``calibrate(model, batches, **PRESETS["fastest"])`` gives those that decode
    fastest under ``latent_attention``.
    One forward and one backward pass per batch; memory does not grow with their number. Pads and each
    sequence's first four real tokens are skipped. Equal batches give equal projections.

    Args:
        model: The model to compress; it is not changed. Any dtype or quantization gradients pass through.
        batches: Iterable of LongTensors ``[batch, tokens]``, or of mappings with ``input_ids`` and
            ``attention_mask``; ``recall.mixed_batches`` makes good ones. 20,000 tokens are enough for a
            135M model.
        method: ``"fisher"`` (default), ``"palu"`` or ``"recalkv"``.
        frame_length: Slots per rotary frame in which keys are stored; 1 stores them pre-RoPE.
        layer_group_size: Adjacent layers that share a latent: a number, a pair for keys and values, or
            ``"auto"``, see ``auto_group_size``. Methods other than fisher take ``"auto"`` as 1.
        joint: Whether keys and values of a layer group share one latent. They are functions of the same
            hidden state, so a joint basis stores less twice. None: yes for fisher, unless
            ``layer_group_size`` is a pair.
        head_group_size: KV heads that share a basis: palu's keys and values, recalkv's keys. Where it does not
            divide their number, one group is smaller.
        reorder: recalkv's grouping of key heads by similarity; False groups adjacent heads.
        calibrate_values: recalkv's value calibration: fit the values that the compressed stream produces,
            which takes a second pass over ``batches``.
        refit_ratio: The ratio, at 16 bits, at which that stream is compressed; best the one to be used.
        sensitivity: ``"gradient"``, or ``"query"`` for models that gradients do not pass through.
        save_moments: File for the statistics, from which ``projections_from_moments`` makes projections
            with another method, frame length or smaller groups without another pass.
        provenance: Facts to record beside those recorded anyway, e.g. the text's name and the seed.
        progress: Show a tqdm bar of tokens.

    Returns:
        Projections at full rank: the cache chooses how much of them to use.

    Raises:
        ValueError: If an option is unknown or out of range, or the batches hold no usable or only
            non-finite numbers.
        TypeError: If a batch is not a tensor of token ids, or a second pass is needed and ``batches`` is an
            iterator.
        NoGradientError: If gradients do not pass through the model.
        NotImplementedError: If the model's cache cannot be compressed.
    """
    _check_options(method, frame_length, head_group_size)
    shape = model_shape(model)
    groups = _groups(shape, method, layer_group_size, joint)
    refit = method == "recalkv" and calibrate_values
    if refit and isinstance(batches, Iterator):
        raise TypeError(
            "batches must be a list for method 'recalkv', which reads them twice, got an iterator; or pass "
            "calibrate_values=False"
        )
    if not refit_ratio >= 1:
        raise ValueError(f"refit_ratio must be at least 1, got {refit_ratio}")
    with tqdm(desc="calibrating", unit=" tokens", disable=None if progress else True) as bar:
        moments = collect_moments(model, batches, groups, sensitivity=sensitivity, progress=bar.update)
    if save_moments is not None:
        moments.save(save_moments)
    facts = {
        "base_model": getattr(model.config, "_name_or_path", None) or None,
        "base_model_revision": getattr(model.config, "_commit_hash", None),
        "weights": _weight_format(model),
        **(provenance or {}),
    }
    options: dict = {
        "method": method,
        "frame_length": frame_length,
        "layer_group_size": layer_group_size,
        "joint": joint,
        "head_group_size": head_group_size,
        "reorder": reorder,
    }
    refitted = None
    if refit:
        first = projections_from_moments(moments, **options)
        with tqdm(desc="calibrating values", unit=" tokens", disable=None if progress else True) as bar:
            refitted = refit_values(model, batches, moments, first, refit_ratio, progress=bar.update)
        facts["refit_ratio"] = refit_ratio
    return projections_from_moments(moments, **options, refitted=refitted, provenance=facts)


def refit_values(
    model: PreTrainedModel, batches: Iterable, moments: Moments, projections: Projections, ratio: float, progress=None
) -> Moments:
    """Moments of what ``model`` caches when it attends to states compressed by ``projections`` at ``ratio``.

    Args:
        batches: Those that ``moments`` come from.
        projections: Of groups of one layer.
        progress: See ``collect_moments``.
    """
    recorder = partial(CompressedRecorder, projections.truncate(ratio))
    groups = {side: layer_groups(moments.shape, side, 1) for side in SIDES}
    refitted = collect_moments(model, batches, groups, make_recorder=recorder, progress=progress)
    refitted.sensitivity = {
        key: total * (refitted.tokens / moments.tokens) for key, total in moments.sensitivity.items()
    }
    refitted.sensitivity_kind = moments.sensitivity_kind
    return refitted


def projections_from_moments(
    moments: Moments,
    *,
    method: str = "fisher",
    frame_length: int = 1,
    layer_group_size: int | tuple[int, int] | str = "auto",
    joint: bool | None = None,
    head_group_size: int = 4,
    reorder: bool = True,
    refitted: Moments | None = None,
    provenance: dict | None = None,
) -> Projections:
    """Derive bases from moments: the part of ``calibrate`` that needs no model.

    Each group must lie within one that the moments were recorded for; joint groups need joint moments.
    ``refitted`` comes from ``refit_values`` and is recalkv's value calibration; the other arguments are those of
    ``calibrate``.
    """
    _check_options(method, frame_length, head_group_size)
    if refitted is not None and method != "recalkv":
        raise ValueError(f"refitted belongs to method 'recalkv', got method {method!r}")
    groups = _groups(moments.shape, method, layer_group_size, joint)
    facts = {
        **(provenance or {}),
        "sensitivity": moments.sensitivity_kind,
        "calibration_tokens": moments.tokens,
        "calibration_sequences": moments.sequences,
        "calibration_loss": moments.loss / max(moments.predicted, 1),
        "versions": {name: version(name) for name in ("lowrank-cache", "torch", "transformers")},
    }
    options: dict = {} if method == "fisher" else {"head_group_size": head_group_size}
    if method == "recalkv":
        options |= {"reorder": reorder, "refitted": refitted}
        facts |= {"reorder": reorder, "calibrate_values": refitted is not None}
    bases = METHODS[method](moments, groups, frame_length, **options)
    return Projections(bases, moments.shape, method=method, frame_length=frame_length, provenance=facts)


def auto_group_size(shape: ModelShape, side: str) -> int:
    """Layers per group for ``"key"``, ``"value"`` or ``"both"`` under two limits, evened out over the model.

    Every layer of a group reads the group's whole latent, so at a compression ratio r a layer of a group
    of G reads G / r of the bytes that the full cache's layer reads: at most ``MAX_GROUP_LAYERS`` keeps
    that below 5/8 at 8x. Bases grow with the square of the group's width, bounded by ``MAX_GROUP_WIDTH``.
    """
    width = max(sum(member.width for _, _, member in shape.members(side, (layer.layer_idx,))) for layer in shape.layers)
    largest = max(1, min(MAX_GROUP_LAYERS, MAX_GROUP_WIDTH // width))
    layers = len(shape.layers)
    return ceil(layers / ceil(layers / largest))


def _groups(
    shape: ModelShape, method: str, size: int | tuple[int, int] | str, joint: bool | None
) -> dict[str, list[Group]]:
    """Layer groups under ``"both"``, or under ``"key"`` and ``"value"``."""
    parts: tuple = size if isinstance(size, tuple) else (size, size)
    if size != "auto" and (len(parts) != 2 or any(not isinstance(part, int) or part < 1 for part in parts)):
        raise ValueError(f"layer_group_size must be 'auto', an integer of at least 1 or a pair of them, got {size!r}")
    if joint is None:
        joint = method == "fisher" and not isinstance(size, tuple) and _heads_alike(shape)
    if joint and (method != "fisher" or isinstance(size, tuple) or not _heads_alike(shape)):
        raise ValueError(
            f"joint=True needs method 'fisher', one layer_group_size for both sides and as many key as value heads, "
            f"got method {method!r} and layer_group_size {size!r}"
        )
    sides = (BOTH,) if joint else SIDES
    if size == "auto":
        sizes = [auto_group_size(shape, side) if method == "fisher" else 1 for side in sides]
    else:
        sizes = [parts[0]] if joint else list(parts)
    return {side: layer_groups(shape, side, part) for side, part in zip(sides, sizes, strict=True)}


def _heads_alike(shape: ModelShape) -> bool:
    return all(layer.key.heads == layer.value.heads for layer in shape.layers)


def _check_options(method: str, frame_length: int, head_group_size: int) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {sorted(METHODS)}, got {method!r}")
    if not isinstance(frame_length, int) or frame_length < 1:
        raise ValueError(f"frame_length must be an integer of at least 1, got {frame_length!r}")
    if not isinstance(head_group_size, int) or head_group_size < 1:
        raise ValueError(f"head_group_size must be an integer of at least 1, got {head_group_size!r}")


def _weight_format(model: PreTrainedModel) -> str:
    """How the weights were stored while calibrating: a quantization method, or a dtype."""
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is None:
        return str(model.dtype).removeprefix("torch.")
    fields = quantization if isinstance(quantization, dict) else quantization.to_dict()
    kind = str(getattr(fields.get("quant_method"), "value", fields.get("quant_method")))
    for width in (4, 8):
        if fields.get(f"load_in_{width}bit"):
            return f"{kind} {width}-bit"
    return kind
