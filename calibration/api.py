"""``calibrate``: from a model and token batches to ``Projections``, by one of ``METHODS``."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from math import ceil
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowrank_cache.artefact import integer, user_cache
from lowrank_cache.basis import Basis
from lowrank_cache.calibration.collect import collect_moments, refit_values
from lowrank_cache.calibration.moments import Moments
from lowrank_cache.calibration.text import bundled_text, mixed_batches
from lowrank_cache.kernels.ambient import without_autocast
from lowrank_cache.probe import model_shape
from lowrank_cache.projections import Projections
from lowrank_cache.shapes import BOTH, SIDES, Group, ModelShape, layer_groups

MAX_GROUP_LAYERS = 5
MAX_GROUP_WIDTH = 4096


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


@dataclass(frozen=True)
class Method:
    """All that ``calibrate`` knows of a method.

    Attributes:
        bases: ``(moments, groups, frame_length, **options)`` → bases of full rank that cover every head of the groups.
        options: Its own options of ``calibrate`` with their defaults; JSON-able, for they are recorded.
        check: ``(groups, **options)``, called before the model is run: raises ValueError for what cannot be made.
        joint: Whether keys and values may share one latent, as they then do by default.
        frame_length: What ``calibrate`` takes unless told.
        group_size: ``(shape, side)`` → layers that share a latent under ``layer_group_size="auto"``.
        refit: For a method that also wants the moments of a model that attends to compressed states: the name of the
            option, True by default, that asks for this second pass. ``refit_ratio`` becomes an option too, and
            ``bases`` gets the moments as ``refitted``, None without the pass. None: one pass is enough.
        refit_ratio: The default of that option.
    """

    bases: Callable[..., list[Basis]]
    options: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[..., None] = lambda groups, **options: None
    joint: bool = False
    frame_length: int = 1
    group_size: Callable[[ModelShape, str], int] = lambda shape, side: 1
    refit: str | None = None
    refit_ratio: float = 3.0


# By name; those of this package are put in by its __init__. Open to additions: docs/recipes.md, "Write a method".
METHODS: dict[str, Method] = {}


def calibrate(
    model: PreTrainedModel,
    batches: Iterable,
    *,
    method: str = "fisher",
    frame_length: int | None = None,
    layer_group_size: int | tuple[int, int] | str = "auto",
    joint: bool | None = None,
    sensitivity: str = "gradient",
    save_moments: str | Path | None = None,
    provenance: dict | None = None,
    progress: bool = True,
    **method_options: Any,
) -> Projections:
    """Calibrate projections on token batches.

    The defaults are one preset for all; ``PRESETS`` has one that is smaller and slower, and one that is faster and
    loses more.
    One forward and one backward pass per batch; memory does not grow with their number. Pads and each
    sequence's first four real tokens are skipped. Equal batches give equal projections.

    Args:
        model: The model to compress; it is not changed. Any dtype or quantization gradients pass through.
        batches: Iterable of LongTensors ``[batch, tokens]``, or of mappings with ``input_ids`` and
            ``attention_mask``; ``text.mixed_batches`` makes good ones. 20,000 tokens are enough for a
            135M model.
        method: A name in ``METHODS``: ``"fisher"`` (default), ``"palu"`` or ``"recalkv"``.
        frame_length: Slots per rotary frame in which keys are stored; 1 stores them pre-RoPE, and every step must
            then reconstruct them. None: 64 for fisher, 1 for the papers' methods.
        layer_group_size: Adjacent layers that share a latent: a number, a pair for keys and values, or
            ``"auto"``, see ``auto_group_size``. Methods other than fisher take ``"auto"`` as 1.
        joint: Whether keys and values of a layer group share one latent. They are functions of the same
            hidden state, so a joint basis stores less twice. None: yes for fisher, unless
            ``layer_group_size`` is a pair.
        sensitivity: ``"gradient"``, or ``"query"`` for models that gradients do not pass through.
        save_moments: File for the statistics, from which ``projections_from_moments`` makes projections
            with another method, frame length or smaller groups without another pass.
        provenance: Facts to record beside those recorded anyway, e.g. the text's name and the seed.
        progress: Show a tqdm bar of tokens.
        **method_options: Those of the method:

            - palu: ``head_group_size`` (4), KV heads that share a basis. Where it does not divide their number, one
              group is smaller.
            - recalkv: ``head_group_size`` (4), of keys. ``reorder`` (True), group key heads by similarity; False groups
              adjacent heads. ``calibrate_values`` (True), fit the values that the compressed stream produces, which
              takes a second pass over ``batches``. ``refit_ratio`` (3.0), the ratio, at 16 bits, at which that
              stream is compressed; best the one to be used.

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
    found, own = _with_options(method, method_options, passes=2)
    frame_length = found.frame_length if frame_length is None else frame_length
    refit_ratio = _refit_ratio(method, own, batches)
    options: dict[str, Any] = {
        "method": method,
        "frame_length": frame_length,
        "layer_group_size": layer_group_size,
        "joint": joint,
        **own,
    }
    groups = _checked_groups(model_shape(model), **options)
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
    refitted = None
    if refit_ratio is not None:
        first = projections_from_moments(moments, **options)
        with tqdm(desc="calibrating values", unit=" tokens", disable=None if progress else True) as bar:
            refitted = refit_values(model, batches, moments, first, refit_ratio, progress=bar.update)
        facts["refit_ratio"] = refit_ratio
    return projections_from_moments(moments, **options, refitted=refitted, provenance=facts)


