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
# Vector instructions of `weigh` per position beside unpacking: counted at 32 rows, the share that rows have is a guess.
_WEIGH_FIXED, _WEIGH_PER_ROW = 6.0, 5.0 / 32
_SOFTMAX = 10  # vector instructions per score of the full cache

ASSUMPTIONS = (
    "Assumptions: 85 % of the memory bandwidth and 60 % of the matrix and instruction peaks are reached, for the full "
    "cache as for latents; L2 bandwidths are assumed; within a kernel the scarcest resource decides, kernels follow "
    "one another; context long enough that launches, the query, sinks, window and the last up-projection do not count. "
    "Instructions per unpacked channel are counted in the machine code of the kernels' loops for sm_80 and sm_90 "
    "(taken for the RTX 4090 and the MI300X from sm_80). The full cache is float16, read once by an attention kernel "
    "that tiles the query heads of a KV head together. Each head group is a latent of its own; a joint latent is read "
    "from memory twice, for scores and for values."
)


@dataclass(frozen=True)
class Card:
    """Peaks of one GPU, per second.

    Attributes:
        memory: Bytes.
        l2: Bytes, assumed.
        matrix: float16 operations with float32 sums, dense.
        vector: Instructions times lanes.
        unpack: Vector instructions of the loop over scores per position that it unpacks.
    """

    name: str
    memory: float
    l2: float
    matrix: float
    vector: float
    unpack: float


# Memory and matrix peaks: vendors' data sheets. Vector: multiprocessors x lanes issued per clock x boost clock.
CARDS = (
    Card("A100-80G", 2.04e12, 4.5e12, 312e12, 108 * 128 * 1.41e9, 12),
    Card("H100-SXM", 3.35e12, 5.5e12, 989e12, 132 * 128 * 1.755e9, 7.5),
    Card("RTX 4090", 1.01e12, 5.0e12, 165e12, 128 * 128 * 2.52e9, 12),
    Card("MI300X", 5.3e12, 10e12, 1307e12, 304 * 64 * 2.1e9, 12),
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
    """What one kernel needs per token of context and layer: bytes, operations, instructions, unpacked positions."""

    kernel: str
    memory: float
    l2: float
    matrix: float
    vector: float
    unpacked: float

    def times(self, card: Card) -> dict[str, float]:
        """Seconds by resource."""
        return {
            "memory": self.memory / (0.85 * card.memory),
            "L2": self.l2 / card.l2,
            "matrix": self.matrix / (0.6 * card.matrix),
            "instructions": (self.vector + card.unpack * self.unpacked) / (0.6 * card.vector),
        }

    def seconds(self, card: Card) -> float:
        return max(self.times(card).values())


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

    def add(kernel: str, memory: float, l2: float, matrix: float, vector: float, unpacked: float) -> None:
        for place, amount in enumerate((memory, l2, matrix, vector, unpacked)):
            totals.setdefault(kernel, [0.0] * 5)[place] += amount

    for group in groups:
        rows = per_head * group.heads
        if frame_length > per_head:
            positions = _positions(group.keys, _CHUNK)
            # Absorbed queries are written once a frame and read once a tile, within L2.
            add("absorb", 0, 2 * rows * positions / frame_length, 2 * rows * dim * positions / frame_length, 0, 0)
            padded = _padded_rows(rows, 128)
            read = group.key_bytes + 2 * rows * positions / min(frame_length, _TILE) + 4 * rows
            add("scores", group.key_bytes, read, 2 * padded * positions, 0, positions * -(-rows // 128))
        else:
            # Every head reads and unpacks the whole latent, and a tile of the up-projection for every tile of tokens.
            positions = _positions(group.keys, _REBUILD_CHUNK)
            read = group.heads * (group.key_bytes + 2 * positions * dim / _REBUILD_TILE) + 4 * rows
            matrix = group.heads * dim * 2 * (positions + _padded_rows(per_head, 64))
            add("scores", group.key_bytes, read, matrix, 0, positions * group.heads)
        positions = _positions(group.values, _CHUNK)
        blocks, padded = -(-rows // 64), _padded_rows(rows, 64)
        partial = 4 * rows * positions / _SPLIT
        read = group.value_bytes * blocks + 4 * rows * positions / _CHUNK + partial
        vector = positions * (_WEIGH_FIXED * blocks + _WEIGH_PER_ROW * padded)
        add("weigh", group.value_bytes, read, 2 * padded * positions, vector, positions * blocks)
        add("combine", 0, partial, 0, rows * positions / _SPLIT, 0)
    return [KernelCost(kernel, *amounts) for kernel, amounts in totals.items()]


def dense_time(attention: Attention, card: Card) -> float:
    """Seconds per token of context and layer of the full cache at 16 bits."""
    width = attention.heads * attention.head_dim
    size = 4.0 * width
    rows = _padded_rows(attention.q_heads / attention.heads, 64)
    return KernelCost("dense", size, size, 4 * width * rows, _SOFTMAX * rows * attention.heads, 0).seconds(card)
