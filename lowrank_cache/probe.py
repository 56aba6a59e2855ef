"""Find out what a model caches and where it computes, by probing it with one token.

Nothing here knows a model family. Two one-token forwards, at positions 0 and ``PROBE_POSITION``,
show what every layer hands to ``Cache.update``; since each layer is given the same hidden states in
both, the two differ by the rotary embedding alone. Whatever the probe cannot explain raises NotImplementedError
here, when a cache is made, and never later. See docs/cache_contract.md, "The probe".
"""

import gc
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from lowrank_cache.kernels.rope import LAYOUTS, angle_tables, pair_views, rotate
from lowrank_cache.shapes import (
    FULL,
    HYBRID,
    ONE_POSITION,
    SIDES,
    LayerShape,
    ModelShape,
    PositionAxes,
    RopeShape,
    SideShape,
    rope_buffer,
)

# Small, so that a dynamic or long-context rotary embedding does not leave its short-context state.
PROBE_POSITION = 3
TOLERANCE = 0.02  # bfloat16 rounding of keys and tables stays below 0.01; a wrong layout is above 0.5
# What a model calls the argument that takes a cache: ``cache`` since transformers 5.24, ``past_key_values`` before.
CACHE_ARGUMENTS = ("cache", "past_key_values")


def cache_argument(model: Any, cache: object) -> dict[str, Any]:
    """``cache`` as a keyword argument of a model's ``forward`` and ``generate``, by its name there."""
    name, old_name = CACHE_ARGUMENTS
    return {name if name in inspect.signature(model.forward).parameters else old_name: cache}


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The module of ``model`` that receives positions, mask and cache; NotImplementedError for encoder–decoders."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_decoder"):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(f"{type(model).__name__} is an encoder–decoder model; only decoders are supported")
    return model.get_decoder()


_AXES: "weakref.WeakKeyDictionary[nn.Module, PositionAxes]" = weakref.WeakKeyDictionary()
_STATES: "weakref.WeakKeyDictionary[nn.Module, Tensor]" = weakref.WeakKeyDictionary()
_SHAPES: "weakref.WeakKeyDictionary[PreTrainedModel, ModelShape]" = weakref.WeakKeyDictionary()


def model_shape(model: PreTrainedModel) -> ModelShape:
    """Probe ``model`` once and describe what it caches.

    Args:
        model: A decoder-only transformers model, on any device, quantized or not.

    Returns:
        The shape, remembered for as long as the model lives.

    Raises:
        NotImplementedError: If the model's cache cannot be compressed: no layer that keeps all tokens, keys that the
            probe cannot un-rotate, or a model split over processes.
        ValueError: If the model computes NaN or infinite keys or values.
    """
    decoder, inner = decoder_of(model), inner_model(model)
    if decoder not in _SHAPES:
        _SHAPES[decoder] = _probe(inner, decoder)
    if inner is not model and model not in _PASSING:
        _check_wrapper(model)
        _PASSING.add(model)
    return _SHAPES[decoder]


def probe_states(model: PreTrainedModel) -> Tensor | None:
    """What the compressed layers cached of the probe's token: ``[all widths]`` float32, layer by layer, keys first.

    None of a model that was not probed here.
    """
    model_shape(model)
    return _STATES.get(decoder_of(model))


def inner_model(model: PreTrainedModel) -> PreTrainedModel:
    """``model``, or the transformers model inside a wrapper such as PEFT's, which may change positions and inputs."""
    if isinstance(model, PreTrainedModel):
        return model
    decoder = decoder_of(model)
    found = (part for part in model.modules() if isinstance(part, PreTrainedModel) and part.get_decoder() is decoder)
    return next(found, model)


def _check_wrapper(model: PreTrainedModel) -> None:
    """Raise NotImplementedError if a wrapper does not hand on the cache that it is given."""
    reached: list[int] = []
    one_token_forward(model, SpyCache(model, lambda layer_idx, given, returned: reached.append(layer_idx)))
    if not reached:
        raise NotImplementedError(
            f"{type(model).__name__} gives its model a cache of its own, as prefix tuning does, and none that is "
            "passed to it would be used; only wrappers that hand on their cache are supported"
        )


def position_axes(model: PreTrainedModel) -> PositionAxes:
    """Of a model that was probed; a row of positions that serves the mask alone is no axis."""
    model_shape(model)
    return _AXES.get(decoder_of(model), ONE_POSITION)


