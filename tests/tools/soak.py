"""Many random generation calls in one process, against the full cache.

    python -m tests.tools.soak --calls 2000 --seed 0

Call ``i`` follows from the seed and ``i`` alone: ``--only i`` runs a failing call by itself, ``--start i`` resumes.
Every call draws a family, a way of generating, bases and sizes, and is made twice:

- with full-rank bases, tokens and logits must be those of DynamicCache; what transformers refuses with
  DynamicCache must be refused in the same words;
- with lossy ones, logits must be finite, and attention to latents must agree with reconstructed states;
- bytes must be those of the tensors held, and the second run must equal the first bit for bit;
- after it, no tensor, hook or attention function may be left, and memory must stay what it was.
"""

import argparse
import contextlib
import copy
import functools
import gc
import random
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from lowrank_cache import LowRankCache, latent_attention
from lowrank_cache.cache import LowRankLayer
from lowrank_cache.probe import decoder_of
from tests.cache.test_attention import RECONSTRUCTED
from tests.oracle.inside import wrapped_attention
from tests.oracle.memory import held_bytes, live_tensors
from tests.oracle.models import FAMILIES, MORE_FAMILIES, exact_cache, full_rank_projections, random_tokens, tiny_model
from tests.oracle.tolerance import REFERENCE_FACTOR, rounding_band

# Frame length, layer group size, joint, method.
BASES = [
    (1, 1, None, "fisher"),
    (4, 1, False, "fisher"),
    (4, 2, True, "fisher"),
    (16, (1, 2), False, "fisher"),
    (1, 1, None, "palu"),
    (1, 1, None, "recalkv"),
]
MODES = ["greedy", "sampling", "several", "beams", "chunks", "lookup", "assisted", "padded", "forwards", "forwards"]
PRELUDES = ["none", "none", "chat", "prefix", "cropped", "reset"]
CHANGES_FREQUENCIES = {"llama-dynamic", "phi3"}  # with the length, in a buffer of the model that every run shares
MOST_FAILURES = 5  # then it stops
RSS_GROWTH = 128 << 20  # bytes: the allocator's own, and projections made on the way


@dataclass(frozen=True)
class Call:
    """What one call does."""

    seed: int
    family: str
    mode: str
    prelude: str
    attend: bool
    exact: bool
    bases: tuple | None  # None for xkv
    batch: int
    prompt: int
    new: int
    sizes: dict[str, int]
    lossy: dict = field(default_factory=dict)


def draw(seed: int, number: int) -> Call:
    """The call of this number."""
    rng = random.Random(f"{seed}/{number}")
    family, mode = rng.choice([*FAMILIES, *MORE_FAMILIES]), rng.choice(MODES)
    exact, bases = rng.random() < 0.5, rng.choice(BASES)
    if not exact and rng.random() < 0.2:
        bases = None
    # Speculative decoding of transformers feeds the whole prompt again, whatever is cached; the others take one batch.
    prelude = rng.choice(PRELUDES) if mode in ("greedy", "sampling") else "none"
    batch = 1 if mode in ("lookup", "assisted") else rng.randint(2, 3) if mode == "padded" else rng.randint(1, 3)
    sizes = {name: rng.randint(low, high) for name, low, high in (("residual_length", 0, 6), ("num_sink_tokens", 0, 4))}
    return Call(
        seed=rng.randrange(1 << 20),
        family=family,
        mode=mode,
        prelude=prelude,
        attend=family not in RECONSTRUCTED and rng.random() < 0.5,
        exact=exact,
        bases=bases,
        batch=batch,
        prompt=rng.randint(6, 18),
        new=rng.randint(2, 10),
        sizes={**sizes, "block_size": rng.randint(1, 5)},
        lossy={"compression_ratio": rng.choice([1.3, 2.0, 3.0]), "bits": rng.choice([None, None, 16, 8, 4])},
    )


@functools.cache
def model_of(family: str) -> PreTrainedModel:
    return tiny_model(family)


@functools.cache
def assistant_of(family: str) -> PreTrainedModel:
    """A model that agrees with the family's most of the time."""
    assistant, noise = tiny_model(family), torch.Generator().manual_seed(1)
    for parameter in assistant.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=noise)
    assistant.generation_config.num_assistant_tokens = 3
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    return assistant


