"""Attention over stored tokens on GPUs, in Triton kernels: what ``reference.latent_attention`` and ``segments`` say.

Five launches: absorb the queries, once per rotary frame, and beside it attend to the tokens that are stored exactly;
weights of the latents; their weighted sums by chunk of channels and split of the tokens; combine the splits;
up-project and join. Where a frame holds too few tokens to pay for the absorption, keys are reconstructed tile by tile
instead. Codes are unpacked in registers; keys and values never exist in memory.

Numbers: float32 queries are computed in float32 throughout. Otherwise products take float16 operands (those with an
up-projection its dtype, float32 ones at the precision of tensor cores, those with exact tokens the model's dtype) and
float32 sums; levels are exact, and absorbed queries and weights are rounded to float16. What is designed for which
reason: docs/appendix.md, "The Triton kernels".
"""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from lowrank_cache.kernels.packed import LatentSide, StoredSide
from lowrank_cache.kernels.triton_attend import (
    Segment,
    absorb,
    absorbed_scores,
    attend_exact,
    combine,
    project,
    reconstructed_scores,
    weigh,
)
from lowrank_cache.kernels.triton_tiers import (
    COLUMNS,
    TierArguments,
    block,
    check_side,
    dot_dtype,
    interpreted,
    precision,
    tier_arguments,
    unspecialised,
    up_proj_arguments,
    warps,
)

# Sizes with which an H100 was fastest (Llama-3.1-8B's layer, 32k and 128k tokens, batch 1 and 8).
_TILE = 64  # slots that are scored, and weighed, at once
_ABSORB_ROWS, _ABSORB_CHUNK = 64, 128  # rows over frames and positions of a product of `absorb`
_ABSORB_PROGRAMS = 1024  # beyond which a program of `absorb` keeps its piece of the up-projection for more rows
_PROGRAMS = 512  # of `weigh` that are worth splitting the tokens for: a few for every multiprocessor
_LONGEST_SPLIT = 2048  # slots
_LOG2E = math.log2(math.e)
_ALIGNMENT = 256  # bytes, of every array in the scratch memory


class _Launch:
    """One kernel and its arguments, all but those that change from call to call.

    After the first call, which compiles, the kernel is called directly: Triton's own way through Python takes four
    times as long, and decides nothing anew where types and alignment stay.
    """

    def __init__(self, kernel: Any, grid: tuple[int, int, int], threads: int, stages: int, **arguments: Any):
        self._kernel, self._grid = kernel, grid
        self._options = {"num_warps": warps(threads), "num_stages": stages}
        self._arguments = [arguments.get(name) for name in kernel.arg_names]
        self._changing = [(place, name) for place, name in enumerate(kernel.arg_names) if name not in arguments]
        self._compiled: Any = None
        self._launch: Callable[..., object] | None = None

    def __call__(self, changing: Mapping[str, Any]) -> None:
        arguments = self._arguments.copy()
        for place, name in self._changing:
            arguments[place] = changing[name]
        if self._launch is not None:
            self._launch(*arguments)
        elif self._compiled is None:  # always, where kernels are interpreted
            self._compiled = self._kernel[self._grid](*arguments, **self._options)
        else:
            self._launch = self._compiled[self._grid]
            self._launch(*arguments)