def probed_decoders() -> list[PreTrainedModel]:
    """The living decoders whose shape is known."""
    gc.collect()  # models are full of cycles
    return list(_SHAPES)


# Wrappers that were seen to hand on their cache.
_PASSING: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


class SpyCache(DynamicCache):
    """A stock cache that shows each layer's update to ``note(layer_idx, given, returned)``, pairs of key and value."""

    def __init__(self, model: PreTrainedModel, note: Callable[[int, tuple, tuple], object]):
        super().__init__(config=model.config.get_text_config(decoder=True))
        self._note = note

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        returned = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._note(layer_idx, (key_states, value_states), returned)
        return returned


def _check_supported(model: PreTrainedModel, config, layer_types: tuple[str, ...]) -> None:
    name = type(model).__name__
    tensor_parallel = getattr(model, "_tp_size", None) or 1
    pipeline_parallel = getattr(getattr(model.config, "distributed_config", None), "pp_size", None) or 1
    refusals = {
        f"{name} is split over processes (tensor parallel {tensor_parallel}, pipeline parallel {pipeline_parallel}), "
        "and each caches only its own heads or layers, which is not supported; load the whole model in one process, "
        "over several devices with device_map if need be": max(tensor_parallel, pipeline_parallel) > 1,
        f"{name} has nothing to compress: its cache layers are {sorted(set(layer_types))}, and only those of the kinds "
        f"{FULL!r} and {HYBRID!r} are compressed": not {FULL, HYBRID} & set(layer_types),
    }
    for message, refused in refusals.items():
        if refused:
            raise NotImplementedError(message)


def _probe(model: PreTrainedModel, decoder: nn.Module) -> ModelShape:
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    layer_types = tuple(get_layer_types_and_kwargs(config)[0])
    ropes = getattr(config, "rope_parameters", None) or {}
    by_layer_type = ropes and all(isinstance(value, dict) for value in ropes.values())  # Gemma 3
    ropes = list(ropes.values()) if by_layer_type else [ropes]
    _check_supported(model, config, layer_types)
    sources = _rope_sources(decoder)
    with _same_inputs(decoder):
        before = _observe(model, 0)
        after = _observe(model, PROBE_POSITION)
    # Read at once after the second forward: a dynamic embedding may change its buffer in a forward.
    frequencies = {source: rope_buffer(decoder, source).detach().float().cpu() for source in sources}
    rope_types = [rope.get("rope_type", "default") for rope in ropes]
    dynamic = any("dynamic" in rope_type or rope_type == "longrope" for rope_type in rope_types)
    layers = []
    for layer_idx in [index for index, layer_type in enumerate(layer_types) if layer_type in (FULL, HYBRID)]:
        if layer_idx not in before or layer_idx not in after:
            raise NotImplementedError(
                f"{name}: layer {layer_idx} did not hand keys and values to the cache of a forward of one token; only "
                f"models in which every {layer_types[layer_idx]!r} layer does so are supported"
            )
        tokens = before[layer_idx][0].shape[2]
        if tokens != 1:
            raise NotImplementedError(
                f"{name}: layer {layer_idx} handed {tokens} tokens to the cache in a forward of one token; models that "
                "put tokens of their own before the text are not supported"
            )
        sides = []
        for side, at_zero, rotated in zip(SIDES, before[layer_idx], after[layer_idx], strict=True):
            rope, error = _explain(at_zero, rotated, frequencies, dynamic)
            if not error <= TOLERANCE:
                raise NotImplementedError(
                    f"{name}: the {side} states of layer {layer_idx} change with position in a way that is no known "
                    f"rotary layout {LAYOUTS}"
                )
            sides.append(SideShape(at_zero.shape[1], at_zero.shape[3], rope))
        layers.append(LayerShape(layer_idx, *sides))
    held = [before[layer.layer_idx] for layer in layers]
    _STATES[decoder] = torch.cat([states.flatten() for pair in held for states in pair])
    if not dynamic and any(hasattr(module, "mrope_section") for module in decoder.modules()):
        _AXES[decoder] = _find_axes(model, decoder, layers, before, frequencies)
    return ModelShape(config.model_type, layer_types, tuple(layers))


# Far apart, so that a pair of any frequency turns visibly at one of them, and high frequencies not by whole turns.
_FAR = (1_000_003, 17)
_UNEVEN = (2, 3, 7, 5)


