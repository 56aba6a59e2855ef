"""Packed latents of one store, and the coder that makes and reads them.

``Coder`` holds the truncated bases of one store; it is shared by every cache that uses the same
projections at the same ratio, and by their deep copies. ``PackedLatents`` holds the tokens.
"""

import hashlib
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowrank_cache.allocation import StorePlan
from lowrank_cache.growing import GrowingTensor
from lowrank_cache.hadamard import channel_mixing
from lowrank_cache.kernels.packed import PackedTier, padded_channels
from lowrank_cache.kernels.reference import pack, quantize, read_latents
from lowrank_cache.models import SideShape
from lowrank_cache.projections import Basis
from lowrank_cache.saved_tensors import SavedTensors

__all__ = ["Coder", "PackedLatents"]


class Coder:
    """Bases of one store, truncated to a plan, with channels in tier order.

    Args:
        store: The bases of a layer group's keys, values or both.
        plan: The channels to keep and their bits.
        members: What the latent holds, from ``ModelShape.members``; its order numbers them.
        dtype: In which the projection matrices are held; products are float32 in any case.
        rotated: Mix each basis' channels by a Hadamard rotation, for one quantized tier that holds them all.
    """

    def __init__(
        self,
        store: tuple[Basis, ...],
        plan: StorePlan,
        members: list[tuple[int, str, SideShape]],
        dtype: torch.dtype = torch.float32,
        rotated: bool = False,
    ):
        self.name = f"{store[0].side} states of layers {store[0].layers}"
        self.members = tuple((layer, side) for layer, side, _ in members)
        self.shapes = tuple(shape for _, _, shape in members)
        self.tiers = tuple((bits, len(channels)) for bits, channels in plan.tiers)
        kept = torch.tensor([channel for _, channels in plan.tiers for channel in channels], dtype=torch.long)
        self.weight = torch.cat([basis.loss for basis in store])[kept]
        sizes = self.weight.sqrt()
        # One unit for all bases of the store: they share a step, and an error counts alike in each.
        unit = max(float(sizes.square().mean().sqrt()), 1e-30) if rotated and len(kept) else 1.0
        if rotated:
            self.weight = torch.full_like(self.weight, unit**2)
        # The calibrated mean of the states, by member: [heads, head_dim]. Latents are of what differs from it, so
        # half precision never has to hold a bias, and channels that are not stored are read as their mean.
        self.constants = [torch.zeros(shape.heads, shape.head_dim) for shape in self.shapes]
        self.blocks = []
        self._whole: dict[int, Tensor] = {}  # up-projections put together from several bases, by member
        self._copies: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}  # for layers on other devices
        start = 0
        for basis in store:
            inside = (kept >= start) & (kept < start + basis.rank)
            columns = kept[inside] - start
            channels = inside.nonzero()[:, 0]
            widths = [len(basis.heads) * shape.head_dim for shape in self.shapes]
            mean = basis.constant + basis.offset @ basis.up_proj
            for constant, part in zip(self.constants, mean.split(widths), strict=True):
                constant[list(basis.heads)] = part.view(len(basis.heads), -1)
            down, up = basis.down_proj[:, columns], basis.up_proj[columns]
            if rotated and len(channels):
                mix, unmix = channel_mixing(sizes[channels], unit)
                down, up = down @ mix, unmix @ up
            all_heads = all(basis.heads == tuple(range(shape.heads)) for shape in self.shapes)
            self.blocks.append(
                _Block(
                    None if all_heads else torch.tensor(basis.heads),
                    None if len(channels) == len(kept) else channels,
                    _narrow(down, dtype).contiguous(),
                    [_narrow(part, dtype).contiguous() for part in up.split(widths, dim=1)],
                )
            )
            start += basis.rank

    @property
    def rank(self) -> int:
        """Channels kept."""
        return sum(channels for _, channels in self.tiers)

    @property
    def nbytes(self) -> int:
        """Bytes of the truncated bases."""
        blocks = (tensor for block in self.blocks for tensor in block.tensors())
        copies = (tensor for pair in self._copies.values() for tensor in pair)
        tensors = [self.weight, *self.constants, *blocks, *self._whole.values(), *copies]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def only_down_proj(self) -> Tensor | None:
        """``[width, rank]``, where one basis covers all heads and channels; else None."""
        only = self.blocks[0]
        return only.down_proj if len(self.blocks) == 1 and only.heads is None and only.channels is None else None

    def up_proj(self, member: int) -> Tensor:
        """``[rank, heads, head_dim]``: the up-projection of one member over all bases of the store.

        A view where one basis covers all heads and channels; else a matrix with zeros between the bases.
        """
        shape = self.shapes[member]
        only = self.blocks[0]
        if self.only_down_proj is not None:
            return only.up_projs[member].unflatten(1, (shape.heads, shape.head_dim))
        if member not in self._whole:
            wide = any(block.up_projs[member].dtype == torch.float32 for block in self.blocks)
            dtype = torch.float32 if wide else only.up_projs[member].dtype
            whole = only.up_projs[member].new_zeros(self.rank, shape.heads, shape.head_dim, dtype=dtype)
            for block in self.blocks:
                part = block.up_projs[member].unflatten(1, (-1, shape.head_dim))
                channels = torch.arange(self.rank, device=whole.device)[block.channel_index]
                heads = torch.arange(shape.heads, device=whole.device)[block.head_index]
                whole[channels[:, None], heads] = part.to(whole.dtype)
            self._whole[member] = whole
        return self._whole[member]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what latents mean: members, tiers and up-projections as they are held.

        The means are left out: ``Projections.truncate`` adds up what it cuts away in another order, so they may
        differ in the last bit.
        """
        digest = hashlib.sha256(repr((self.members, self.tiers)).encode())
        for tensor in (tensor for block in self.blocks for tensor in block.tensors()):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def reading(self, member: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """``up_proj`` and mean of one member on ``device``, copied there once if the bases lie elsewhere."""
        if device == self.weight.device:
            return self.up_proj(member), self.constants[member]
        if (member, device) not in self._copies:
            self._copies[member, device] = self.up_proj(member).to(device), self.constants[member].to(device)
        return self._copies[member, device]

    def __deepcopy__(self, memo) -> "Coder":
        return self  # immutable but for the device; a copy of a cache shares its bases

    def to(self, device: torch.device) -> None:
        """Move the bases to the device of the layers they serve."""
        if self.weight.device != device:
            self.constants = [constant.to(device) for constant in self.constants]
            self._whole.clear()
            self._copies.clear()
            for block in self.blocks:
                block.to(device)
            self.weight = self.weight.to(device)  # last: it tells that all have moved

    def encode(self, states: list[Tensor]) -> Tensor:
        """Latents of states: by member ``[batch, heads, tokens, head_dim]`` → ``[batch, tokens, rank]``, float32."""
        batch, _, tokens, _ = states[0].shape
        centred = [part.float() - mean[:, None] for part, mean in zip(states, self.constants, strict=True)]
        latents = centred[0].new_empty(batch, tokens, self.rank)
        for block in self.blocks:
            rows = [part[:, block.head_index].transpose(1, 2).flatten(2) for part in centred]
            latents[..., block.channel_index] = torch.matmul(torch.cat(rows, dim=2), block.down_proj.float())
        return latents

    def decode(self, latents: Tensor, member: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """States of one member: ``[batch, tokens, rank]`` → ``[batch, heads, tokens, head_dim]``.

        Keys come back in their rotary frames. float32; the product is taken in ``dtype`` if the matrices
        are held in half precision, so a half-precision model loses nothing and gains its speed.
        """
        batch, tokens, _ = latents.shape
        shape = self.shapes[member]
        states = latents.new_empty(batch, shape.heads, tokens, shape.head_dim)
        for block in self.blocks:
            up_proj = block.up_projs[member]
            # bfloat16 holds every float16 number's range; the other way round large entries would overflow.
            narrow = up_proj.dtype.itemsize == 2 and dtype in (torch.bfloat16, up_proj.dtype)
            product = dtype if narrow else torch.float32
            rows = torch.matmul(latents[..., block.channel_index].to(product), up_proj.to(product))
            states[:, block.head_index] = rows.unflatten(2, (-1, shape.head_dim)).transpose(1, 2).float()
        return states.add_(self.constants[member][:, None])


def _narrow(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """``matrix`` in a smaller ``dtype``, or as it is where that would overflow or lose it to underflow."""
    if dtype.itemsize >= matrix.element_size():
        return matrix
    narrowed = matrix.to(dtype)
    lost = (narrowed.to(matrix.dtype) - matrix).norm()
    return narrowed if bool(lost <= torch.finfo(dtype).eps * matrix.norm()) else matrix


class _Block:
    """One basis of a coder: its heads and channels (None for all), and an up-projection for each member."""

    def __init__(self, heads, channels, down_proj: Tensor, up_projs: list[Tensor]):
        self.heads, self.channels = heads, channels
        self.down_proj, self.up_projs = down_proj, up_projs

    @property
    def head_index(self):
        return slice(None) if self.heads is None else self.heads

    @property
    def channel_index(self):
        return slice(None) if self.channels is None else self.channels

    def tensors(self) -> list[Tensor]:
        optional = [tensor for tensor in (self.heads, self.channels) if tensor is not None]
        return [self.down_proj, *self.up_projs, *optional]

    def to(self, device: torch.device) -> None:
        for name in ("heads", "channels", "down_proj"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.to(device))
        self.up_projs = [tensor.to(device) for tensor in self.up_projs]


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

    def reserve(self, tokens: int, *, final: bool = False) -> None:
        """Expect ``tokens`` tokens in all, and if ``final`` none after them."""
        for buffer in self.buffers():
            buffer.reserve(tokens, final=final)

    def append(self, latents: Tensor, weight: Tensor) -> None:
        """Store ``[batch, tokens, rank]`` float32 latents; ``weight`` ``[rank]`` prices their errors."""
        start = 0
        for (bits, channels), codes, steps in zip(self.tiers, self.codes, self.steps, strict=True):
            tier = latents[..., start : start + channels]
            padding = (0, padded_channels(bits, channels) - channels)
            if steps is None:
                limit = min(torch.finfo(self.latent_dtype).max, torch.finfo(tier.dtype).max)
                codes.append(pad(tier.clamp(-limit, limit).to(self.latent_dtype), padding))
            else:
                levels, step = quantize(tier, bits, weight[start : start + channels])
                codes.append(pack(pad(levels, padding), bits))
                steps.append(step)
            start += channels
        self.tokens += latents.shape[1]

    def extend(self, tiers: tuple[PackedTier, ...]) -> None:
        """Store tokens that a kernel has packed."""
        for tier, codes, steps in zip(tiers, self.codes, self.steps, strict=True):
            codes.append(tier.codes)
            if steps is not None and tier.steps is not None:
                steps.append(tier.steps)
        self.tokens += tiers[0].codes.shape[1]

    def views(self, start: int = 0) -> tuple[PackedTier, ...]:
        """Tokens from ``start`` on as they lie in the buffers; appending leaves these views as they are."""
        return tuple(
            PackedTier(bits, channels, codes.view(start), None if steps is None else steps.view(start))
            for (bits, channels), codes, steps in zip(self.tiers, self.codes, self.steps, strict=True)
        )

    def read(self, start: int = 0) -> Tensor:
        """Stored latents from token ``start`` on, ``[batch, tokens, rank]`` float32."""
        return read_latents(self.views(start))

    def save(self, into: SavedTensors, name: str) -> None:
        """Put down the tokens as they are packed."""
        for tier, view in enumerate(self.views() if self.tokens else ()):
            into.put(f"{name}.codes.{tier}", view.codes)
            if view.steps is not None:
                into.put(f"{name}.steps.{tier}", view.steps)

    def load(self, saved: SavedTensors, name: str, batch: int, tokens: int, device: torch.device) -> None:
        """Take up what ``save`` put down, ``tokens`` tokens of ``batch`` rows.

        Raises:
            ValueError: If a tensor is missing, or has another shape or dtype than this store's tiers ask for.
        """
        for tier, ((bits, channels), codes, steps) in enumerate(zip(self.tiers, self.codes, self.steps, strict=True)):
            row = padded_channels(bits, channels) // (1 if steps is None else 8 // bits)
            dtype = self.latent_dtype if steps is None else torch.uint8
            codes.adopt(saved.take(f"{name}.codes.{tier}", (batch, tokens, row), dtype, device))
            if steps is not None:
                steps.adopt(saved.take(f"{name}.steps.{tier}", (batch, tokens), torch.float16, device))
        self.tokens = tokens

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
