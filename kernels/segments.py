"""Attention over tokens that are stored exactly, and joining segments of tokens by their log-sum-exps.

A layer's tokens lie in segments: sinks, latents, window. Each is attended to by itself; ``merge`` makes one attention
of them. Plain torch in the dtype of the queries, at least float32, on every device. Mathematics: docs/method.md,
"Attending to latents".
"""

import torch
from torch import Tensor


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over one segment of the tokens, and what ``merge`` needs to join it with others.

    Args:
        query: ``[batch, q_heads, q_tokens, head_dim]``, post-RoPE.
        keys: ``[batch, heads, tokens, head_dim]``, dtype of ``query``; each serves ``q_heads / heads`` adjacent
            query heads.
        values: ``[batch, heads, tokens, value_dim]``.
        scaling: Factor of the scores.
        mask: bool, broadcastable to ``[batch, 1, q_tokens, tokens]``; True where a query sees a token.
        softcap: ``s`` becomes ``softcap · tanh(s / softcap)`` (Gemma 2).

    Returns:
        Output ``[batch, q_heads, q_tokens, value_dim]`` and log-sum-exp of the scores
        ``[batch, q_heads, q_tokens]``, in the dtype of ``query`` but at least float32. A query that sees no token
        has output 0 and log-sum-exp -inf.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    batch, q_heads, q_tokens, head_dim = query.shape
    heads = keys.shape[1]
    # Query heads of one KV head side by side: no key is repeated.
    rows = query.to(wide).reshape(batch, heads, -1, head_dim)
    scores = (torch.matmul(rows, keys.to(wide).transpose(2, 3)) * scaling).view(batch, q_heads, q_tokens, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights, lse = softmax(scores, mask)
    output = torch.matmul(weights.view(batch, heads, rows.shape[2], -1), values.to(wide))
    return output.view(batch, q_heads, q_tokens, -1), lse


def softmax(scores: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax over the last axis, zeros where a query sees nothing, and its log-sum-exp (-inf there)."""
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = torch.softmax(scores, dim=-1)
    if mask is not None:
        weights = weights.nan_to_num_(nan=0.0)
    # The highest score's weight is 1 / sum(exp(scores - highest)).
    lse = scores.amax(-1) - weights.amax(-1).log_()
    return weights, lse if mask is None else lse.nan_to_num_(nan=-torch.inf, posinf=-torch.inf)


def merge(segments: list[tuple[Tensor, Tensor]], sink_logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Join the results of ``attend`` over disjoint segments into attention over all of their tokens.

    Args:
        segments: Outputs ``[batch, q_heads, q_tokens, value_dim]`` and log-sum-exps ``[batch, q_heads, q_tokens]``.
        sink_logits: ``[q_heads]``, learned scores of a token without a value (gpt-oss).

    Returns:
        Output and log-sum-exp over all segments, shaped alike. A query that sees nothing has output 0.
    """
    output, total = segments[0]
    for part, lse in segments[1:]:
        joint = torch.logaddexp(total, lse)
        output = torch.lerp(output, part.to(output.dtype), _share(lse, joint)[..., None].to(output.dtype))
        total = joint
    if sink_logits is not None:
        joint = torch.logaddexp(total, sink_logits.to(total)[:, None])
        output = output * _share(total, joint)[..., None]
        total = joint
    return output, total


def _share(lse: Tensor, joint: Tensor) -> Tensor:
    """``exp(lse) / exp(joint)``; 0 where both are -inf."""
    return (lse - joint).exp_().nan_to_num_(nan=0.0)