def _find_axes(
    model: PreTrainedModel,
    decoder: nn.Module,
    layers: list[LayerShape],
    at_zero: dict[int, tuple[Tensor, ...]],
    frequencies: dict[str, Tensor],
) -> PositionAxes:
    """See ``position_axes``; ``ONE_POSITION`` also if no axes explain what the model does with uneven positions.

    Forwards that move some of a token's positions, and not others, tell which pairs they turn: two such subsets tell
    four axes apart.
    """
    rotated = [
        (layer.layer_idx, place, rope)
        for layer in layers
        for place, rope in enumerate((layer.key.rope, layer.value.rope))
        if rope is not None
    ]
    for count in (4, 3):
        try:
            with _same_inputs(decoder):
                _observe(model, 0)  # whose inputs the others are given
                subsets = [
                    [_observe(model, torch.tensor(moved[:count], dtype=torch.long, device="cpu") * far) for far in _FAR]
                    for moved in ([0, 1, 0, 1], [0, 0, 1, 1])
                ]
                uneven = _observe(model, torch.tensor(_UNEVEN[:count], dtype=torch.long, device="cpu"))
        except (NotImplementedError, RuntimeError, ValueError, IndexError):
            continue  # it takes another number of positions
        axes: dict[str, Tensor] = {}
        for source in frequencies:
            turned = [
                torch.stack([_turned(after, at_zero, rotated, source) for after in subset]).any(0) for subset in subsets
            ]
            axes[source] = turned[0].long() + 2 * turned[1].long()
        for layer_idx, place, rope in rotated:
            positions = torch.tensor([_UNEVEN], dtype=torch.long, device="cpu")
            cos, sin = angle_tables(positions, frequencies[rope.source], axes[rope.source])
            zero, undone = (
                at_zero[layer_idx][place],
                rotate(uneven[layer_idx][place], cos, sin, rope.layout, inverse=True),
            )
            if not float((undone - zero).norm() / zero.norm().clamp(min=1e-6)) <= TOLERANCE:
                break
        else:
            first = min(int(each.min()) for each in axes.values())
            of_pairs = {source: tuple((each - first).tolist()) for source, each in axes.items()}
            return PositionAxes(count - first, of_pairs)
    return ONE_POSITION