def projections_for(
    model: PreTrainedModel,
    tokenizer: Callable[[str], Mapping],
    text: str | None = None,
    *,
    tokens: int = 20_480,
    **options: Any,
) -> Projections:
    """This model's projections from the user's cache folder; the first call calibrates them, which takes minutes.

    Args:
        model: As in ``calibrate``. The same weights in another dtype or format are another model.
        tokenizer: Called as ``tokenizer(text)["input_ids"]``.
        text: Prose to calibrate on beside look-ups, best of the kind that will be cached; None for Python's own
            documentation, which is always there.
        tokens: Tokens to calibrate on.
        options: Of ``calibrate``.

    Raises:
        ValueError, NotImplementedError, NoGradientError: As ``calibrate``; ValueError also if the text is too short.
    """
    prose = bundled_text() if text is None else text
    asked = json.dumps([tokens, options, hashlib.sha256(prose.encode()).hexdigest()], sort_keys=True, default=repr)
    key = hashlib.sha256(f"{_weights_digest(model)}{asked}".encode()).hexdigest()[:32]
    folder = user_cache() / "projections" / key
    try:
        return Projections.from_pretrained(folder)
    except (FileNotFoundError, ValueError):  # not there yet, damaged, or of another format
        batches = list(mixed_batches(tokenizer, prose, tokens=tokens))
        source = "Python's own documentation" if text is None else "text of the caller's"
        projections = calibrate(model, batches, **{"provenance": {"text": source}, **options})
        projections.save_pretrained(folder)
        return projections


