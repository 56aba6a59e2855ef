"""Second moments and sensitivities of what a model caches, from forward and backward passes.

For every compressible layer and side, over calibration tokens: the second moment ``C = E[x xᵀ]`` of
the states (keys pre-RoPE), jointly over each layer group; their mean; and the sensitivity
``F = E[g gᵀ]`` with ``g`` the gradient of the summed next-token loss at ``x``, per layer. Nothing
but these sums is kept. Mathematics: docs/method.md, "Calibration".
"""

from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from lowrank_cache.kernels.rope import angle_tables, rotate
from lowrank_cache.models import SIDES, ModelShape, RopeShape, SideShape, decoder_of, model_shape, rope_buffer

__all__ = ["Group", "Moments", "collect_moments", "layer_groups"]

SKIPPED_TOKENS = 4  # a sequence's first real tokens are attention sinks with outlier keys; the cache keeps them exact
Group = tuple[int, ...]  # adjacent compressible layers


@dataclass
class Moments:
    """Sums over ``tokens`` calibration tokens, float64 on CPU.

    Attributes:
        shape: The model.
        groups: Per side, the layer groups.
        second: ``[width, width]`` per (side, group): sum of ``x xᵀ``, width over the group's layers.
        total: ``[width]`` per (side, group): sum of ``x``.
        sensitivity: ``[layer_width, layer_width]`` per (side, layer): sum of ``g gᵀ``.
        inv_freq: Inverse frequencies per rope source.
        loss: Summed next-token loss over ``predicted`` tokens, in nats.
    """

    shape: ModelShape
    groups: dict[str, list[Group]]
    second: dict[tuple[str, Group], Tensor] = field(default_factory=dict)
    total: dict[tuple[str, Group], Tensor] = field(default_factory=dict)
    sensitivity: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    inv_freq: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0
    sequences: int = 0
    loss: float = 0.0
    predicted: int = 0

    def add(self, states: dict[str, dict[int, Tensor]], gradients: dict[str, dict[int, Tensor]]) -> None:
        """Add the tokens of one batch: per side and layer ``[tokens, layer_width]``, pre-RoPE."""
        for side in SIDES:
            for group in self.groups[side]:
                rows = torch.cat([states[side][layer] for layer in group], dim=1).float()
                key = (side, group)
                self.second[key] = _add(self.second.get(key), rows.T @ rows)
                self.total[key] = _add(self.total.get(key), rows.sum(0))
            for layer, rows in gradients[side].items():
                rows = rows.float()
                self.sensitivity[side, layer] = _add(self.sensitivity.get((side, layer)), rows.T @ rows)
        self.tokens += next(iter(states["key"].values())).shape[0]

    def of_group(self, side: str, group: Group, frame_length: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Second moment, mean and block-diagonal sensitivity of a group, averaged over a rotary frame.

        Returns:
            ``[width, width]``, ``[width]``, ``[width, width]``, float64.
        """
        second = self.second[side, group] / self.tokens
        mean = self.total[side, group] / self.tokens
        blocks = [self.sensitivity[side, layer] / self.tokens for layer in group]
        sensitivity = torch.block_diag(*blocks)
        rope = self.side(side, group).rope
        if rope is not None and frame_length > 1:
            inv_freq = self.inv_freq[rope.source]
            head_dim = self.side(side, group).head_dim
            second = _frame_average(second, head_dim, rope, inv_freq, frame_length)
            sensitivity = _frame_average(sensitivity, head_dim, rope, inv_freq, frame_length)
            mean = _frame_average(mean[:, None], head_dim, rope, inv_freq, frame_length)[:, 0]
        return second, mean, sensitivity

    def side(self, side: str, group: Group) -> SideShape:
        return self.shape.layer(group[0]).side(side)


def layer_groups(shape: ModelShape, side: str, size: int) -> list[Group]:
    """Cut the compressible layers into groups of ``size`` adjacent ones; the last may be shorter.

    A group never mixes layers whose states differ in heads, head_dim or rope.
    """
    groups: list[list[int]] = []
    for layer in shape.layers:
        alike = groups and shape.layer(groups[-1][0]).side(side) == layer.side(side)
        if alike and len(groups[-1]) < size:
            groups[-1].append(layer.layer_idx)
        else:
            groups.append([layer.layer_idx])
    return [tuple(group) for group in groups]


def collect_moments(
    model: PreTrainedModel, batches: Iterable, groups: dict[str, list[Group]], *, progress=None
) -> Moments:
    """Run ``batches`` through ``model``, forward and backward, and sum up what its cache would hold.

    Args:
        model: Left as it was: parameters, ``requires_grad`` flags, mode.
        batches: LongTensors ``[batch, tokens]`` or mappings with ``input_ids`` and ``attention_mask``.
        groups: Per side, from ``layer_groups``.
        progress: Called with the number of tokens of each finished batch.

    Raises:
        RuntimeError: If gradients do not reach the cached states.
        ValueError: If there is not one usable token, or states or gradients are not finite.
    """
    shape = model_shape(model)
    decoder = decoder_of(model)
    moments = Moments(shape, groups)
    ropes = {side.rope for layer in shape.layers for side in (layer.key, layer.value)} - {None}
    with _differentiable_inputs(model):
        for input_ids, attention_mask in _tensors(batches, model):
            _add_batch(moments, model, decoder, ropes, input_ids, attention_mask)
            if progress is not None:
                progress(input_ids.numel())
    if moments.tokens == 0:
        raise ValueError(
            f"batches held no usable token: each sequence's first {SKIPPED_TOKENS} real tokens are skipped as sinks"
        )
    return moments


class _Recorder(DynamicCache):
    """Passes states on and keeps, for one forward, what compressible layers were given."""

    def __init__(self, config, layers: set[int]):
        super().__init__(config=config)
        self.recorded = layers
        self.states: dict[str, dict[int, Tensor]] = {side: {} for side in SIDES}
        self.gradients: dict[str, dict[int, Tensor]] = {side: {} for side in SIDES}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if layer_idx in self.recorded:
            for side, tensor in zip(SIDES, (key_states, value_states), strict=True):
                self.states[side][layer_idx] = tensor.detach()
                if tensor.requires_grad:
                    tensor.register_hook(self._keeper(side, layer_idx))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _keeper(self, side: str, layer_idx: int):
        def keep(gradient: Tensor) -> None:
            self.gradients[side][layer_idx] = gradient.detach()

        return keep


def _add_batch(moments: Moments, model, decoder, ropes, input_ids: Tensor, attention_mask: Tensor) -> None:
    layers = {layer.layer_idx for layer in moments.shape.layers}
    recorder = _Recorder(model.config.get_text_config(decoder=True), layers)
    positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    with torch.enable_grad():
        logits = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=recorder,
            use_cache=True,
        ).logits
        both_real = attention_mask[:, :-1].bool() & attention_mask[:, 1:].bool()
        labels = torch.where(both_real, input_ids[:, 1:], -100)
        loss = nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels.flatten().to(logits.device), ignore_index=-100, reduction="sum"
        )
        try:
            loss.backward()
        except (RuntimeError, NotImplementedError) as error:
            raise RuntimeError(
                f"gradients do not pass through {type(model).__name__} ({error}); calibrate with sensitivity='query'"
            ) from error
    if not bool(torch.isfinite(loss)):
        raise ValueError(f"the loss on a calibration batch must be finite, got {float(loss)}")
    moments.loss += float(loss)
    moments.predicted += int(both_real.sum())
    moments.sequences += input_ids.shape[0]
    moments.inv_freq.update({rope.source: rope_buffer(decoder, rope.source).detach().double().cpu() for rope in ropes})
    usable = attention_mask.bool() & (attention_mask.long().cumsum(1) > SKIPPED_TOKENS)
    states: dict[str, dict[int, Tensor]] = {side: {} for side in SIDES}
    gradients: dict[str, dict[int, Tensor]] = {side: {} for side in SIDES}
    for layer in moments.shape.layers:
        for side in SIDES:
            index, rope = layer.layer_idx, layer.side(side).rope
            if index not in recorder.gradients[side]:
                raise RuntimeError(
                    f"no gradient reached the {side} states of layer {index}; calibrate with sensitivity='query'"
                )
            for source, kept in ((recorder.states, states), (recorder.gradients, gradients)):
                rows = _rows(source[side].pop(index), positions, usable, rope, moments.inv_freq)
                if not bool(torch.isfinite(rows).all()):
                    raise ValueError(f"{side} states or gradients of layer {index} must be finite, got NaN or infinity")
                kept[side][index] = rows
    moments.add(states, gradients)


def _rows(states: Tensor, positions: Tensor, usable: Tensor, rope: RopeShape | None, inv_freq: dict) -> Tensor:
    """``[batch, heads, tokens, head_dim]`` post-RoPE → ``[usable tokens, heads * head_dim]`` pre-RoPE."""
    states = states.float()
    if rope is not None:
        cos, sin = angle_tables(positions.to(states.device), inv_freq[rope.source].float())
        states = rotate(states, cos[:, None], sin[:, None], rope.layout, inverse=True)
    return states.transpose(1, 2).flatten(2)[usable.to(states.device)]


@contextmanager
def _differentiable_inputs(model: PreTrainedModel):
    """Let gradients flow from the embeddings on, without any for parameters; undone at the end."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    was_training = model.training

    def require_grad(module, inputs, output):
        return output.detach().requires_grad_(True)

    handle = model.get_input_embeddings().register_forward_hook(require_grad)
    model.eval()
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        model.train(was_training)


def _tensors(batches: Iterable, model: PreTrainedModel):
    """Input ids and attention mask of every batch, on the model's device."""
    if isinstance(batches, str | bytes):
        raise TypeError(
            "batches must be an iterable of token ids, got a string; tokenize it with the model's tokenizer"
        )
    device = model.get_input_embeddings().weight.device
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
        yield batch.to(device), mask.to(device)


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    part = part.double().cpu()
    return part if total is None else total.add_(part)


def _frame_average(matrix: Tensor, head_dim: int, rope: RopeShape, inv_freq: Tensor, frame_length: int) -> Tensor:
    """Mean over offsets ``o`` in a frame of ``R(o) matrix R(o)ᵀ``; of ``R(o) matrix`` for one column."""
    average = torch.zeros_like(matrix)
    for offset in range(frame_length):
        cos, sin = angle_tables(torch.tensor(offset), inv_freq)
        rotated = matrix
        for _ in range(2 if matrix.shape[1] > 1 else 1):
            rows = rotated.T.reshape(rotated.shape[1], -1, head_dim)
            rotated = rotate(rows, cos, sin, rope.layout).reshape(rotated.shape[1], -1)
        average += rotated if matrix.shape[1] > 1 else rotated.T
    return average / frame_length