@functools.cache
def allowed_error(family: str, bases: tuple) -> float:
    """How far logits of a full-rank cache may be from DynamicCache's in float32, see ``tests.oracle.tolerance``."""
    tokens = random_tokens(2, 22, seed=5)
    exact, rounded = tiny_model(family, torch.float64), tiny_model(family)
    error = float((exact(tokens).logits - rounded(tokens).logits.double()).abs().max())
    # Both are that far from the truth, on other texts than the one measured here.
    return REFERENCE_FACTOR * (2 * error + rounding_band(family, *bases))


def make_cache(call: Call, model: PreTrainedModel, attend: str | None = None) -> LowRankCache:
    attend = attend or ("auto" if call.attend else "reconstruct")
    if call.bases is None:
        options = {"method": "xkv", "layer_group_size": 2, "ranks": 6, **call.sizes}
        return LowRankCache(model, bits=call.lossy["bits"], **options)
    projections = full_rank_projections(call.family, *call.bases)
    if call.exact:
        return exact_cache(model, projections, attend=attend, **call.sizes)
    try:
        return LowRankCache(model, projections, attend=attend, **call.sizes, **call.lossy)
    except ValueError as error:
        if "largest reachable ratio" not in str(error):
            raise
        return LowRankCache(model, projections, compression_ratio=1.0, attend=attend, **call.sizes)


def all_compressed(cache: Cache) -> bool:
    return all(type(layer) is LowRankLayer for layer in cache.layers)  # hybrid ones keep states that go one way


@dataclass
class Outcome:
    """Tokens ``[rows, length]`` and the logits of each step, or a refusal's type and words."""

    sequences: Tensor | None = None
    logits: list[Tensor] = field(default_factory=list)
    refusal: tuple[type, str] | None = None
    cache: Cache | None = None


