"""What a model caches when its attention already reads compressed states: the inputs of the value calibration.

A second pass over the calibration text, in which every layer attends to keys and values as truncated
bases read them back, so that later layers see the drift that compression causes. Layers are recorded in
this one pass, compressed by the bases of the first; nothing but sums is kept.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_cache.calibration.moments import Recorder, positions_of, usable_tokens
from lowrank_cache.kernels.rope import angle_tables, rotate
from lowrank_cache.models import ModelShape, decoder_of, rope_buffer
from lowrank_cache.projections import Basis, Projections

__all__ = ["CompressedRecorder"]


class CompressedRecorder(Recorder):
    """Records exact states and passes on what 16-bit latents of them are read back as.

    Sinks and padding pass exactly, as in the cache.

    Args:
        projections: Truncated to the ratio at which the stream is compressed; groups of one layer.
        model, shape, attention_mask: See ``Recorder``.
    """

    def __init__(self, projections: Projections, model: PreTrainedModel, shape: ModelShape, attention_mask: Tensor):
        super().__init__(model, shape, attention_mask)
        self.frame_length = projections.frame_length
        self.decoder = decoder_of(model)
        self.bases: dict[tuple[str, int], list[Basis]] = {}
        for basis in projections.bases:
            self.bases.setdefault((basis.side, basis.layers[0]), []).append(basis)

    def pass_on(self, side: str, layer_idx: int, states: Tensor) -> Tensor:
        """``states`` ``[batch, heads, tokens, head_dim]``, post-RoPE, as the bases read them back."""
        shape = self.shape.layer(layer_idx).side(side)
        framed = states.float()
        if shape.rope is not None:
            positions = positions_of(self.attention_mask).to(states.device)
            frames = positions - positions % self.frame_length
            inv_freq = rope_buffer(self.decoder, shape.rope.source).detach().float()
            cos, sin = (table[:, None] for table in angle_tables(frames, inv_freq))
            framed = rotate(framed, cos, sin, shape.rope.layout, inverse=True)
        read = torch.empty_like(framed)
        for basis in self.bases[side, layer_idx]:
            heads = list(basis.heads)
            rows = framed[:, heads].transpose(1, 2).flatten(2)
            down, up, constant = (tensor.to(rows.device) for tensor in (basis.down_proj, basis.up_proj, basis.constant))
            rows = (rows @ down) @ up + constant
            read[:, heads] = rows.unflatten(2, (len(heads), -1)).transpose(1, 2)
        if shape.rope is not None:
            read = rotate(read, cos, sin, shape.rope.layout)
        compressed = usable_tokens(self.attention_mask).to(states.device)[:, None, :, None]
        return torch.where(compressed, read.to(states.dtype), states)
