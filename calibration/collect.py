"""Run a model over calibration batches and sum up what its cache would hold.

One forward a batch, with a recorder in place of the cache; a backward too where the sensitivity is the gradient's.
A second pass may let every layer attend to compressed states, so that later layers see the drift that compression
causes. Nothing of a batch outlives it but ``Moments``.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from lowrank_cache.calibration.moments import SKIPPED_TOKENS, Moments, UsableTokens
from lowrank_cache.calibration.query_sensitivity import QuerySensitivity, record_queries
from lowrank_cache.kernels.ambient import without_autocast
from lowrank_cache.kernels.rope import angle_tables, rotate
from lowrank_cache.probe import cache_argument, decoder_of, inner_model, input_device, model_shape, probe_states
from lowrank_cache.projections import Projections
from lowrank_cache.shapes import SIDES, Group, ModelShape, layer_groups, rope_buffer

Recorded = dict[str, dict[int, Tensor]]  # by side and layer


class NoGradientError(RuntimeError):
    """Gradients do not reach what a model caches; ``sensitivity="query"`` needs none."""


def collect_moments(
    model: PreTrainedModel,
    batches: Iterable,
    groups: dict[str, list[Group]],
    *,
    sensitivity: str = "gradient",
    compressed_by: Projections | None = None,
    progress: Callable[[int], object] = lambda tokens: None,
) -> Moments:
    """Run ``batches`` through ``model`` and sum up what its cache would hold.

    Args:
        model, batches, sensitivity: See ``calibrate``. The model is left as it was.
        groups: From ``layer_groups``, under ``"key"`` and ``"value"`` or under ``"both"``.
        compressed_by: What the states that layers attend to are compressed by, see ``Recorder``. Sensitivities
            are then not collected.
        progress: Called with the number of tokens of each finished batch.

    Raises:
        NoGradientError: If gradients do not reach the cached states.
        ValueError: If there is not one usable token, or states or gradients are not finite.
    """
    if sensitivity not in ("gradient", "query"):
        raise ValueError(f"sensitivity must be 'gradient' or 'query', got {sensitivity!r}")
    moments = Moments(model_shape(model), groups, sensitivity_kind=sensitivity, probe=probe_states(model))
    queries = QuerySensitivity() if sensitivity == "query" and compressed_by is None else None
    # In inference mode nothing is differentiated.
    looked_at = False
    with torch.inference_mode(False), _prepared(model, differentiable=queries is None and compressed_by is None):
        for input_ids, attention_mask in _tensors(batches, model):
            if not looked_at:
                _warn_of_padding(model, input_ids, attention_mask)
                _warn_of_opening(model, input_ids, attention_mask)
                looked_at = True
            _add_batch(moments, model, input_ids, attention_mask, queries, compressed_by)
            progress(input_ids.numel())
    if moments.tokens == 0:
        raise ValueError(
            f"batches held no usable token: each sequence's first {SKIPPED_TOKENS} real tokens are skipped as sinks"
        )
    if queries is not None:
        queries.finish(moments)
    return moments


def refit_values(
    model: PreTrainedModel,
    batches: Iterable,
    moments: Moments,
    projections: Projections,
    ratio: float,
    progress: Callable[[int], object] = lambda tokens: None,
) -> Moments:
    """Moments of what ``model`` caches when it attends to states compressed by ``projections`` at ``ratio``.

    ``moments`` are of the model as it is, from the same batches: their sensitivities are taken over. ``projections``
    are of groups of one layer; ``ratio`` is that at 16 bits.
    """
    groups = {side: layer_groups(moments.shape, side, 1) for side in SIDES}
    compressed_by = projections.truncate(ratio)
    refitted = collect_moments(model, batches, groups, compressed_by=compressed_by, progress=progress)
    refitted.sensitivity = {
        key: total * (refitted.tokens / moments.tokens) for key, total in moments.sensitivity.items()
    }
    refitted.sensitivity_kind = moments.sensitivity_kind
    return refitted


class Recorder(DynamicCache):
    """A cache for one forward that keeps what compressible layers were given, and passes it on.

    ``compressed_by`` are bases of groups of one layer: layers attend to what 16-bit latents of the states are read back
    as, but for sinks and padding, which pass exactly, as in a cache. None: they attend to the states.
    """

    def __init__(
        self, model: PreTrainedModel, shape: ModelShape, tokens: UsableTokens, compressed_by: Projections | None = None
    ):
        super().__init__(config=model.config.get_text_config(decoder=True))
        self.shape = shape
        self.tokens = tokens
        self.compressed_by = compressed_by
        self.decoder = decoder_of(model)
        self.recorded = {layer.layer_idx for layer in shape.layers}
        self.states: Recorded = {side: {} for side in SIDES}
        self.gradients: Recorded = {side: {} for side in SIDES}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if layer_idx in self.recorded:
            for side, tensor in zip(SIDES, (key_states, value_states), strict=True):
                self.states[side][layer_idx] = tensor.detach()
                if tensor.requires_grad:
                    tensor.register_hook(partial(_keep, self.gradients[side], layer_idx))
            if self.compressed_by is not None:
                key_states = self._read_back("key", layer_idx, key_states, self.compressed_by)
                value_states = self._read_back("value", layer_idx, value_states, self.compressed_by)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @without_autocast
    def _read_back(self, side: str, layer_idx: int, states: Tensor, by: Projections) -> Tensor:
        """``states`` ``[batch, heads, tokens, head_dim]``, post-RoPE, as the bases read them back."""
        rope, framed = self.shape.layer(layer_idx).side(side).rope, states.float()
        if rope is not None:
            frames = self.tokens.positions - self.tokens.positions % by.frame_length
            inv_freq = rope_buffer(self.decoder, rope.source).detach().float()
            cos, sin = (table[:, None] for table in angle_tables(frames.to(states.device), inv_freq))
            framed = rotate(framed, cos, sin, rope.layout, inverse=True)
        read = torch.empty_like(framed)
        for basis in by.bases:
            if (basis.side, basis.layers) == (side, (layer_idx,)):
                heads = list(basis.heads)
                parts = (basis.down_proj, basis.up_proj, basis.constant)
                down, up, constant = (part.to(states.device) for part in parts)
                rows = framed[:, heads].transpose(1, 2).flatten(2) @ down @ up + constant
                read[:, heads] = rows.unflatten(2, (len(heads), -1)).transpose(1, 2)
        if rope is not None:
            read = rotate(read, cos, sin, rope.layout)
        usable = self.tokens.usable.to(states.device)[:, None, :, None]
        return torch.where(usable, read.to(states.dtype), states)


def _keep(gradients: dict[int, Tensor], layer_idx: int, gradient: Tensor | None) -> None:
    # Gets the dict alone: a reference to the recorder, whose layers hold the graph that holds this
    # hook, would be a cycle that Python cannot collect, and every batch's activations would stay.
    # None: an operation on the way has no derivative (bitsandbytes' 4-bit product on some CPUs).
    if gradient is not None:
        gradients[layer_idx] = gradient.detach()


def _add_batch(
    moments: Moments,
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    queries: QuerySensitivity | None,
    compressed_by: Projections | None,
) -> None:
    """Add one batch to the sums; its recorder is local, so that it is gone before the next batch."""
    tokens = UsableTokens.of(attention_mask)
    recorder = Recorder(model, moments.shape, tokens, compressed_by)
    differentiable = queries is None and compressed_by is None
    watching: AbstractContextManager[dict] = nullcontext({}) if queries is None else record_queries(model)
    with torch.set_grad_enabled(differentiable), watching as seen:
        output = inner_model(model)(  # without virtual tokens of a wrapper
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=tokens.positions,
            **cache_argument(model, recorder),
            use_cache=True,
            output_hidden_states=queries is not None,
        )
        loss = _add_loss(moments, output.logits, input_ids, attention_mask)
    hidden_states = output.hidden_states
    del output  # its logits
    for layer in moments.shape.layers:  # frequencies as this forward used them: dynamic ones change with its length
        for rope in (layer.key.rope, layer.value.rope):
            if rope is not None:
                moments.inv_freq[rope.source] = rope_buffer(recorder.decoder, rope.source).detach().double().cpu()
    if queries is not None:
        queries.add(moments, tokens, seen, hidden_states)
    if differentiable:
        _differentiate(loss, recorder, model)
    moments.add(_rows(moments, recorder.states, tokens), _rows(moments, recorder.gradients, tokens))


def _special(model: PreTrainedModel, name: str) -> int | None:
    """``pad_token_id`` and such of a model, as its config or its generation config tells it."""
    configs = model.config.get_text_config(decoder=True), getattr(model, "generation_config", None)
    found = next((one for config in configs if (one := getattr(config, name, None)) is not None), None)
    return found if isinstance(found, int) else None


def _warn_of_padding(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> None:
    """Say so if a batch looks padded and no mask says so: its pads would be calibrated on as text."""
    pad = _special(model, "pad_token_id")
    if pad is None or not bool(attention_mask.all()) or input_ids.shape[1] < 2:
        return
    padded = (input_ids[:, :2] == pad).all(1) | (input_ids[:, -2:] == pad).all(1)
    if bool(padded.any()):
        warnings.warn(
            f"batches: {int(padded.sum())} of the first {len(input_ids)} sequences begin or end with pads (id {pad}), "
            "which no attention_mask hides, so they are calibrated on as text; pass mappings with input_ids and "
            "attention_mask",
            stacklevel=4,
        )


# How much worse the loss must be without the opening token: Gemma 3 270M loses 15%, others gain or lose 2%.
_OPENING_MATTERS = 1.05


def _warn_of_opening(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> None:
    """Say so if sequences lack a ``<bos>`` and the first of them is predicted better with it: two forwards of it."""
    bos = _special(model, "bos_token_id")
    first = input_ids[:1][attention_mask[:1].bool()][None]
    if bos is None or first.shape[1] < 8 or bool((first == bos).any()):
        return
    losses, targets = [], first[0, 4:]
    for ids in (first, torch.cat([torch.full_like(first[:, :1], bos), first], dim=1)):
        with torch.no_grad():
            logits = inner_model(model)(input_ids=ids, use_cache=False).logits[0, -len(targets) - 1 : -1].float()
        losses.append(float(nn.functional.cross_entropy(logits, targets.to(logits.device))))
    without, with_it = losses
    if without > _OPENING_MATTERS * with_it:
        warnings.warn(
            f"batches: sequences do not begin with <bos> (id {bos}), and this model then predicts the first of them "
            f"worse, with a loss of {without:.2f} instead of {with_it:.2f}; put it before each, as "
            "calibration.text.mixed_batches does",
            stacklevel=4,
        )


def _add_loss(moments: Moments, logits: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The summed next-token loss of a batch, counted in ``moments``."""
    both_real = attention_mask[:, :-1].bool() & attention_mask[:, 1:].bool()
    labels = torch.where(both_real, input_ids[:, 1:], -100).flatten().to(logits.device)
    predictions = logits[:, :-1].float().flatten(0, 1)
    loss = nn.functional.cross_entropy(predictions, labels, ignore_index=-100, reduction="sum")
    if not bool(torch.isfinite(loss)):
        raise ValueError(f"the loss on a calibration batch must be finite, got {loss.item()}")
    moments.loss += loss.item()
    moments.predicted += int(both_real.sum())
    moments.sequences += input_ids.shape[0]
    return loss