def run(call: Call, make, plain: bool) -> Outcome:
    """Make the call with a cache from ``make``; ``plain``: whether its layers can be cropped and rows changed."""
    torch.manual_seed(call.seed)
    model = model_of(call.family)
    for module in model.modules():
        if hasattr(module, "rope_deltas"):
            module.rope_deltas = None  # of the rows of another call
    cache = make(model)
    try:
        with torch.no_grad():
            if call.mode == "forwards":
                return forwards(call, model, cache, plain)
            return generated(call, model, cache, plain)
    except (ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
        return Outcome(refusal=(type(error), str(error)))


def generated(call: Call, model: PreTrainedModel, cache: Cache, plain: bool) -> Outcome:
    tokens = random_tokens(call.batch, call.prompt, call.seed)
    if call.mode == "lookup":
        tokens = tokens[:, :5].repeat(1, 4)[:, : call.prompt]
    tokens, cache = after_prelude(call, model, cache, tokens, plain)
    options: dict = {
        "greedy": {},
        "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
        "several": {"do_sample": True, "num_return_sequences": 2},
        "beams": {"num_beams": 2, "num_return_sequences": 2},
        "chunks": {"prefill_chunk_size": 4},
        "lookup": {"prompt_lookup_num_tokens": 3},
        "assisted": {"assistant_model": assistant_of(call.family) if call.mode == "assisted" else None},
        "padded": {},
    }[call.mode]
    if call.mode == "padded":
        lengths = [call.prompt, *(1 + (call.seed + row) % call.prompt for row in range(call.batch - 1))]
        mask = torch.stack([(torch.arange(call.prompt) >= call.prompt - length).long() for length in lengths])
        tokens, options = tokens * mask, {"attention_mask": mask}
    # Said here, for generate takes the token 0, which the model may well have given, for padding.
    options = {"attention_mask": torch.ones_like(tokens), **options}
    options = {"do_sample": False, "max_new_tokens": call.new, **options}
    result = model.generate(tokens, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **options)
    return Outcome(result.sequences, list(result.logits), cache=cache)


def after_prelude(
    call: Call, model: PreTrainedModel, cache: Cache, tokens: Tensor, plain: bool
) -> tuple[Tensor, Cache]:
    """What went on with the cache before the call, and the tokens to go on with."""
    if call.prelude == "chat":
        first = model.generate(tokens, past_key_values=cache, max_new_tokens=3, do_sample=False)
        return torch.cat([first, random_tokens(call.batch, 4, call.seed + 1)], dim=1), cache
    if call.prelude == "prefix":
        model(tokens[:, :-2], past_key_values=cache)
        return tokens, copy.deepcopy(cache)
    if call.prelude == "cropped" and plain:
        model(torch.cat([tokens[:, :-2], tokens[:, :3]], dim=1), past_key_values=cache)
        cache.crop(-3)
    if call.prelude == "reset":
        model(random_tokens(2, 11, call.seed + 2), past_key_values=cache)
        cache.reset()
    return tokens, cache


def forwards(call: Call, model: PreTrainedModel, cache: Cache, plain: bool) -> Outcome:
    """Forwards of given tokens, and between them whatever may happen to a cache."""
    rng, rows, logits = random.Random(call.seed), call.batch, []
    events = ["none", "copy", "crop", "interrupt", "reorder", "select", "repeat"] if plain else ["none", "copy"]
    if any(hasattr(module, "rope_deltas") for module in model.modules()):
        events = events[:4]  # the model itself keeps a number of every row, and no cache can tell it of other rows
    for step in range(rng.randint(4, 8)):
        tokens = random_tokens(rows, rng.choice([1, 1, 2, 5, 9]), call.seed + step)
        logits.append(model(tokens, past_key_values=cache).logits.flatten(0, 1))
        event, picked, where = rng.choice(events), [rng.randrange(rows) for _ in range(rows)], rng.random()
        if event == "copy":
            cache = copy.deepcopy(cache)
        elif event == "crop":
            cache.crop(-min(rng.randint(0, 6), cache.get_seq_length() - 1))
        elif event == "reorder":
            cache.reorder_cache(torch.tensor(picked))
        elif event == "select":
            cache.batch_select_indices(torch.tensor(picked[:2]))
            rows = min(rows, 2)
        elif event == "repeat" and rows == 1:
            cache.batch_repeat_interleave(2)
            rows = 2
        elif event == "interrupt" and isinstance(cache, LowRankCache) and call.family not in CHANGES_FREQUENCIES:
            interrupted_forward(model, cache, tokens, where)
    if plain:
        cache.crop(0)  # an interrupted forward keeps states of its own until the next use
    return Outcome(None, logits, cache=cache)


def interrupted_forward(model: PreTrainedModel, cache: LowRankCache, tokens: Tensor, where: float) -> None:
    layers = [module for module in model.modules() if hasattr(module, "layer_idx")]

    def interrupt(*args):
        raise KeyboardInterrupt

    before = cache.get_seq_length()
    handle = layers[int(where * len(layers))].register_forward_pre_hook(interrupt)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            model(tokens, past_key_values=cache)
    finally:
        handle.remove()
    assert cache.get_seq_length() == before


def check(call: Call) -> str:
    """Make one call, and raise AssertionError if anything about it is wrong; returns what it came to."""
    model = model_of(call.family)
    plain = all_compressed(make_cache(call, model))
    first = run(call, functools.partial(make_cache, call), plain)
    first.cache = None
    left = after_all()
    second = run(call, functools.partial(make_cache, call), plain)
    assert_same(first, second)
    assert_bytes(second)
    del first
    second.cache = None
    assert after_all() == left, f"tensors left by the call: {left} before, {after_all()} after"
    assert not wrapped_attention() and not decoder_of(model)._forward_pre_hooks
    if call.exact:
        return compare(call, second, run(call, lambda model: DynamicCache(config=model.config), plain))
    if second.refusal is not None:
        stock = run(call, lambda model: DynamicCache(config=model.config), plain)
        assert second.refusal == stock.refusal, f"{second.refusal}, DynamicCache: {stock.refusal}"
        return "refused"
    assert all(bool(torch.isfinite(step).all()) for step in second.logits), "logits must be finite"
    if call.attend and call.mode == "forwards":
        other = run(call, functools.partial(make_cache, call, attend="reconstruct"), plain)
        with latent_attention(model, impl="torch"):
            attended = run(call, functools.partial(make_cache, call), plain)
        assert_close_bulk(attended.logits, other.logits)
        # Compiled attention rounds queries and weights to 8 bits, which moves a score by a few thousandths.
        one, other_one = torch.cat(second.logits), torch.cat(attended.logits)
        moved = float((one - other_one).norm() / other_one.norm())
        assert moved <= 5e-2, f"compiled attention moved logits by {moved:.3g} of their size"
    return "lossy"


def after_all() -> tuple[int, int]:
    """How many tensors the process holds, and their bytes."""
    tensors = live_tensors()
    return len(tensors), sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def assert_same(first: Outcome, second: Outcome) -> None:
    assert first.refusal == second.refusal, f"{first.refusal}, then {second.refusal}"
    assert (first.sequences is None) == (second.sequences is None)
    assert first.sequences is None or torch.equal(first.sequences, second.sequences), "another run, other tokens"
    for one, other in zip(first.logits, second.logits, strict=True):
        assert torch.equal(one, other), "another run, other logits"


def assert_bytes(outcome: Outcome) -> None:
    linear = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in getattr(outcome.cache, "layers", ()))
    if isinstance(outcome.cache, LowRankCache) and not linear:  # whose states are not counted
        assert outcome.cache.stored_bytes() == held_bytes(outcome.cache) > 0
        assert outcome.cache.compression_ratio() == outcome.cache.full_bytes() / held_bytes(outcome.cache)


