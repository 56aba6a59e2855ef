"""Second moments and sensitivities of what a model caches, from forward and backward passes.

For every compressible layer and side, over calibration tokens: the second moment ``C = E[x xᵀ]`` of
the states (keys pre-RoPE), jointly over each layer group; their mean; and the sensitivity
``F = E[g gᵀ]`` with ``g`` the gradient of the summed next-token loss at ``x``, per layer. Nothing
but these sums is kept. Mathematics: docs/method.md, "Calibration".
"""

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from lowrank_cache.atomic import write_files
from lowrank_cache.cache_argument import cache_argument
from lowrank_cache.calibration.query_sensitivity import QueryStatistics, record_queries
from lowrank_cache.kernels.rope import angle_tables, rotate
from lowrank_cache.models import (
    SIDES,
    Group,
    ModelShape,
    RopeShape,
    SideShape,
    decoder_of,
    input_device,
    model_shape,
    rope_buffer,
)

__all__ = ["Moments", "NoGradientError", "Recorder", "collect_moments", "positions_of", "usable_tokens"]

SKIPPED_TOKENS = 4  # a sequence's first real tokens are attention sinks with outlier keys; the cache keeps them exact
_COUNTS = ("tokens", "sequences", "loss", "predicted", "sensitivity_kind")


class NoGradientError(RuntimeError):
    """Gradients do not reach what a model caches; ``sensitivity="query"`` needs none."""


