"""A sensitivity without gradients: what an error in a key or value does to the attention output.

For models through which autograd does not pass (some 4-bit weights). An error ``e`` of a key changes
its scores by ``qᵀ e``, so keys are weighted by the second moment of the queries, averaged over the
relative rotations of the context; an error of a value reaches the residual stream through the
output projection, so values are weighted by ``W_oᵀ W_o``. Both are put into one unit, the squared
error of the attention output relative to the residual stream. See docs/method.md, "Without gradients".
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lowrank_cache.calibration.moments import Moments, UsableTokens, rotation_average
from lowrank_cache.kernels.ambient import without_autocast
from lowrank_cache.probe import execution_device
from lowrank_cache.shapes import SideShape

_OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
Seen = tuple[Tensor, nn.Module, float]  # of a layer: queries, its attention module, the scaling of scores


class QuerySensitivity:
    """Sums over the queries and the residual stream of one model, per layer, and the sensitivities they give."""

    def __init__(self):
        self.modules: dict[int, nn.Module] = {}
        self.scaling: dict[int, float] = {}
        self.outer: dict[int, Tensor] = {}  # [kv_heads, head_dim, head_dim], sum of q qᵀ, pre-RoPE
        self.residual: dict[int, float] = {}  # sum of squared norms of the residual stream
        self.context = 0  # tokens of the longest sequence

    @without_autocast
    def add(
        self, moments: Moments, tokens: UsableTokens, seen: dict[int, Seen], hidden_states: tuple[Tensor, ...]
    ) -> None:
        """Add the usable tokens of one batch; ``moments.inv_freq`` are those of its forward.

        ``seen`` is what ``record_queries`` kept of the forward, and is emptied; NotImplementedError if a layer's
        queries are missing, or not of its keys' head_dim. ``hidden_states`` are the embeddings, then what each layer
        gave, ``[batch, tokens, hidden_size]``.
        """
        for layer in moments.shape.layers:
            index, head_dim = layer.layer_idx, layer.key.head_dim
            if index not in seen or seen[index][0].shape[3] != head_dim:
                raise NotImplementedError(
                    f"sensitivity='query' needs layer {index} to attend with queries of its keys' head_dim {head_dim} "
                    "through transformers' attention interface; calibrate with sensitivity='gradient'"
                )
            queries, self.modules[index], self.scaling[index] = seen.pop(index)
            rows = tokens.rows(queries, layer.key.rope, moments.inv_freq)
            grouped = rows.unflatten(1, (layer.key.heads, -1, head_dim))
            outer = torch.einsum("tgqd,tgqe->gde", grouped, grouped).double().cpu()
            self.outer[index] = self.outer.get(index, 0) + outer
            residual = hidden_states[index + 1]
            norms = residual.float().square().sum(-1)[tokens.usable.to(residual.device)]
            self.residual[index] = self.residual.get(index, 0.0) + norms.sum().item()
        self.context = max(self.context, tokens.usable.shape[1])

    @without_autocast
    def finish(self, moments: Moments) -> None:
        """Put the sensitivities of all keys and values into ``moments``, which hold the same tokens."""
        for layer in moments.shape.layers:
            index, module, rope = layer.layer_idx, self.modules[layer.layer_idx], layer.key.rope
            residual = self.residual[index] / moments.tokens
            value = torch.block_diag(*output_gram(module, layer.value.heads, layer.value.head_dim)) / residual
            rows, recorded = moments.rows_of("value", (index,))
            mean = moments.total[recorded][rows] / moments.tokens
            spread = moments.second[recorded][rows][:, rows] / moments.tokens - torch.outer(mean, mean)
            queries_per_head = int(module.num_key_value_groups)  # type: ignore[arg-type]  # nn.Module
            value_spread = float((value * spread).sum()) * residual / (layer.key.heads * queries_per_head)
            outer = self.outer[index] / moments.tokens
            if rope is not None:  # their mean over the distances in the context, at most 256 of them
                distances = torch.linspace(
                    0, self.context - 1, min(self.context, 256), dtype=torch.float32, device="cpu"
                )
                distances = distances.round()
                outer = rotation_average(outer, [SideShape(1, layer.key.head_dim, rope)], moments.inv_freq, distances)
            key = torch.block_diag(*outer) * (self.scaling[index] ** 2 * value_spread / residual)
            moments.sensitivity["value", index] = value * moments.tokens
            moments.sensitivity["key", index] = key * moments.tokens


def output_gram(module: nn.Module, kv_heads: int, value_dim: int) -> Tensor:
    """``[kv_heads, value_dim, value_dim]`` float64: ``W_oᵀ W_o`` of each query head, summed by KV head.

    ``module`` is an attention layer. Its weight is read by pushing unit vectors through the projection, which works
    for any weight format.
    """
    name = next((name for name in _OUTPUT_PROJECTIONS if hasattr(module, name)), None)
    if name is None:
        raise NotImplementedError(
            f"sensitivity='query' found no output projection in {type(module).__name__} (looked for "
            f"{_OUTPUT_PROJECTIONS}); calibrate with sensitivity='gradient'"
        )
    projection = getattr(module, name)
    width = projection.in_features
    device = execution_device(projection)
    dtype = getattr(projection, "compute_dtype", None) or next(
        (p.dtype for p in projection.parameters() if p.is_floating_point()), torch.float32
    )
    with torch.no_grad():
        zero = projection(torch.zeros(1, width, device=device, dtype=dtype)).double().cpu()
        columns = projection(torch.eye(width, device=device, dtype=dtype)).double().cpu() - zero
    heads = columns.view(kv_heads, -1, value_dim, columns.shape[1])
    return torch.einsum("gqdh,gqeh->gde", heads, heads)


@contextmanager
def record_queries(model: PreTrainedModel) -> Iterator[dict[int, Seen]]:
    """Give a dict that, while active, gets what each attention layer's function was given, by layer index.

    Post-RoPE queries ``[batch, q_heads, tokens, head_dim]``, module and scaling. transformers' attention interface is
    overridden for the implementation in use, and restored at the end.
    """
    seen: dict[int, Seen] = {}
    name = model.config.get_text_config(decoder=True)._attn_implementation
    original = ALL_ATTENTION_FUNCTIONS.get(name)
    ours = set(model.modules())

    def attend(module, query, key, value, attention_mask, **kwargs):
        if module in ours:
            seen[module.layer_idx] = (query.detach(), module, float(kwargs["scaling"]))
        function = original or sys.modules[type(module).__module__].eager_attention_forward
        return function(module, query, key, value, attention_mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = attend
    try:
        yield seen
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