def _differentiate(loss: Tensor, recorder: Recorder, model: PreTrainedModel) -> None:
    """Put the gradients of ``loss`` at all recorded states into ``recorder``."""
    try:
        loss.backward()
    except (RuntimeError, NotImplementedError) as error:
        raise NoGradientError(
            f"gradients do not pass through {type(model).__name__} ({error}); calibrate with sensitivity='query'"
        ) from error
    for side in SIDES:
        missing = sorted(set(recorder.states[side]) - set(recorder.gradients[side]))
        if missing:
            raise NoGradientError(
                f"no gradient reached the {side} states of layers {missing}; calibrate with sensitivity='query'"
            )


def _rows(moments: Moments, recorded: Recorded, tokens: UsableTokens) -> Recorded:
    """Per side and layer, ``[usable tokens, layer_width]`` pre-RoPE, taken out of ``recorded``."""
    rows: Recorded = {side: {} for side in SIDES}
    for layer in moments.shape.layers:
        for side in SIDES:
            if layer.layer_idx in recorded[side]:
                states = recorded[side].pop(layer.layer_idx)
                kept = tokens.rows(states, layer.side(side).rope, moments.inv_freq)
                if not bool(torch.isfinite(kept).all()):
                    raise ValueError(
                        f"{side} states or gradients of layer {layer.layer_idx} must be finite, got NaN or infinity"
                    )
                rows[side][layer.layer_idx] = kept
    return rows