@dataclass
class Moments:
    """Sums over ``tokens`` calibration tokens, float64 on CPU.

    Attributes:
        shape: The model.
        groups: The layer groups of each recorded side; under ``"both"`` keys and values are recorded jointly.
        second: ``[width, width]`` per (side, group): sum of ``x xᵀ``, in the order of ``ModelShape.members``.
        total: ``[width]`` per (side, group): sum of ``x``.
        sensitivity: ``[layer_width, layer_width]`` per (side, layer): sum of ``g gᵀ``.
        inv_freq: Inverse frequencies per rope source.
        loss: Summed next-token loss over ``predicted`` tokens, in nats.
        sensitivity_kind: ``"gradient"`` or ``"query"``.
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
    sensitivity_kind: str = "gradient"

    def add(self, states: dict[str, dict[int, Tensor]], gradients: dict[str, dict[int, Tensor]]) -> None:
        """Add the tokens of one batch: per side and layer ``[tokens, layer_width]``, pre-RoPE."""
        for side, groups in self.groups.items():
            for group in groups:
                members = self.shape.members(side, group)
                rows = torch.cat([states[name][layer] for layer, name, _ in members], dim=1).float()
                key = (side, group)
                self.second[key] = _add(self.second.get(key), rows.T @ rows)
                self.total[key] = _add(self.total.get(key), rows.sum(0))
        for side in SIDES:
            for layer, rows in gradients[side].items():
                rows = rows.float()
                self.sensitivity[side, layer] = _add(self.sensitivity.get((side, layer)), rows.T @ rows)
        self.tokens += next(iter(states["key"].values())).shape[0]

    def of_group(self, side: str, group: Group, frame_length: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Second moment, mean and block-diagonal sensitivity of a group, averaged over a rotary frame.

        Returns:
            ``[width, width]``, ``[width]``, ``[width, width]``, float64.
        """
        rows, recorded = self.rows_of(side, group)
        second = self.second[recorded][rows][:, rows] / self.tokens
        mean = self.total[recorded][rows] / self.tokens
        members = self.shape.members(side, group)
        sensitivity = torch.block_diag(*(self.sensitivity[name, layer] / self.tokens for layer, name, _ in members))
        if frame_length > 1:
            shapes = [shape for _, _, shape in members]
            second = _frame_average(second, shapes, self.inv_freq, frame_length)
            sensitivity = _frame_average(sensitivity, shapes, self.inv_freq, frame_length)
            mean = _frame_average(mean[:, None], shapes, self.inv_freq, frame_length)[:, 0]
        return second, mean, sensitivity

    def rows_of(self, side: str, group: Group) -> tuple[Tensor, tuple[str, Group]]:
        """Where ``group`` lies inside a recorded group that holds it: row numbers, and that group's key."""
        wanted = [(layer, name) for layer, name, _ in self.shape.members(side, group)]
        for recorded_side, groups in self.groups.items():
            for recorded in groups:
                places, start = {}, 0
                for layer, name, shape in self.shape.members(recorded_side, recorded):
                    places[layer, name] = torch.arange(start, start + shape.width)
                    start += shape.width
                if set(wanted) <= set(places):
                    return torch.cat([places[member] for member in wanted]), (recorded_side, recorded)
        raise ValueError(
            f"{side} layers {group} were not recorded jointly; these moments hold the groups {self.groups}"
        )

    def side(self, side: str, group: Group) -> SideShape:
        return self.shape.layer(group[0]).side(side)

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file, so that groups and frames can change without another pass.

        Raises:
            OSError: If it cannot be written; a file that was there stays as it was.
        """
        tensors = {f"second.{side}.{group[0]}": sums for (side, group), sums in self.second.items()}
        tensors |= {f"total.{side}.{group[0]}": sums for (side, group), sums in self.total.items()}
        tensors |= {f"sensitivity.{side}.{layer}": sums for (side, layer), sums in self.sensitivity.items()}
        tensors |= {f"inv_freq.{source}": table.contiguous() for source, table in self.inv_freq.items()}
        header = {
            "shape": self.shape.to_dict(),
            "groups": self.groups,
            **{name: getattr(self, name) for name in _COUNTS},
        }
        metadata = {"moments": json.dumps(header)}
        try:
            write_files({Path(path): lambda part: save_file(tensors, part, metadata=metadata)})
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> "Moments":
        """Read what ``save`` wrote.

        Raises:
            ValueError: If the file is damaged or holds something else.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                header = json.loads(file.metadata()["moments"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            groups = {side: [tuple(group) for group in recorded] for side, recorded in header["groups"].items()}
            moments = cls(ModelShape.from_dict(header["shape"]), groups, **{name: header[name] for name in _COUNTS})
            for side, recorded in groups.items():
                for group in recorded:
                    moments.second[side, group] = tensors.pop(f"second.{side}.{group[0]}")
                    moments.total[side, group] = tensors.pop(f"total.{side}.{group[0]}")
            for layer in moments.shape.layers:
                for side in SIDES:
                    name = f"sensitivity.{side}.{layer.layer_idx}"
                    moments.sensitivity[side, layer.layer_idx] = tensors.pop(name)
            moments.inv_freq = {name.removeprefix("inv_freq."): table for name, table in tensors.items()}
        except (
            KeyError,
            TypeError,
            ValueError,
            IndexError,
            AttributeError,
            OverflowError,
            RecursionError,
            SafetensorError,
        ) as error:
            raise ValueError(f"{path} holds no readable moments: {type(error).__name__}: {error}") from error
        return moments


def collect_moments(
    model: PreTrainedModel,
    batches: Iterable,
    groups: dict[str, list[Group]],
    *,
    sensitivity: str = "gradient",
    make_recorder: Callable[[PreTrainedModel, ModelShape, Tensor], "Recorder"] | None = None,
    progress=None,
) -> Moments:
    """Run ``batches`` through ``model`` and sum up what its cache would hold.

    Args:
        model: Left as it was: parameters, ``requires_grad`` flags, mode.
        batches: LongTensors ``[batch, tokens]`` or mappings with ``input_ids`` and ``attention_mask``.
        groups: From ``layer_groups``, under ``"key"`` and ``"value"`` or under ``"both"``.
        sensitivity: ``"gradient"`` runs a backward pass per batch; ``"query"`` needs none, see
            ``query_sensitivity``.
        make_recorder: What stands in for the cache instead of ``Recorder``, made for each batch. Sensitivities
            are then not collected.
        progress: Called with the number of tokens of each finished batch.

    Raises:
        NoGradientError: If gradients do not reach the cached states.
        ValueError: If there is not one usable token, or states or gradients are not finite.
    """
    if sensitivity not in ("gradient", "query"):
        raise ValueError(f"sensitivity must be 'gradient' or 'query', got {sensitivity!r}")
    shape = model_shape(model)
    moments = Moments(shape, groups, sensitivity_kind=sensitivity)
    statistics = QueryStatistics() if sensitivity == "query" and make_recorder is None else None
    longest = 0
    with _prepared(model, differentiable=statistics is None and make_recorder is None):
        for input_ids, attention_mask in _tensors(batches, model):
            if make_recorder is not None:
                recorder = make_recorder(model, shape, attention_mask)
                with torch.no_grad():
                    _forward(moments, model, recorder, input_ids, attention_mask)
                moments.add(_usable_rows(moments, recorder.states, attention_mask), {side: {} for side in SIDES})
            elif statistics is None:
                _add_batch(moments, model, input_ids, attention_mask)
            else:
                _add_batch_without_gradients(moments, statistics, model, input_ids, attention_mask)
            longest = max(longest, input_ids.shape[1])
            if progress is not None:
                progress(input_ids.numel())
    if moments.tokens == 0:
        raise ValueError(
            f"batches held no usable token: each sequence's first {SKIPPED_TOKENS} real tokens are skipped as sinks"
        )
    if statistics is not None:
        _finish_query_sensitivity(moments, statistics, longest)
    return moments


class Recorder(DynamicCache):
    """Passes states on and keeps, for one forward, what compressible layers were given.

    Args:
        model: Whose forward it is.
        shape: Its shape.
        attention_mask: ``[batch, tokens]`` of that forward.
    """

    def __init__(self, model: PreTrainedModel, shape: ModelShape, attention_mask: Tensor):
        super().__init__(config=model.config.get_text_config(decoder=True))
        self.shape = shape
        self.attention_mask = attention_mask
        self.recorded = {layer.layer_idx for layer in shape.layers}
        self.states: dict[str, dict[int, Tensor]] = {side: {} for side in SIDES}
        self.gradients: dict[str, dict[int, Tensor]] = {side: {} for side in SIDES}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if layer_idx in self.recorded:
            for side, tensor in zip(SIDES, (key_states, value_states), strict=True):
                self.states[side][layer_idx] = tensor.detach()
                if tensor.requires_grad:
                    tensor.register_hook(_keeper(self.gradients[side], layer_idx))
            key_states = self.pass_on("key", layer_idx, key_states)
            value_states = self.pass_on("value", layer_idx, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def pass_on(self, side: str, layer_idx: int, states: Tensor) -> Tensor:
        """What attention reads for ``states``: themselves."""
        return states


def _keeper(gradients: dict[int, Tensor], layer_idx: int):
    # Refers to the dict alone: a reference to the recorder, whose layers hold the graph that holds this
    # hook, would be a cycle that Python cannot collect, and every batch's activations would stay.
    def keep(gradient: Tensor | None) -> None:
        # None: an operation on the way has no derivative (bitsandbytes' 4-bit product on some CPUs).
        if gradient is not None:
            gradients[layer_idx] = gradient.detach()

    return keep


def _add_batch(moments: Moments, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> None:
    """Forward and backward over one batch, then its rows into the sums."""
    recorder = Recorder(model, moments.shape, attention_mask)
    with torch.enable_grad():
        loss = _forward(moments, model, recorder, input_ids, attention_mask)
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
    states = _usable_rows(moments, recorder.states, attention_mask)
    moments.add(states, _usable_rows(moments, recorder.gradients, attention_mask))


def _add_batch_without_gradients(
    moments: Moments, statistics: QueryStatistics, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor
) -> None:
    """Forward over one batch: states, queries and residual norms into the sums."""
    recorder = Recorder(model, moments.shape, attention_mask)
    seen: dict[int, tuple] = {}
    hidden: list[Tensor] = []
    with torch.no_grad(), record_queries(model, seen):
        _forward(moments, model, recorder, input_ids, attention_mask, hidden)
    usable = usable_tokens(attention_mask)
    for layer in moments.shape.layers:
        index, rope = layer.layer_idx, layer.key.rope
        if index not in seen or seen[index][0].shape[3] != layer.key.head_dim:
            raise NotImplementedError(
                f"sensitivity='query' needs layer {index} to attend with queries of its keys' head_dim "
                f"{layer.key.head_dim} through transformers' attention interface; calibrate with sensitivity='gradient'"
            )
        queries, statistics.modules[index], statistics.scaling[index] = seen.pop(index)
        rows = _rows(queries, positions_of(attention_mask), usable, rope, moments.inv_freq)
        statistics.add_queries(index, rows.unflatten(1, (-1, layer.key.head_dim)), layer.key.heads)
        norms = hidden[index + 1].float().square().sum(-1)[usable.to(hidden[index + 1].device)]
        statistics.residual[index] = statistics.residual.get(index, 0.0) + norms.sum().item()
    states = _usable_rows(moments, recorder.states, attention_mask)
    statistics.tokens += next(iter(states["key"].values())).shape[0]
    moments.add(states, {side: {} for side in SIDES})


def _finish_query_sensitivity(moments: Moments, statistics: QueryStatistics, context: int) -> None:
    for layer in moments.shape.layers:
        index = layer.layer_idx
        value = statistics.value_sensitivity(index, layer.value.heads, layer.value.head_dim)
        rows, recorded = moments.rows_of("value", (index,))
        mean = moments.total[recorded][rows] / moments.tokens
        spread = moments.second[recorded][rows][:, rows] / moments.tokens - torch.outer(mean, mean)
        queries_per_head = int(statistics.modules[index].num_key_value_groups)  # type: ignore[arg-type]  # nn.Module
        residual = statistics.mean_residual(index)
        value_spread = float((value * spread).sum()) * residual / (layer.key.heads * queries_per_head)
        inv_freq = moments.inv_freq[layer.key.rope.source] if layer.key.rope else None
        key = statistics.key_sensitivity(index, layer.key.rope, inv_freq, context, value_spread)
        moments.sensitivity["value", index] = value * moments.tokens
        moments.sensitivity["key", index] = key * moments.tokens


def _forward(moments, model, recorder, input_ids: Tensor, attention_mask: Tensor, hidden: list | None = None) -> Tensor:
    """One forward; returns the summed next-token loss and adds it, and the rotary tables, to ``moments``."""
    output = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions_of(attention_mask),
        **cache_argument(model, recorder),
        use_cache=True,
        output_hidden_states=hidden is not None,
    )
    if hidden is not None:
        hidden.extend(output.hidden_states)
    both_real = attention_mask[:, :-1].bool() & attention_mask[:, 1:].bool()
    labels = torch.where(both_real, input_ids[:, 1:], -100).flatten().to(output.logits.device)
    predictions = output.logits[:, :-1].float().flatten(0, 1)
    loss = nn.functional.cross_entropy(predictions, labels, ignore_index=-100, reduction="sum")
    if not bool(torch.isfinite(loss)):
        raise ValueError(f"the loss on a calibration batch must be finite, got {loss.item()}")
    moments.loss += loss.item()
    moments.predicted += int(both_real.sum())
    moments.sequences += input_ids.shape[0]
    decoder = decoder_of(model)
    for layer in moments.shape.layers:
        for rope in (layer.key.rope, layer.value.rope):
            if rope is not None:
                moments.inv_freq[rope.source] = rope_buffer(decoder, rope.source).detach().double().cpu()
    return loss


def positions_of(attention_mask: Tensor) -> Tensor:
    """``[batch, tokens]``: how many real tokens stand before each; 0 for leading padding."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def usable_tokens(attention_mask: Tensor) -> Tensor:
    """``[batch, tokens]`` bool: real tokens that are not sinks."""
    return attention_mask.bool() & (attention_mask.long().cumsum(1) > SKIPPED_TOKENS)


def _usable_rows(moments: Moments, recorded: dict[str, dict[int, Tensor]], attention_mask: Tensor) -> dict:
    """Per side and layer, ``[usable tokens, layer_width]`` pre-RoPE, taken out of ``recorded``."""
    positions, usable = positions_of(attention_mask), usable_tokens(attention_mask)
    rows: dict[str, dict[int, Tensor]] = {side: {} for side in SIDES}
    for layer in moments.shape.layers:
        for side in SIDES:
            states, rope = recorded[side].pop(layer.layer_idx), layer.side(side).rope
            kept = _rows(states, positions, usable, rope, moments.inv_freq)
            if not bool(torch.isfinite(kept).all()):
                raise ValueError(
                    f"{side} states or gradients of layer {layer.layer_idx} must be finite, got NaN or infinity"
                )
            rows[side][layer.layer_idx] = kept
    return rows


def _rows(states: Tensor, positions: Tensor, usable: Tensor, rope: RopeShape | None, inv_freq: dict) -> Tensor:
    """``[batch, heads, tokens, head_dim]`` post-RoPE → ``[usable tokens, heads * head_dim]`` pre-RoPE."""
    states = states.float()
    if rope is not None:
        cos, sin = angle_tables(positions.to(states.device), inv_freq[rope.source].float())
        states = rotate(states, cos[:, None], sin[:, None], rope.layout, inverse=True)
    return states.transpose(1, 2).flatten(2)[usable.to(states.device)]


@contextmanager
def _prepared(model: PreTrainedModel, differentiable: bool):
    """Eval mode; if asked, gradients from the embeddings on and none for parameters; undone at the end."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()] if differentiable else []
    was_training = model.training
    hooks = []
    if differentiable:
        hooks.append(model.get_input_embeddings().register_forward_hook(_require_gradient))
    model.eval()
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        model.train(was_training)


def _require_gradient(module: nn.Module, inputs, output: Tensor) -> Tensor:
    return output.detach().requires_grad_(True)


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
        yield batch.to(device), mask.to(device)


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    part = part.double().cpu()
    return part if total is None else total.add_(part)


def _frame_average(matrix: Tensor, shapes: list[SideShape], inv_freq: dict[str, Tensor], frame_length: int) -> Tensor:
    """Mean over offsets ``o`` in a frame of ``R(o) matrix R(o)ᵀ``; of ``R(o) matrix`` for one column.

    ``R(o)`` rotates the rows that belong to sides with a rotary embedding, see ``shapes``.
    """
    average = torch.zeros_like(matrix)
    for offset in range(frame_length):
        rotated = _rotate_columns(matrix.T, shapes, inv_freq, offset).T
        average += _rotate_columns(rotated, shapes, inv_freq, offset) if matrix.shape[1] > 1 else rotated
    return average / frame_length


def _rotate_columns(matrix: Tensor, shapes: list[SideShape], inv_freq: dict[str, Tensor], offset: int) -> Tensor:
    """``matrix R(o)ᵀ``: every row of ``matrix`` is a state of all members."""
    parts = []
    for shape, part in zip(shapes, matrix.split([shape.width for shape in shapes], dim=1), strict=True):
        if shape.rope is not None:
            cos, sin = angle_tables(torch.tensor(offset), inv_freq[shape.rope.source])
            part = rotate(part.unflatten(1, (-1, shape.head_dim)), cos, sin, shape.rope.layout).flatten(1)
        parts.append(part)
    return torch.cat(parts, dim=1)