def _weights_digest(model: PreTrainedModel) -> str:
    """SHA-256 of the model's shape, and of every parameter's name, dtype, shape and some of its numbers."""
    digest = hashlib.sha256(model_shape(model).fingerprint.encode())
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        if not weight.is_meta:
            some = weight.detach().flatten()[:: max(1, weight.numel() // 64)].contiguous().cpu()
            digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_groups(
    moments: Moments,
    *,
    method: str = "fisher",
    frame_length: int | None = None,
    layer_group_size: int | tuple[int, int] | str = "auto",
    joint: bool | None = None,
) -> None:
    """Raise ValueError unless ``projections_from_moments`` with these options can do with what ``moments`` record.

    These may be empty: it is asked before a pass over the model.
    """
    found, own = _with_options(method, {}, passes=1)
    frame_length = found.frame_length if frame_length is None else frame_length
    groups = _checked_groups(moments.shape, method, frame_length, layer_group_size, joint, **own)
    for side, of_side in groups.items():
        for group in of_side:
            moments.rows_of(side, group)


@without_autocast
def projections_from_moments(
    moments: Moments,
    *,
    method: str = "fisher",
    frame_length: int | None = None,
    layer_group_size: int | tuple[int, int] | str = "auto",
    joint: bool | None = None,
    refitted: Moments | None = None,
    provenance: dict | None = None,
    **method_options: Any,
) -> Projections:
    """Derive bases from moments: the part of ``calibrate`` that needs no model.

    Each group must lie within one that the moments were recorded for; joint groups need joint moments.
    ``refitted`` comes from ``refit_values`` and is recalkv's value calibration, so ``calibrate_values`` and
    ``refit_ratio`` are no options here; the other arguments are those of ``calibrate``.
    """
    found, own = _with_options(method, method_options, passes=1)
    frame_length = found.frame_length if frame_length is None else frame_length
    groups = _checked_groups(moments.shape, method, frame_length, layer_group_size, joint, **own)
    facts = {
        **(provenance or {}),
        "sensitivity": moments.sensitivity_kind,
        "calibration_tokens": moments.tokens,
        "calibration_sequences": moments.sequences,
        "calibration_loss": moments.loss / max(moments.predicted, 1),
        "versions": {name: version(name) for name in ("lowrank-cache", "torch", "transformers")},
        **own,
    }
    if found.refit is not None:
        facts[found.refit] = refitted is not None
        own["refitted"] = refitted
    elif refitted is not None:
        raise ValueError(f"refitted belongs to method {_names_with('refit')}, got method {method!r}")
    bases = found.bases(moments, groups, frame_length, **own)
    return Projections(
        bases, moments.shape, method=method, frame_length=frame_length, provenance=facts, probe=moments.probe
    )


def _names_with(attribute: str) -> str:
    """The methods that have something, as an error names them: ``'one' or 'other'``."""
    return " or ".join(repr(name) for name, method in METHODS.items() if getattr(method, attribute))


def _with_options(method: str, given: Mapping[str, Any], passes: int) -> tuple[Method, dict[str, Any]]:
    """A method and all of its options; those of the second of two ``passes`` too if it has one."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {sorted(METHODS)}, got {method!r}")
    found = METHODS[method]
    defaults = dict(found.options)
    if passes == 2 and found.refit is not None:
        defaults |= {found.refit: True, "refit_ratio": found.refit_ratio}
    unknown = [name for name in given if name not in defaults]
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)} is no option of method {method!r}; beside the options of all methods it takes "
            f"{', '.join(defaults) or 'none'}"
        )
    return found, {**defaults, **given}


def _refit_ratio(method: str, own: dict[str, Any], batches: Iterable) -> float | None:
    """The ratio of a second pass, or None for one pass; the options that say so are taken out of ``own``."""
    refit = METHODS[method].refit
    if refit is None:
        return None
    wanted, ratio = own.pop(refit), own.pop("refit_ratio")
    if not ratio >= 1:
        raise ValueError(f"refit_ratio must be at least 1, got {ratio}")
    if wanted and isinstance(batches, Iterator):
        raise TypeError(
            f"batches must be a list for method {method!r}, which reads them twice, got an iterator; or pass "
            f"{refit}=False"
        )
    return ratio if wanted else None


def _checked_groups(
    shape: ModelShape,
    method: str,
    frame_length: int,
    layer_group_size: int | tuple[int, int] | str,
    joint: bool | None,
    **own: Any,
) -> dict[str, list[Group]]:
    """Layer groups under ``"both"``, or under ``"key"`` and ``"value"``, if ``method`` can do what is asked."""
    integer(frame_length, "frame_length", 1)
    found, size = METHODS[method], layer_group_size
    parts: tuple = size if isinstance(size, tuple) else (size, size)
    if size != "auto" and (len(parts) != 2 or any(not isinstance(part, int) or part < 1 for part in parts)):
        raise ValueError(f"layer_group_size must be 'auto', an integer of at least 1 or a pair of them, got {size!r}")
    heads_alike = all(layer.key.heads == layer.value.heads for layer in shape.layers)
    can_be_joint = found.joint and not isinstance(size, tuple) and heads_alike
    if joint and not can_be_joint:
        raise ValueError(
            f"joint=True needs method {_names_with('joint')}, one layer_group_size for both sides and as many key as "
            f"value heads, got method {method!r} and layer_group_size {size!r}"
        )
    sides = (BOTH,) if joint or (joint is None and can_be_joint) else SIDES
    sizes = [found.group_size(shape, side) for side in sides] if size == "auto" else parts[: len(sides)]
    groups = {side: layer_groups(shape, side, part) for side, part in zip(sides, sizes, strict=True)}
    found.check(groups, **own)
    return groups


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
