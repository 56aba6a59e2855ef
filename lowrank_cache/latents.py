"""Packed latents of one store, and the coder that makes and reads them.

``Coder`` holds the truncated bases of one store; it is shared by every cache that uses the same
projections at the same ratio, and by their deep copies. ``PackedLatents`` holds the tokens.
"""

import torch
from torch import Tensor

from lowrank_cache.allocation import StorePlan
from lowrank_cache.budget import padded_channels
from lowrank_cache.growing import GrowingTensor
from lowrank_cache.kernels.reference import dequantize, pack, quantize, unpack
from lowrank_cache.projections import Basis

__all__ = ["Coder", "PackedLatents"]


class Coder:
    """Bases of one store, truncated to a plan, with channels in tier order.

    Args:
        store: The bases of one side of one layer group.
        plan: The channels to keep and their bits.
        head_dim: Numbers per head.
        heads: KV heads per layer.
    """

    def __init__(self, store: tuple[Basis, ...], plan: StorePlan, heads: int, head_dim: int):
        self.side, self.layers = store[0].side, store[0].layers
        self.heads, self.head_dim = heads, head_dim
        self.tiers = tuple((bits, len(channels)) for bits, channels in plan.tiers)
        kept = torch.tensor([channel for _, channels in plan.tiers for channel in channels], dtype=torch.long)
        self.weight = torch.cat([basis.loss for basis in store])[kept]
        self.blocks = []  # (heads of the basis or None for all, channels of the latent, down, up, offset)
        constant = torch.zeros(len(self.layers), heads, head_dim)
        start = 0
        for basis in store:
            inside = (kept >= start) & (kept < start + basis.rank)
            columns = kept[inside] - start
            channels = inside.nonzero()[:, 0]
            all_heads = basis.heads == tuple(range(heads))
            width = len(basis.heads) * head_dim
            dropped = torch.ones(basis.rank, dtype=torch.bool)
            dropped[columns] = False
            mean = basis.constant + basis.offset[dropped] @ basis.up_proj[dropped]
            constant[:, list(basis.heads)] = mean.view(len(self.layers), len(basis.heads), head_dim)
            self.blocks.append(
                _Block(
                    None if all_heads else torch.tensor(basis.heads),
                    None if len(channels) == len(kept) else channels,
                    basis.down_proj[:, columns].contiguous(),
                    basis.up_proj[columns].view(len(columns), len(self.layers), width).transpose(0, 1).contiguous(),
                    basis.offset[columns],
                )
            )
            start += basis.rank
        self.constant = constant  # what the channels that are not stored are read as

    @property
    def rank(self) -> int:
        """Channels kept."""
        return sum(channels for _, channels in self.tiers)

    @property
    def nbytes(self) -> int:
        """Bytes of the truncated bases."""
        tensors = [self.weight, self.constant, *(tensor for block in self.blocks for tensor in block.tensors())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def __deepcopy__(self, memo) -> "Coder":
        return self  # immutable but for the device; a copy of a cache shares its bases

    def to(self, device: torch.device) -> None:
        """Move the bases to the device of the layers they serve."""
        if self.constant.device != device:
            self.weight, self.constant = self.weight.to(device), self.constant.to(device)
            for block in self.blocks:
                block.to(device)

    def encode(self, states: Tensor) -> Tensor:
        """Latents of states: ``[batch, layers, heads, tokens, head_dim]`` → ``[batch, tokens, rank]``, float32."""
        batch, _, _, tokens, _ = states.shape
        states = states.float()
        latents = states.new_empty(batch, tokens, self.rank)
        for block in self.blocks:
            chosen = states if block.heads is None else states[:, :, block.heads]
            rows = chosen.permute(0, 3, 1, 2, 4).reshape(batch, tokens, -1)
            latents[..., block.channel_index] = torch.matmul(rows, block.down_proj) - block.offset
        return latents

    def decode(self, latents: Tensor, layer: int) -> Tensor:
        """States of one layer of the group: ``[batch, tokens, rank]`` → ``[batch, heads, tokens, head_dim]``.

        ``layer`` counts within the group. Keys come back in their rotary frames. float32.
        """
        batch, tokens, _ = latents.shape
        states = latents.new_empty(batch, self.heads, tokens, self.head_dim)
        for block in self.blocks:
            rows = torch.matmul(latents[..., block.channel_index] + block.offset, block.up_proj[layer])
            rows = rows.view(batch, tokens, -1, self.head_dim).transpose(1, 2)
            states[:, block.head_index] = rows
        return states.add_(self.constant[layer][:, None])


class _Block:
    """One basis of a coder; ``heads`` or ``channels`` of None stand for all."""

    def __init__(self, heads, channels, down_proj, up_proj, offset):
        self.heads, self.channels = heads, channels
        self.down_proj, self.up_proj, self.offset = down_proj, up_proj, offset

    @property
    def head_index(self):
        return slice(None) if self.heads is None else self.heads

    @property
    def channel_index(self):
        return slice(None) if self.channels is None else self.channels

    def tensors(self) -> list[Tensor]:
        optional = [tensor for tensor in (self.heads, self.channels) if tensor is not None]
        return [self.down_proj, self.up_proj, self.offset, *optional]

    def to(self, device: torch.device) -> None:
        for name in ("heads", "channels", "down_proj", "up_proj", "offset"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.to(device))


class PackedLatents:
    """Latents of consecutive tokens, one tensor per tier, appended in blocks and never re-encoded.

    Args:
        tiers: ``(bits, channels)`` in channel order.
        latent_dtype: Floating dtype of the 16-bit tier.
        block_size: Least number of tokens by which buffers grow.
    """

    def __init__(self, tiers: tuple[tuple[int, int], ...], latent_dtype: torch.dtype, block_size: int):
        self.tiers = tiers
        self.latent_dtype = latent_dtype
        self.codes = [GrowingTensor(axis=1, min_room=block_size) for _ in tiers]
        self.steps = [GrowingTensor(axis=1, min_room=block_size) if bits < 16 else None for bits, _ in tiers]
        self.tokens = 0

    def reserve(self, tokens: int) -> None:
        """Expect ``tokens`` tokens in all."""
        for buffer in self.buffers():
            buffer.reserve(tokens)

    def append(self, latents: Tensor, weight: Tensor) -> None:
        """Store ``[batch, tokens, rank]`` float32 latents; ``weight`` ``[rank]`` prices their errors."""
        start = 0
        for (bits, channels), codes, steps in zip(self.tiers, self.codes, self.steps, strict=True):
            tier = latents[..., start : start + channels]
            if steps is None:
                limit = min(torch.finfo(self.latent_dtype).max, torch.finfo(tier.dtype).max)
                codes.append(tier.clamp(-limit, limit).to(self.latent_dtype))
            else:
                levels, step = quantize(tier, bits, weight[start : start + channels])
                padding = padded_channels(bits, channels) - channels
                codes.append(pack(torch.nn.functional.pad(levels, (0, padding)), bits))
                steps.append(step)
            start += channels
        self.tokens += latents.shape[1]

    def read(self) -> Tensor:
        """All stored latents, ``[batch, tokens, rank]`` float32."""
        parts = []
        for (bits, channels), codes, steps in zip(self.tiers, self.codes, self.steps, strict=True):
            if steps is None:
                parts.append(codes.view().float())
            else:
                parts.append(dequantize(unpack(codes.view(), bits)[..., :channels], steps.view(), bits))
        return torch.cat(parts, dim=-1)

    def truncate(self, tokens: int) -> None:
        """Keep the first ``tokens`` tokens."""
        self.tokens = min(self.tokens, tokens)
        for buffer in self.buffers():
            buffer.truncate(self.tokens)

    def map_batch(self, function) -> None:
        for buffer in self.buffers():
            buffer.map_batch(function)

    def buffers(self) -> list[GrowingTensor]:
        return [*self.codes, *(steps for steps in self.steps if steps is not None)]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())