def compare(call: Call, ours: Outcome, stock: Outcome) -> str:
    """Tokens and logits must be the full cache's; rounding may turn a token if the logits before it agree."""
    assert ours.refusal == stock.refusal, f"{ours.refusal}, DynamicCache: {stock.refusal}"
    if stock.refusal is not None:
        return "refused"
    allowed = allowed_error(call.family, call.bases)
    steps = min(len(ours.logits), len(stock.logits))
    mine, theirs = ours.logits, stock.logits
    if call.mode in ("lookup", "assisted"):  # a step may bring several tokens, and other ones
        mine, theirs = (list(torch.cat([step.flatten(0, -2) for step in each]).split(1)) for each in (mine, theirs))
        steps = min(len(mine), len(theirs))
    turned = ours.sequences is not None and not torch.equal(ours.sequences, stock.sequences)
    if turned:
        assert call.mode not in ("beams", "several"), "other tokens than DynamicCache's"
        assert ours.sequences.shape == stock.sequences.shape
        differs = (ours.sequences != stock.sequences).any(0).nonzero()
        steps = int(differs[0]) - (ours.sequences.shape[1] - call.new) + 1
    else:
        assert len(mine) == len(theirs)
    for step in range(steps):
        error = float((mine[step] - theirs[step]).abs().max())
        assert error <= allowed, f"logits of step {step} are {error:.3g} from DynamicCache's, allowed {allowed:.3g}"
    return "turned by rounding" if turned else "exact"


def assert_close_bulk(attended: list[Tensor], reconstructed: list[Tensor]) -> None:
    """The same numbers in another order; a level that flips on a tie changes a latent by a whole step."""
    one, other = torch.cat(attended), torch.cat(reconstructed)
    assert float((one - other).abs().median()) <= 1e-5 * float(other.abs().max()), "attended, not as reconstructed"
    assert float((one - other).norm()) <= 2e-2 * float(other.norm()), "attended, not as reconstructed"


@functools.cache
def prepare(family: str, bases: tuple | None, mode: str) -> None:
    """Make what later calls share, and let the garbage collector look away from it, which saves most of its time."""
    model_of(family)
    if bases is not None:
        full_rank_projections(family, *bases)
        allowed_error(family, bases)
    if mode == "assisted":
        assistant_of(family)
    gc.collect()
    gc.freeze()


def rss() -> int:
    """Bytes of memory that the process has."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096 if statm.exists() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="Number of the first call.")
    parser.add_argument("--only", type=int, help="Make this one call.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    numbers = range(arguments.start, arguments.calls)
    if arguments.only is not None:
        numbers = range(arguments.only, arguments.only + 1)
    began, results, settled = time.perf_counter(), Counter(), 0
    for made, number in enumerate(numbers):
        call = draw(arguments.seed, number)
        try:
            prepare(call.family, call.bases, call.mode)
            results[check(call)] += 1
        except Exception:
            traceback.print_exc(limit=-3)
            print(
                f"call {number} failed: {call}\n  python -m tests.tools.soak --seed {arguments.seed} --only {number}\n"
            )
            results["FAILED"] += 1
            if results["FAILED"] == MOST_FAILURES:
                return 1
        if made == len(numbers) // 2:  # by then every family and kind of bases has been seen
            settled = rss()
        if made % 100 == 99:
            print(
                f"{made + 1} calls, {time.perf_counter() - began:.0f} s, {rss() >> 20} MiB, {dict(results)}", flush=True
            )
    grown = rss() - settled
    print(f"{len(numbers)} calls in {time.perf_counter() - began:.0f} s: {dict(results)}; grown by {grown >> 20} MiB")
    if grown > RSS_GROWTH:
        print(f"memory must not grow by more than {RSS_GROWTH >> 20} MiB in the second half")
        return 1
    return 1 if results["FAILED"] else 0


if __name__ == "__main__":
    status = main()
    gc.unfreeze()
    sys.exit(status)
