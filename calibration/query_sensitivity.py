"""A sensitivity without gradients: what an error in a key or value does to the attention output.

For models through which autograd does not pass (some 4-bit weights). An error ``e`` of a key changes
its scores by ``qᵀ e``, so keys are weighted by the second moment of the queries, averaged over the
relative rotations of the context; an error of a value reaches the residual stream through the
output projection, so values are weighted by ``W_oᵀ W_o``. Both are put into one unit, the squared
error of the attention output relative to the residual stream. See docs/method.md, "Without gradients".
"""

import sys
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lowrank_cache.kernels.rope import angle_tables, rotate
from lowrank_cache.models import execution_device

__all__ = ["QueryStatistics", "record_queries"]

_OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")


class QueryStatistics:
    """Sums over queries and residual norms of one model, per layer."""

    def __init__(self):
        self.modules: dict[int, nn.Module] = {}
        self.scaling: dict[int, float] = {}
        self.outer: dict[int, Tensor] = {}  # [kv_heads, head_dim, head_dim], sum of q qᵀ, pre-RoPE
        self.tokens = 0
        self.residual: dict[int, float] = {}  # sum of squared norms of the residual stream

    def add_queries(self, layer_idx: int, queries: Tensor, kv_heads: int) -> None:
        """``queries``: ``[tokens, q_heads, head_dim]`` pre-RoPE, of usable tokens."""
        grouped = queries.float().unflatten(1, (kv_heads, -1))
        outer = torch.einsum("tgqd,tgqe->gde", grouped, grouped).double().cpu()
        self.outer[layer_idx] = self.outer.get(layer_idx, 0) + outer

    def key_sensitivity(
        self, layer_idx: int, rope, inv_freq: Tensor | None, context: int, value_spread: float
    ) -> Tensor:
        """``[width, width]`` float64, block-diagonal over KV heads, per token."""
        outer = self.outer[layer_idx] / self.tokens
        if inv_freq is not None:
            outer = _average_over_distances(outer, rope, inv_freq, context)
        factor = self.scaling[layer_idx] ** 2 * value_spread / self.mean_residual(layer_idx)
        return torch.block_diag(*outer) * factor

    def value_sensitivity(self, layer_idx: int, kv_heads: int, head_dim: int) -> Tensor:
        """``[width, width]`` float64, block-diagonal over KV heads: ``W_oᵀ W_o`` summed over query heads."""
        gram = _output_gram(self.modules[layer_idx], kv_heads, head_dim)
        return torch.block_diag(*gram) / self.mean_residual(layer_idx)

    def mean_residual(self, layer_idx: int) -> float:
        return self.residual[layer_idx] / self.tokens


def _average_over_distances(outer: Tensor, rope, inv_freq: Tensor, context: int) -> Tensor:
    """Mean of ``R(d) outer R(d)ᵀ`` over distances ``0 ≤ d < context``, at most 256 of them."""
    distances = torch.linspace(0, context - 1, min(context, 256)).round()
    average = torch.zeros_like(outer)
    for distance in distances:
        cos, sin = angle_tables(distance, inv_freq)
        rotated = rotate(outer, cos, sin, rope.layout).transpose(1, 2).contiguous()
        average += rotate(rotated, cos, sin, rope.layout).transpose(1, 2)
    return average / len(distances)


def _output_gram(module: nn.Module, kv_heads: int, value_dim: int) -> Tensor:
    """``[kv_heads, value_dim, value_dim]`` float64: ``W_oᵀ W_o`` of each query head, summed by KV head.

    The weight is read by pushing unit vectors through the projection, which works for any weight format.
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
def record_queries(model: PreTrainedModel, seen: dict[int, tuple[Tensor, nn.Module, float]]):
    """While active, put what each attention layer's function was given into ``seen`` by layer index.

    ``seen[layer] = (post-RoPE queries [batch, q_heads, tokens, head_dim], module, scaling)``. transformers'
    attention interface is overridden for the implementation in use, and restored at the end.
    """
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
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