class _Plan:
    """The launches of one kind of call on the same latents.

    Args:
        query: ``[batch, q_heads, q_tokens, head_dim]``; later queries have its shape and dtype.
        key, value: The latents.
        scaling, softcap: See ``reference.latent_attention``.
        kind: How the latents' mask looks: ``"none"``, ``"tokens"`` if all query tokens see the same, or ``"queries"``.
        exact: How those of exact tokens look, ``"none"`` or ``"queries"``; None if there are no exact tokens.
        sink_logits: Whether there are any.
    """

    def __init__(
        self, query: Tensor, key: LatentSide, value: LatentSide, scaling: float, softcap: float | None, kind: str,
        exact: str | None, sink_logits: bool,
    ):  # fmt: skip
        _check(query, key, value)
        self.value = value
        batch, q_heads, q_tokens, _ = query.shape
        tokens, float32 = key.tokens, query.dtype == torch.float32
        keys, values = tier_arguments(key.tiers), tier_arguments(value.tiers)
        key_up, value_up = up_proj_arguments(key), up_proj_arguments(value)
        rows, heads = q_heads * q_tokens, key_up["heads"]
        head_rows = rows // heads
        # Absorbing costs as much per frame as reconstructing costs per token, times a head's queries.
        reconstructed = key.rope is not None and key.rope.frame_length <= head_rows
        frame_length = tokens if key.rope is None or reconstructed else key.rope.frame_length
        tile = _TILE if key.rope is None else block(frame_length, 16, _TILE)
        if reconstructed:  # the wider a tile of keys, the less often the up-projection is read
            tile = 128 if query.shape[3] <= 128 else 64
        frames, frame_tiles = -(-tokens // frame_length), -(-frame_length // tile)
        tiles = frames * frame_tiles
        row_block = block(rows, 16, 32)  # four sums of 64 rows would spill
        row_blocks = -(-rows // row_block)
        splits = -(-_PROGRAMS // (batch * row_blocks * values.chunks))
        split_tiles = max(1, min(-(-tiles // splits), _LONGEST_SPLIT // tile))
        splits = -(-tiles // split_tiles)
        self._scratch: dict[str, tuple[torch.dtype, int, int]] = {}
        self._bytes = 0
        half = torch.float32 if float32 else torch.float16
        sizes = {
            "weights": (half, rows * tiles * tile),
            "maxima": (torch.float32, tiles * rows),
            "sums": (torch.float32, tiles * rows),
            "partial": (torch.float32, splits * rows * values.position_blocks * COLUMNS),
            "split_maxima": (torch.float32, splits * rows),
            "split_sums": (torch.float32, splits * rows),
            "latents": (torch.float32, rows * values.position_blocks * COLUMNS),
            "lse": (torch.float32, rows),
        }
        if not reconstructed:
            sizes["absorbed"] = half, frames * rows * keys.position_blocks * COLUMNS
            sizes["bias"] = torch.float32, frames * rows
        if exact is not None:
            sizes["exact"] = torch.float32, rows * value_up["HEAD_DIM"]
            sizes["exact_maxima"] = sizes["exact_sums"] = torch.float32, rows
        for name, (dtype, numbers) in sizes.items():
            self._scratch[name] = dtype, self._bytes, batch * numbers * dtype.itemsize
            self._bytes += -(-batch * numbers * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        self._compiled = False
        products = {"DOT": tl.float32 if float32 else tl.float16, "PRECISION": precision(float32)}
        finish = {
            "MASK": kind,
            "SOFTCAP": softcap is not None,
            "factor": 1.0 if softcap is None else softcap * _LOG2E,
            "scaling": scaling * _LOG2E if softcap is None else scaling / softcap,
            "q_tokens": q_tokens,
        }
        about = {
            "rows": rows, "heads": heads, "head_rows": head_rows, "tokens": tokens, "frames": frames,
            "frame_length": frame_length, "frame_tiles": frame_tiles, "tiles": tiles, "TILE": tile, "COLUMNS": COLUMNS,
            **finish, **products,
        }  # fmt: skip
        exactly = self._exact_arguments(query, value_up["HEAD_DIM"], head_rows, exact)
        self._launches: list[_Launch] = []
        if reconstructed:
            if exact is not None:
                grid, threads = (-(-head_rows // exactly["EXACT_ROWS"]), heads, batch), self._exact_threads(exactly)
                self._add(attend_exact, grid, threads, 2, {**about, **exactly, "HEAD_DIM": query.shape[3]})
            self._reconstruct_scores(query, keys, key, key_up, about, batch)
        else:
            self._absorb(query, keys, key_up, about, exactly, exact is not None, batch)
        # So many threads that each loads four weights, and that wide tiles do not spill.
        threads = min(row_block * tile // 4, 128 if row_block == 32 and tile <= _TILE else 256)
        self._add(
            weigh, (values.chunks, splits, batch * row_blocks), threads, 3 if tile <= _TILE else 2,
            {**about, "tiers": values.tiers, "row_blocks": row_blocks, "split_tiles": split_tiles, "ROWS": row_block},
        )  # fmt: skip
        self._add(
            combine, (values.position_blocks, rows, batch), 128, 2,
            {**about, "splits": splits, "position_blocks": values.position_blocks, "SPLITS": 16},
        )  # fmt: skip
        rows, dims = block(head_rows, 16, 64), block(value_up["HEAD_DIM"], 16, 64)
        grid = batch * heads, -(-head_rows // rows), -(-value_up["HEAD_DIM"] // dims)
        arguments = {**about, **value_up, "tiers": values.tiers, "position_blocks": values.position_blocks}
        arguments["DOT"] = tl.float32 if float32 else dot_dtype(value_up["up_proj"].dtype)
        self._add(
            project, grid, 128, 2,
            {**arguments, "ROWS": rows, "DIMS": dims, "EXACT": exact is not None, "SINK_LOGITS": sink_logits},
        )  # fmt: skip

    def _add(self, kernel: Any, grid: tuple[int, int, int], threads: int, stages: int, known: dict[str, Any]) -> None:
        """A launch of ``kernel`` with those of ``known`` that it takes."""
        taken = {name: known[name] for name in kernel.arg_names if name in known}
        self._launches.append(_Launch(kernel, grid, threads, stages, **taken))

    @staticmethod
    def _exact_arguments(query: Tensor, value_dim: int, head_rows: int, exact: str | None) -> dict[str, Any]:
        float32 = query.dtype == torch.float32
        return {
            "HEAD_BLOCK": block(query.shape[3], 16, 256),
            "VALUE_DIM": value_dim,
            "VALUE_BLOCK": block(value_dim, 16, 256),
            "EXACT_ROWS": block(head_rows, 16, 32 if float32 else 64),
            "EXACT_BLOCK": 64 // (1 + float32) // (1 + (query.shape[3] > 128)),
            "EXACT_MASK": exact or "none",
            "EXACT_DOT": dot_dtype(query.dtype),
            "EXACT_PRECISION": precision(float32),
        }

    @staticmethod
    def _exact_threads(exactly: dict[str, Any]) -> int:
        """So many that a block of rows and its sums fit their registers."""
        return 256 if exactly["EXACT_ROWS"] > 32 else 128

    def _absorb(
        self, query: Tensor, keys: TierArguments, up: dict[str, Any], about: dict[str, Any], exactly: dict[str, Any],
        exact: bool, batch: int,
    ) -> None:  # fmt: skip
        float32, items = query.dtype == torch.float32, about["frames"] * about["head_rows"]
        rows, chunk = _ABSORB_ROWS, _ABSORB_CHUNK
        if float32 and query.shape[3] > 128:  # for the 64 KiB of shared memory on AMD's cards
            rows = chunk = 32
        row_blocks, columns = -(-items // rows), -(-keys.position_blocks * COLUMNS // chunk)
        steps = max(1, min(row_blocks, row_blocks * columns * batch * about["heads"] // _ABSORB_PROGRAMS))
        along = -(-row_blocks // steps)
        arguments = {
            **about, **exactly, **up, "tiers": keys.tiers, "steps": steps, "position_blocks": keys.position_blocks,
            "ROWS": rows, "CHUNK": chunk, "DOT": tl.float32 if float32 else dot_dtype(up["up_proj"].dtype),
            "EXACT": exact,
        }  # fmt: skip
        if exact:
            along = max(along, -(-about["head_rows"] // exactly["EXACT_ROWS"]))
        else:  # what no program reads
            nothing = up["constant"]
            arguments |= dict.fromkeys(("exact", "exact_maxima", "exact_sums", "sink_mask", "tail_mask"), nothing)
            arguments["segments"] = (Segment(nothing, nothing, *[unspecialised(0)] * 10),) * 2
        threads = 256 if float32 or query.shape[3] > 128 else self._exact_threads(exactly)
        self._add(absorb, (batch * about["heads"], along, columns + exact), threads, 1, arguments)
        rows = block(about["rows"], 16, 32 if float32 else 64)  # float32 tiles take twice the shared memory
        # So many threads that each loads 8 bytes of codes or more.
        threads = min(4 * about["TILE"], 128 if rows < 64 else 256)
        self._add(
            absorbed_scores, (about["tiles"], -(-about["rows"] // rows), batch), threads,
            1 if about["TILE"] < 32 else 2,  # 64 threads with a second stage spill on sm_80
            {**about, "tiers": keys.tiers, "ROWS": rows},
        )  # fmt: skip

    def _reconstruct_scores(
        self, query: Tensor, keys: TierArguments, key: LatentSide, up: dict[str, Any], about: dict[str, Any], batch: int
    ) -> None:
        float32 = query.dtype == torch.float32
        assert key.rope is not None
        arguments = {
            **about, **up, "tiers": keys.tiers, "frame_length": key.rope.frame_length,
            "PAIRS": block(up["HEAD_DIM"] // 2, 16, 128), "ROWS": block(about["head_rows"], 16, 64),
            "COLUMNS": COLUMNS // (4 if float32 and up["HEAD_DIM"] > 128 else 2),
            "UP_DOT": tl.float32 if float32 else dot_dtype(up["up_proj"].dtype),
        }  # fmt: skip
        grid = about["tiles"], about["heads"], batch
        self._add(reconstructed_scores, grid, 128 if up["HEAD_DIM"] <= 64 else 256, 2, arguments)

    def run(self, changing: dict[str, Any]) -> None:
        """Launch everything, on the device of ``changing["query"]``."""
        query = changing["query"]
        memory = torch.empty(self._bytes, dtype=torch.uint8, device=query.device)
        if self._compiled:  # addresses are enough
            start = memory.data_ptr()
            for name, (_, offset, _) in self._scratch.items():
                changing[name] = start + offset
        else:
            for name, (dtype, offset, size) in self._scratch.items():
                changing[name] = memory[offset : offset + size].view(dtype)
        other = query.is_cuda and query.device.index != torch.cuda.current_device()
        with torch.cuda.device(query.device) if other else nullcontext():
            for launch in self._launches:
                launch(changing)
        self._compiled = not interpreted()


def latent_attention(
    query: Tensor,
    key: LatentSide,
    value: LatentSide,
    *,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``reference.latent_attention``: same arguments, same results, in float32 whatever ``query`` is.

    ValueError if shapes do not fit together, matrices differ by batch element, or rows of codes are not padded and
    aligned to 16 bytes.
    """
    batch, q_heads, q_tokens, _ = query.shape
    output = torch.empty(batch, q_heads, q_tokens, value.up_proj.shape[-1], dtype=torch.float32, device=query.device)
    lse = torch.empty(batch, q_heads, q_tokens, dtype=torch.float32, device=query.device)
    if key.tokens == 0:
        _check(query, key, value)
        return output.zero_(), lse.fill_(-math.inf)
    plan, changing = _prepared(query, key, value, scaling, mask, softcap, None, False)
    nothing = dict.fromkeys(("exact", "exact_maxima", "exact_sums", "sink_logits"), lse)
    plan.run(changing | nothing | _out_arguments(output) | {"total_lse": lse})
    return output, lse


def attend_stored(
    query: Tensor,
    key: StoredSide,
    value: StoredSide,
    *,
    scaling: float,
    masks: tuple[Tensor | None, Tensor | None, Tensor | None],
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """See ``api.attend_stored``: ``[batch, q_heads, q_tokens, value_dim]`` in the dtype of ``query``."""
    assert key.latents is not None and value.latents is not None
    batch, q_heads, q_tokens, _ = query.shape
    sink_mask, mask, tail_mask = masks
    if sink_mask is None or tail_mask is None:
        sink_mask = tail_mask = None
    exact = "none" if tail_mask is None else "queries"
    plan, changing = _prepared(
        query, key.latents, value.latents, scaling, mask, softcap, exact, sink_logits is not None
    )
    pairs = (key.sinks, value.sinks, sink_mask), (key.tail, value.tail, tail_mask)
    changing["segments"] = tuple(_segment(*pair, query) for pair in pairs)
    changing["sink_mask"], changing["tail_mask"] = (_bytes_of(mask, query) for *_, mask in pairs)
    # Tokens first, as the model wants it; the interpreter cuts numbers off at bfloat16 instead of rounding.
    stored = torch.float32 if query.dtype == torch.bfloat16 and interpreted() else query.dtype
    output = torch.empty(batch, q_tokens, q_heads, value.latents.up_proj.shape[2], dtype=stored, device=query.device)
    output = output.transpose(1, 2)
    changing["sink_logits"] = query if sink_logits is None else sink_logits
    changing["total_lse"] = query
    changing.update(_out_arguments(output))
    plan.run(changing)
    return output.to(query.dtype)


def _prepared(
    query: Tensor, key: LatentSide, value: LatentSide, scaling: float, mask: Tensor | None, softcap: float | None,
    exact: str | None, sink_logits: bool,
) -> tuple[_Plan, dict[str, Any]]:  # fmt: skip
    """The plan of such calls, which the latents keep, and the arguments of this one that are known so far."""
    kind = "none"
    if mask is not None:
        mask = _expanded(mask, query)
        kind = "tokens" if query.shape[2] == 1 or mask.stride(2) == 0 else "queries"
    known = query.shape, query.dtype, scaling, softcap, kind, exact, sink_logits
    plan = key.plans.get(known)
    if plan is None or plan.value is not value:
        plan = key.plans[known] = _Plan(query, key, value, scaling, softcap, kind, exact, sink_logits)
    batch, query_stride, token = _mask_strides(mask)
    strides = {"mask_batch": batch, "mask_query": query_stride, "mask_token": token}
    return plan, {"query": _aligned(query.contiguous()), "mask": _bytes_of(mask, query), **strides}


def _segment(keys: Tensor, values: Tensor, mask: Tensor | None, query: Tensor) -> Segment:
    keys, values = _aligned(keys), _aligned(values)
    strides = [part.stride(axis) // 8 for part in (keys, values) for axis in range(3)]
    numbers = *strides, *_mask_strides(None if mask is None else _expanded(mask, query)), keys.shape[2]
    return Segment(keys, values, *map(unspecialised, numbers))


def _expanded(mask: Tensor, query: Tensor) -> Tensor:
    """``[batch, 1, q_tokens, tokens]`` for every element and query token, though they may share memory."""
    return mask.expand(query.shape[0], 1, query.shape[2], mask.shape[-1])


def _mask_strides(mask: Tensor | None) -> tuple[int, int, int]:
    """By batch element, query token and token."""
    return (0, 0, 0) if mask is None else (mask.stride(0), mask.stride(2), mask.stride(3))


def _bytes_of(mask: Tensor | None, query: Tensor) -> Tensor:
    """What kernels are given; without a mask anything stands in for it."""
    return query if mask is None else mask.view(torch.uint8)


def _out_arguments(output: Tensor) -> dict[str, Any]:
    batch, head, token, _ = output.stride()
    return {"out": output, "out_batch": batch, "out_head": head, "out_token": token}


def _aligned(tensor: Tensor) -> Tensor:
    """``tensor`` with rows that can be loaded 16 bytes at a time, as compiled kernels take for granted."""
    fits = tensor.data_ptr() % 16 == 0 and tensor.stride(3) == 1
    if fits and not any(tensor.stride(axis) % 8 for axis in range(3)):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _check(query: Tensor, key: LatentSide, value: LatentSide) -> None:
    for name, side in (("key", key), ("value", value)):
        check_side(name, side)
    heads, head_dim = key.up_proj.shape[1:]
    if query.shape[1] % heads or query.shape[3] != head_dim:
        raise ValueError(
            f"query must have a multiple of {heads} heads of {head_dim} numbers, got shape {tuple(query.shape)}"
        )
    if value.up_proj.shape[1] != heads or value.tokens != key.tokens:
        raise ValueError(
            f"value must have {heads} heads and {key.tokens} tokens like key, "
            f"got {value.up_proj.shape[1]} and {value.tokens}"
        )