@contextmanager
def _prepared(model: PreTrainedModel, differentiable: bool):
    """Eval mode; if asked, gradients from the embeddings on and none for parameters; undone at the end."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()] if differentiable else []
    was_training = model.training
    hook: AbstractContextManager = nullcontext()
    if differentiable:
        embed = model.get_input_embeddings()
        # A copy: models that change embeddings in place may not change what gradients begin at.
        hook = embed.register_forward_hook(lambda module, inputs, output: output.detach().requires_grad_(True).clone())
    model.eval()
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        with hook:
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        model.train(was_training)


def _tensors(batches: Iterable, model: PreTrainedModel):
    """Input ids and attention mask of every batch, on the device that the model takes them on."""
    if isinstance(batches, str | bytes):
        raise TypeError(
            "batches must be an iterable of token ids, got a string; tokenize it with the model's tokenizer"
        )
    device = input_device(model)
    for index, batch in enumerate(batches):
        if isinstance(batch, str | bytes) or (isinstance(batch, list | tuple) and batch and isinstance(batch[0], str)):
            raise TypeError(
                f"batches[{index}] holds text; tokenize it first, e.g. tokenizer(text, return_tensors='pt')"
            )
        mask = None
        if isinstance(batch, Mapping):
            batch, mask = batch["input_ids"], batch.get("attention_mask")
        if not isinstance(batch, Tensor) or batch.dim() != 2 or batch.is_floating_point():
            shape = list(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise TypeError(f"batches[{index}] must be a LongTensor [batch, tokens], got {shape}")
        mask = torch.ones_like(batch) if mask is None else mask
        yield tuple(part.clone() if part.is_inference() else part for part in (batch.to(device), mask.to(device)))