def _turned(
    after: dict[int, tuple[Tensor, ...]], at_zero: dict[int, tuple[Tensor, ...]], rotated: list, source: str
) -> Tensor:
    """Which pairs differ between two forwards, ``[rotary_dim / 2]`` bool, over all states with these frequencies."""
    moved: list[Tensor] = []
    size: list[Tensor] = []
    for layer_idx, place, rope in rotated:
        if rope.source == source:
            zero, turned = at_zero[layer_idx][place], after[layer_idx][place]
            for total, states in ((moved, turned - zero), (size, zero)):
                one, two = pair_views(states, rope.rotary_dim // 2, rope.layout)
                total.append((one.square() + two.square()).sum(dim=(0, 1, 2)))
    return torch.stack(moved).sum(0) > TOLERANCE**2 * torch.stack(size).sum(0)


@contextmanager
def _same_inputs(decoder: nn.Module) -> Iterator[None]:
    """Give each layer, in every forward after the first, the hidden states it had in the first.

    One token attends to itself alone, so positions should not matter to hidden states; but a sink logit sees the
    rounding of rotated scores, routers amplify it, and in half precision deep layers differ beyond recognition.
    """
    inputs: dict[nn.Module, Tensor] = {}
    prober = threading.get_ident()

    def replace(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if threading.get_ident() != prober:  # another thread is using the model meanwhile
            return args, kwargs
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        if isinstance(hidden, Tensor):
            first = inputs.setdefault(module, hidden.clone())
            if "hidden_states" in kwargs:
                kwargs["hidden_states"] = first.clone()
            else:
                args = (first.clone(), *args[1:])
        return args, kwargs

    with ExitStack() as hooks:
        for module in decoder.modules():
            if hasattr(module, "layer_idx"):
                hooks.enter_context(module.register_forward_pre_hook(replace, with_kwargs=True))
        yield


def _observe(model: PreTrainedModel, position: int | Tensor) -> dict[int, tuple[Tensor, ...]]:
    """One token at ``position`` through the model: what each layer handed to the cache, float32 on CPU.

    A token with several positions has a tensor ``[axes]`` of them.
    """
    seen: dict[int, tuple[Tensor, ...]] = {}

    def note(layer_idx: int, given: tuple, returned: tuple) -> None:
        seen[layer_idx] = tuple(state.detach().float().cpu() for state in given)

    one_token_forward(model, SpyCache(model, note), position)
    for index, states in seen.items():
        if not all(bool(torch.isfinite(state).all()) for state in states):
            raise ValueError(
                f"{type(model).__name__}: keys and values of layer {index} must be finite, got NaN or infinity; "
                "check the model's weights"
            )
    return seen


def layer_devices(model: PreTrainedModel) -> dict[int, torch.device]:
    """The device on which each cache layer computes; accelerate brings weights that are offloaded to it."""
    devices: dict[int, torch.device] = {}
    for module in decoder_of(model).modules():
        layer_idx = getattr(module, "layer_idx", None)
        if not isinstance(layer_idx, int) or layer_idx in devices:
            continue
        # A layer that holds several caches (LongCat) counts itself otherwise than the modules inside, which call them.
        if not any(hasattr(part, "layer_idx") for part in module.modules() if part is not module):
            devices[layer_idx] = execution_device(module)
    return devices


def execution_device(module: nn.Module) -> torch.device:
    """Where ``module`` computes: the device that accelerate's hooks bring weights to, or that its parameters are on."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for single in getattr(hook, "hooks", (hook,)):
            device = getattr(single, "execution_device", None)
            if device is not None:  # accelerate counts GPUs
                return torch.empty(0, dtype=torch.uint8, device=device).device
    return next((tensor.device for tensor in module.parameters()), torch.device("cpu"))


def input_device(model: PreTrainedModel) -> torch.device:
    """Where ``model`` takes its token ids."""
    embeddings = model.get_input_embeddings()  # several where a token has several codes (MusicGen)
    device = next((weight.device for weight in embeddings.parameters()), model.device)
    # accelerate keeps offloaded weights on meta and moves inputs itself
    return torch.device("cpu") if device.type == "meta" else device


def one_token_cache(model: PreTrainedModel) -> Cache:
    """A stock cache of one token: shapes, dtypes and devices of everything that ``model`` hands to a cache."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    one_token_forward(model, cache)
    return cache


def one_token_forward(model: PreTrainedModel, cache: Cache, position: int | Tensor = 0) -> None:
    """Run one token at ``position`` in eval mode, without gradients; NotImplementedError if none can be given."""
    device = input_device(model)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    token = torch.full((1, 1), min(7, vocabulary - 1), dtype=torch.long, device=device)
    if isinstance(position, Tensor):
        positions = position.to(device)[:, None, None]
    else:
        positions = torch.full_like(token, position)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(
                input_ids=token,
                position_ids=positions,
                attention_mask=torch.ones_like(token),
                **cache_argument(model, cache),
                use_cache=True,
            )
    except (TypeError, AttributeError, ValueError, LookupError) as error:
        raise NotImplementedError(
            f"{type(model).__name__} cannot run one token of text with a transformers Cache and position_ids: {error}"
        ) from error
    finally:
        model.train(was_training)


def _explain(
    at_zero: Tensor, rotated: Tensor, frequencies: dict[str, Tensor], dynamic: bool
) -> tuple[RopeShape | None, float]:
    """Which rotation best takes ``at_zero`` to ``rotated``, both ``[1, heads, 1, head_dim]``; its relative error."""
    scale = at_zero.norm().clamp(min=1e-6)
    errors: dict[RopeShape | None, float] = {None: float((rotated - at_zero).norm() / scale)}
    position = torch.tensor([PROBE_POSITION], dtype=torch.long, device="cpu")
    for source, inv_freq in frequencies.items():
        if 2 * len(inv_freq) > at_zero.shape[-1]:
            continue
        cos, sin = angle_tables(position, inv_freq)
        for layout in LAYOUTS:
            undone = rotate(rotated, cos, sin, layout, inverse=True)
            shape = RopeShape(layout, 2 * len(inv_freq), source, dynamic)
            errors[shape] = float((undone - at_zero).norm() / scale)
    return min(errors.items(), key=itemgetter(1))


def _rope_sources(decoder: nn.Module) -> list[str]:
    """Paths of the inverse frequencies in use, sorted; ``original_inv_freq`` copies are not in use."""
    sources = []
    for path, module in decoder.named_modules():
        for name in {*dict(module.named_buffers(recurse=False)), *vars(module)}:
            if name.endswith("inv_freq") and "original" not in name and "long" not in name:
                sources.append(f"{path}.{name}".lstrip("."))
    return sorted(sources)
