"""What a decode step's attention over latents costs on paper: bytes and operations per token, against GPUs' peaks.

Counts follow the Triton kernels as they are written: positions padded to whole chunks, rows padded to tiles, joint
latents read by two kernels, keys unpacked once per head where they are rebuilt. Nothing here was measured on a GPU.
"""

from dataclasses import dataclass

__all__ = ["ASSUMPTIONS", "CARDS", "Attention", "Card", "KernelCost", "LatentGroup", "dense_time", "kernel_costs"]

_CHUNK = 128  # positions that the kernels unpack at once
_REBUILD_CHUNK, _REBUILD_TILE = 64, 128  # the same where keys are rebuilt, and tokens of a tile
_TILE = 64  # tokens of a tile of scores
_SPLIT = 2048  # tokens of a split
_UNPACK = 4  # vector instructions to turn one code into a float16: shift, mask and OR, subtract, move
_SOFTMAX = 10  # vector instructions per score and chunk: maximum, exponential (four), sum, scales, rounding

ASSUMPTIONS = (
    "Assumptions: 85 % of the memory bandwidth and 60 % of the matrix and vector peaks are reached, for the full cache "
    "as for latents; L2 bandwidths are assumed; within a kernel the scarcest resource decides, kernels follow one "
    "another; context long enough that launches, the query, sinks, window and the last up-projection do not count. "
    f"Unpacking costs {_UNPACK} vector instructions a channel, the softmax {_SOFTMAX} a score. The full cache is "
    "float16, read once by an attention kernel that tiles the query heads of a KV head together. Each head group is "
    "a latent of its own; a joint latent is read from memory twice, for scores and for values."
)


@dataclass(frozen=True)
class Card:
    """Peaks of one GPU, per second.

    Attributes:
        memory: Bytes.
        l2: Bytes, assumed.
        matrix: float16 operations with float32 sums, dense.
        vector: 32-bit integer or float instructions, times lanes.
    """

    name: str
    memory: float
    l2: float
    matrix: float
    vector: float


# Memory and matrix peaks: vendors' data sheets. Vector: multiprocessors x lanes of 32-bit integers x boost clock.
CARDS = (
    Card("A100-80G", 2.04e12, 4.5e12, 312e12, 108 * 64 * 1.41e9),
    Card("H100-SXM", 3.35e12, 5.5e12, 989e12, 132 * 64 * 1.755e9),
    Card("RTX 4090", 1.01e12, 5.0e12, 165e12, 128 * 64 * 2.52e9),
    Card("MI300X", 5.3e12, 10e12, 1307e12, 304 * 64 * 2.1e9),
)


@dataclass(frozen=True)
class Attention:
    """The attention of one layer, one query token."""

    q_heads: int
    heads: int
    head_dim: int


@dataclass(frozen=True)
class LatentGroup:
    """A latent as one layer reads it.

    Attributes:
        heads: KV heads of the layer that it holds.
        keys, values: ``(bits, channels)`` of the tiers that hold keys and values. The same in a joint latent.
        key_bytes, value_bytes: Of these tiers, padded, with steps.
    """

    heads: int
    keys: tuple[tuple[int, float], ...]
    values: tuple[tuple[int, float], ...]
    key_bytes: float
    value_bytes: float


@dataclass(frozen=True)
class KernelCost:
    """What one kernel needs per token of context and layer."""

    kernel: str
    memory: float
    l2: float
    matrix: float
    vector: float

    def seconds(self, card: Card) -> float:
        return max(
            self.memory / (0.85 * card.memory),
            self.l2 / card.l2,
            self.matrix / (0.6 * card.matrix),
            self.vector / (0.6 * card.vector),
        )


def _positions(tiers: tuple[tuple[int, float], ...], chunk: int) -> int:
    """Channels padded to 16 bytes a row, then to whole chunks, over all tiers."""
    total = 0
    for bits, channels in tiers:
        granule = 128 // bits
        padded = -(-round(channels) // granule) * granule
        total += -(-padded // chunk) * chunk
    return total


def _padded_rows(rows: float, most: int) -> float:
    block = 16
    while block < min(rows, most):
        block *= 2
    return -(-rows // block) * block


def kernel_costs(attention: Attention, groups: list[LatentGroup], frame_length: int) -> list[KernelCost]:
    """Costs by kernel, per token of context, of one layer whose heads are cut into ``groups``."""
    per_head = attention.q_heads / attention.heads
    dim = attention.head_dim
    totals: dict[str, list[float]] = {}

    def add(kernel: str, memory: float, l2: float, matrix: float, vector: float) -> None:
        for place, amount in enumerate((memory, l2, matrix, vector)):
            totals.setdefault(kernel, [0.0] * 4)[place] += amount

    for group in groups:
        rows = per_head * group.heads
        if frame_length > per_head:
            positions = _positions(group.keys, _CHUNK)
            # Absorbed queries are written once a frame and read once a tile, within L2.
            add("absorb", 0, 2 * rows * positions / frame_length, 2 * rows * dim * positions / frame_length, 0)
            padded = _padded_rows(rows, 128)
            read = group.key_bytes + 2 * rows * positions / min(frame_length, _TILE) + 4 * rows
            unpacked = _UNPACK * positions * -(-rows // 128)
            add("scores", group.key_bytes, read, 2 * padded * positions, unpacked)
        else:
            # Every head reads and unpacks the whole latent, and a tile of the up-projection for every tile of tokens.
            positions = _positions(group.keys, _REBUILD_CHUNK)
            read = group.heads * (group.key_bytes + 2 * positions * dim / _REBUILD_TILE) + 4 * rows
            matrix = group.heads * dim * 2 * (positions + _padded_rows(per_head, 64))
            add("scores", group.key_bytes, read, matrix, _UNPACK * positions * group.heads)
        positions = _positions(group.values, _CHUNK)
        chunks, blocks = positions / _CHUNK, -(-rows // 64)
        partial = 4 * rows * positions / _SPLIT
        read = group.value_bytes * blocks + 4 * rows * chunks + partial
        vector = _UNPACK * positions * blocks + _SOFTMAX * rows * chunks
        add("weigh", group.value_bytes, read, 2 * _padded_rows(rows, 64) * positions, vector)
        add("combine", 0, partial, 0, rows * positions / _SPLIT)
    return [KernelCost(kernel, *amounts) for kernel, amounts in totals.items()]


def dense_time(attention: Attention, card: Card) -> float:
    """Seconds per token of context and layer of the full cache at 16 bits."""
    width = attention.heads * attention.head_dim
    size = 4.0 * width
    matrix = 4 * width * _padded_rows(attention.q_heads / attention.heads, 64)
    return KernelCost("dense", size, size, matrix, _SOFTMAX * attention.q_heads).seconds(card)
