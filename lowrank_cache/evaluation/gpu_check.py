"""``lowrank-cache gpu-check``: do the Triton kernels compute rightly on this GPU, and how fast.

Six stages, each in a process of its own with a time limit, so that a sticky error or a hang fails one stage only. A
pass of the first four is noted for this user, and ``impl="auto"`` takes the kernels from then on. Without a GPU
everything runs in Triton's interpreter on small shapes: a dry run, which says nothing of any card.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, GemmaConfig, LlamaConfig

from lowrank_cache import LowRankCache, latent_attention
from lowrank_cache.calibration import calibrate
from lowrank_cache.evaluation.caches import tensor_bytes
from lowrank_cache.evaluation.report import Table
from lowrank_cache.evaluation.streaming import now
from lowrank_cache.kernels import api, trust
from lowrank_cache.kernels.packed import LatentSide, PackedTier, RotaryFrames, StoredSide, pack_latents, row_length
from lowrank_cache.kernels.rope import angle_tables

_DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}
_RIGHT = [*(f"kernels {name}" for name in _DTYPES), "kernels Llama", "cache"]  # compile most, so they run side by side
# At most so many seconds; nothing runs beside what is timed.
STAGES = {"facts": 30, "compile": 120, **dict.fromkeys(_RIGHT, 150), "operation": 90, "step": 120}
_MUST_PASS = ("facts", "compile", *_RIGHT)
_LLAMA = {8: 64, 4: 224, 2: 256}, {8: 64, 4: 256, 2: 320}  # channels by bits of keys and values at 8x


def gpu_check(out: Path, say: Callable[[str], object]) -> bool:
    """Run all stages and write ``report.md`` and ``report.json`` into ``out``; returns whether the first four passed.

    On a GPU a pass is recorded for this user, see ``kernels.trust``.
    """
    out.mkdir(parents=True, exist_ok=True)
    dry = not torch.cuda.is_available()
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TRITON_CACHE_DIR": folder}  # nothing compiled before
        if dry:
            environment["TRITON_INTERPRET"] = "1"
            say("no GPU: a dry run in Triton's interpreter, which says nothing of any card")
        together = [
            ["facts"],
            ["compile"],
            *([[name] for name in _RIGHT] if dry else [_RIGHT]),
            ["operation"],
            ["step"],
        ]
        for names in together:
            say(f"{', '.join(names)}: at most {STAGES[names[0]]} s")
            with ThreadPoolExecutor() as pool:
                done = pool.map(lambda name: _run(name, dry, STAGES[name], environment), names)
            for name, one in zip(names, done, strict=True):
                found[name] = one
                say(f"  {name}: {'passed' if one['passed'] else 'FAILED: ' + one['error'][-300:]}")
    passed = all(found[name]["passed"] for name in _MUST_PASS if name in found)
    if passed and not dry:
        say(f"recorded in {trust.record_pass(found['facts']['result']['class'])}")
    report = _report(found, passed, dry)
    (out / "report.md").write_text(report, encoding="utf-8")
    (out / "report.json").write_text(json.dumps({"passed": passed, "dry_run": dry, **found}, indent=1))
    say(report)
    return passed


def _run(name: str, dry: bool, limit: int, environment: dict[str, str]) -> dict[str, Any]:
    code = f"from lowrank_cache.evaluation.gpu_check import run_stage; run_stage({name!r}, {dry})"
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, timeout=limit
        )
        error = "" if done.returncode == 0 else done.stderr[-3000:]
        result = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    except subprocess.TimeoutExpired:
        error, result = f"took longer than {limit} s", None
    return {"passed": not error, "error": error, "result": result, "seconds": time.perf_counter() - start}


def run_stage(name: str, dry: bool) -> None:
    """One stage, in its own process: prints its result as one line of JSON, or raises."""
    torch.manual_seed(0)
    stages: dict[str, Callable[[torch.device, bool], dict[str, Any]]] = {
        "facts": _facts, "compile": _compile, "cache": _cache, "operation": _operation, "step": _step,
    }  # fmt: skip
    stages |= {f"kernels {kind}": partial(_kernels, kind) for kind in (*_DTYPES, "Llama")}
    stage = stages[name]
    with torch.no_grad():
        print(json.dumps(stage(torch.device("cpu" if dry else "cuda"), dry)))


def _facts(device: torch.device, dry: bool) -> dict[str, Any]:
    import triton

    found: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__}
    found |= {"transformers": transformers.__version__, "python": platform.python_version()}
    found["kernels"] = trust.kernels_digest()[:12]
    if dry:
        return {**found, "card": "none", "class": "none"}
    card = torch.cuda.get_device_properties(device)
    facts = {"card": card.name, "class": trust.card_class(device), "memory": card.total_memory}
    return {**found, **facts, "multiprocessors": card.multi_processor_count, "L2": card.L2_cache_size}


def _tiers(channels: dict[int, int], batch: int, tokens: int, device: torch.device) -> tuple[PackedTier, ...]:
    tiers = []
    for bits, count in channels.items():
        codes = torch.randint(0, 256, (batch, tokens, row_length(bits, count)), dtype=torch.uint8, device=device)
        steps = (torch.rand(batch, tokens, device=device) + 0.5).div_(2 ** (bits - 1)).half()
        tiers.append(PackedTier(bits, count, codes, steps))
    return tuple(tiers)


def _stored(
    device: torch.device, dtype: torch.dtype, tokens: int, *, batch: int = 1, heads: int = 8, head_dim: int = 128,
    frame: int | None = 64, layout: str = "half", channels: tuple[dict[int, int], dict[int, int]] = _LLAMA,
    joint: bool = False, tail: int = 150, up_dtype: torch.dtype = torch.float16,
) -> tuple[StoredSide, StoredSide]:  # fmt: skip
    """Random keys and values of one layer: four sinks, latents, and a tail."""
    tiers = [_tiers(each, batch, tokens, device) for each in channels]
    tiers[1] = tiers[0] if joint else tiers[1]
    rope = None
    if frame is not None:
        inv_freq = 500_000.0 ** (-torch.arange(head_dim // 2) * 2 / head_dim)
        cos, sin = (table.to(device) for table in angle_tables(torch.arange(0, tokens, frame)[None], inv_freq))
        rope = RotaryFrames(cos, sin, frame, layout)
    stored = []
    for packed, turned in zip(tiers, (rope, None), strict=True):
        rank = sum(tier.channels for tier in packed)
        up_proj = (torch.randn(rank, heads, head_dim, device=device) / rank**0.5).to(up_dtype)
        latents = LatentSide(packed, up_proj, torch.randn(heads, head_dim, device=device), turned)
        exact = [torch.randn(batch, heads, count, head_dim, device=device).to(dtype) for count in (4, tail)]
        stored.append(StoredSide(exact[0], latents, exact[1]))
    return stored[0], stored[1]


def _compile(device: torch.device, dry: bool) -> dict[str, Any]:
    """The first calls that a Llama-3.1-8B makes, and what they compile."""
    start, heads = now(device), 1 if dry else 8
    for length in (64, 1):
        key, value = _stored(device, torch.bfloat16, 70, frame=length, heads=heads, tail=9)
        query = torch.randn(1, 4 * heads, 1, 128, device=device).to(torch.bfloat16)
        api.attend_stored(query, key, value, scaling=0.1, impl="triton")
    attended = now(device) - start
    states, tiers = torch.randn(1, heads, 64, 128, device=device).to(torch.bfloat16), ((8, 16), (4, 32), (2, 64))
    down_proj, weight = torch.randn(heads * 128, 112, device=device).half(), torch.ones(112, device=device)
    mean = torch.zeros(heads, 128, device=device)
    api.encode([states], [mean], [None], down_proj, tiers, weight, torch.float16, impl="triton")
    compiled = list(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin" if not torch.version.hip else "*.hsaco"))
    return {"kernels": len(compiled), "attention_s": attended, "encoder_s": now(device) - start - attended}


def _cases(kind: str, dry: bool) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Name, query tokens, and what ``_stored`` takes beside them; lengths share compiled kernels, shapes do not."""
    if kind == "Llama":
        for tokens in () if dry else (1, 63, 64, 65, 300, 5000):
            yield f"{tokens} tokens", 1, {"tokens": tokens}
        if not dry:
            yield "batch 64", 1, {"tokens": 300, "batch": 64}
            yield "batch 3, 16 queries", 16, {"tokens": 300, "batch": 3, "frame": 128}
            yield "bases of float32", 1, {"tokens": 300, "up_dtype": torch.float32}
        return
    keys, values = {8: 5, 4: 33, 2: 70}, {8: 21, 4: 40, 2: 30}
    small: dict[str, Any] = {"heads": 2, "head_dim": 32, "channels": (keys, values), "tail": 9, "tokens": 70}
    if dry:
        yield "small", 1, {**small, "tokens": 40, "frame": 1 if kind == "float16" else 64}
        return
    for frame in (64, 128, 16, 1, None):
        yield f"small, frames of {frame}", 1, {**small, "frame": frame}
    yield "joint, interleaved, five queries", 5, {
        **small, "joint": True, "layout": "interleaved", "channels": (keys, keys),
    }  # fmt: skip


def _kernels(kind: str, device: torch.device, dry: bool) -> dict[str, Any]:
    """Attention, reconstruction and encoding against float64 on the same device."""
    worst: dict[str, float] = {}
    dtype = _DTYPES.get(kind, torch.bfloat16)
    for number, (name, q_tokens, sizes) in enumerate(_cases(kind, dry)):
        key, value = _stored(device, dtype, **sizes)
        assert key.latents is not None and value.latents is not None
        batch, heads, _, head_dim = key.tail.shape
        query = torch.randn(batch, 2 * heads, q_tokens, head_dim, device=device).to(dtype)
        counts = key.sinks.shape[2], key.latents.tokens, key.tail.shape[2]
        seen = tuple(torch.rand(batch, 1, q_tokens, count, device=device) > 0.2 for count in counts)
        options: dict[str, Any] = {"scaling": head_dim**-0.5}
        options["masks"] = (None, None, None) if number % 2 else seen
        wide = [StoredSide(side.sinks.double(), side.latents, side.tail.double()) for side in (key, value)]
        truth = api.attend_stored(query.double(), *wide, impl="reference", **options)
        first = api.attend_stored(query, key, value, impl="triton", **options)
        coarse = max(dtype, key.latents.up_proj.dtype, key=lambda one: torch.finfo(one).eps)
        _agree(name, first, truth, dtype if dtype == torch.float32 else coarse)
        for _ in range(1 if dry else 20):  # what differs from run to run is a race
            if not torch.equal(api.attend_stored(query, key, value, impl="triton", **options), first):
                raise AssertionError(f"{name}: two equal calls gave different numbers")
        worst[name] = float((first - truth).abs().max())
        wrong = replace(value.latents, constant=value.latents.constant + 0.5)
        planted = api.attend_stored(query, key, replace(value, latents=wrong), impl="triton", **options)
        if trust.disagreement(planted, truth, dtype) is None:
            raise AssertionError(f"{name}: a planted error was not seen")
        for side in (key.latents, value.latents) if number < 2 else ():
            states = api.reconstruct(side, dtype, impl="triton")
            _agree(f"{name}, reconstructed", states, api.reconstruct(side, torch.float64, impl="reference"), coarse)
    states = torch.randn(2, 2, 130, 32, device=device).to(dtype)
    tiers = ((8, 8), (4, 24), (2, 32))
    down_proj, weight = torch.linalg.qr(torch.randn(64, 64, device=device))[0], torch.ones(64, device=device)
    mean = torch.zeros(2, 32, device=device)
    packed = api.encode([states], [mean], [None], down_proj, tiers, weight, torch.float16, impl="triton")
    latents = states.double().transpose(1, 2).flatten(2) @ down_proj.double()
    _agree("encoded", packed, pack_latents(latents.float(), tiers, weight, torch.float16), dtype)
    return {"errors": worst}


def _agree(name: str, result: Any, truth: Any, dtype: torch.dtype) -> None:
    reason = trust.disagreement(result, truth, dtype)
    if reason is not None:
        raise AssertionError(f"{name}, {dtype}: {reason}")


def _cache(device: torch.device, dry: bool) -> dict[str, Any]:
    """Tiny models with a cache of full rank give the tokens of the full cache, in every mode."""
    sizes: dict[str, Any] = dict(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    sizes |= dict(num_key_value_heads=2, head_dim=16, initializer_range=0.15, bos_token_id=None, eos_token_id=None)
    gemma: Any = GemmaConfig
    configs = {"llama": LlamaConfig(**sizes), "gemma, eager": gemma(**sizes, attn_implementation="eager")}
    modes: dict[str, dict[str, Any]] = {"greedy": {}, "beams": {"num_beams": 3}, "padded": {}, "a question": {}}
    checked = []
    for name, config in list(configs.items())[: 1 if dry else None]:
        model = transformers.AutoModelForCausalLM.from_config(config).to(device).eval()
        ids = torch.randint(1, 128, (2, 14), device=device)
        with torch.enable_grad():
            projections = calibrate(model, [ids.repeat(1, 4)], frame_length=4, joint=False, progress=False)
        for mode, options in list(modes.items())[: 1 if dry else None]:
            mask = torch.ones_like(ids)
            if mode == "padded":
                mask[0, :5] = 0
            options |= dict(attention_mask=mask, max_new_tokens=6 if dry else 20, do_sample=False, pad_token_id=0)
            found = []
            for impl in (None, "triton"):
                cache: Any = DynamicCache(config=config)
                if impl is not None:
                    exact: dict[str, Any] = dict(latent_dtype=None, residual_length=4, num_sink_tokens=2, block_size=4)
                    cache = LowRankCache(model, projections, compression_ratio=1, **exact)
                given = ids
                with nullcontext() if impl is None else latent_attention(model, impl=impl):
                    if mode == "a question":  # more queries than the kernels take, over latents
                        model(ids, past_key_values=cache)
                        given = torch.cat([ids, ids.flip(1), ids], dim=1)
                        options["attention_mask"] = torch.ones_like(given)
                    found.append(model.generate(given, past_key_values=cache, **options))
            if not torch.equal(*found):
                raise AssertionError(f"{name}, {mode}: other tokens than with the full cache")
            checked.append(f"{name}, {mode}")
    return {"checked": checked}


def _microseconds(function: Callable[[], object], dry: bool) -> float:
    """Median time on the card, its second-level cache flushed before each call."""
    if dry:
        start = time.perf_counter()
        function()
        return 1e6 * (time.perf_counter() - start)
    from triton.testing import do_bench

    function(), function()  # the second call lays out what later ones use
    return 1e3 * do_bench(function, rep=30, return_mode="median")


def _operation(device: torch.device, dry: bool) -> dict[str, Any]:
    """One layer of Llama-3.1-8B at 8x: our attention beside dense attention, read once and as ``DynamicCache`` does."""
    lines, heads = [], 1 if dry else 8
    for tokens, batch in ((64, 1),) if dry else ((4096, 1), (32768, 1), (131072, 1), (32768, 8)):
        query = torch.randn(batch, 4 * heads, 1, 128, device=device).to(torch.bfloat16)
        line: dict[str, Any] = {"tokens": tokens, "batch": batch, **_dense(query, heads, tokens, dry)}
        for frame, joint in ((64, False),) if dry else ((64, False), (128, False), (256, False), (64, True)):
            channels = _LLAMA if not joint else ({bits: 2 * count for bits, count in _LLAMA[0].items()},) * 2
            sides = _stored(device, torch.bfloat16, tokens, batch=batch, heads=heads, frame=frame, joint=joint,
                            channels=channels)  # fmt: skip
            name = f"frames of {frame}{', joint' if joint else ''}"
            attend = partial(api.attend_stored, query, *sides, scaling=0.1, impl="triton")
            line[name] = _microseconds(attend, dry)
            if not dry and frame == 64 and not joint:
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(100):
                    attend()
                line["host"] = 1e4 * (time.perf_counter() - start)
        lines.append(line)
    return {"microseconds": lines}


def _dense(query: Tensor, heads: int, tokens: int, dry: bool) -> dict[str, float]:
    """Attention over dense keys and values, and the copy of them that ``DynamicCache`` makes."""
    keys = torch.randn(query.shape[0], heads, tokens, query.shape[3], device=query.device).to(query.dtype)
    values, new = torch.randn_like(keys), keys[:, :, :1]
    return {
        "dense": _microseconds(partial(scaled_dot_product_attention, query, keys, values, enable_gqa=True), dry),
        "cat": _microseconds(lambda: (torch.cat([keys, new], 2), torch.cat([values, new], 2)), dry),
    }


def _step(device: torch.device, dry: bool) -> dict[str, Any]:
    """Decode steps of random layers of Llama-3.1-8B's width."""
    layers = 1 if dry else 4
    sizes: dict[str, Any] = dict(
        hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16
    )
    if not dry:
        sizes = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)
    config = LlamaConfig(
        vocab_size=1024, num_hidden_layers=layers, max_position_embeddings=200_000, dtype=torch.bfloat16, **sizes
    )
    with device:
        model: Any = transformers.LlamaForCausalLM(config).eval()
    model = model.to(torch.bfloat16)
    ids = torch.randint(0, 1024, (8, 600 if dry else 32768), device=device)
    with torch.enable_grad():
        projections = calibrate(
            model, ids[:1, :3072].split(1024, dim=1), layer_group_size=1, joint=False, progress=False
        )
    lines = []
    for batch, context in ((1, 300),) if dry else ((1, 4096), (1, 32768), (8, 16384)):
        for name in ("weights alone", "full", "full, cuDNN attention", "triton", "torch"):
            if name == "torch" and context > 4096 or name.endswith("cuDNN attention") and (dry or context > 4096):
                continue
            if not dry:
                torch.backends.cuda.enable_cudnn_sdp(name.endswith("cuDNN attention"))
            impl = name if name in ("triton", "torch") else None
            cache: Any = DynamicCache(config=config) if impl is None else LowRankCache(model, projections)
            with nullcontext() if impl is None else latent_attention(model, impl=impl):
                tokens = ids[:batch, : 1 if name == "weights alone" else context]
                start = now(device)
                model(tokens, past_key_values=cache, logits_to_keep=1)
                line: dict[str, Any] = {"batch": batch, "context": context, "cache": name}
                line["prefill_ms"] = 1e3 * (now(device) - start)
                step = partial(model, tokens[:, :1], past_key_values=cache)
                line |= _timed_steps(step, device, 2 if dry else 30)
            line["bytes"] = cache.stored_bytes() if impl is not None else tensor_bytes(cache)
            lines.append(line)
            del cache, step  # the next one needs their memory
    return {"layers": layers, "steps": lines}


def _timed_steps(step: Callable[[], object], device: torch.device, count: int) -> dict[str, Any]:
    step(), step()
    walls, hosts = [], []
    for _ in range(count):
        start = now(device)
        step()
        hosts.append(time.perf_counter() - start)
        walls.append(now(device) - start)
    found: dict[str, Any] = {"wall_ms": 1e3 * statistics.median(walls), "host_ms": 1e3 * statistics.median(hosts)}
    if device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step(), step()
            torch.cuda.synchronize()
        events = [event for event in profile.key_averages() if event.self_device_time_total > 0]
        found["gpu_ms"] = sum(event.self_device_time_total for event in events) / 2e3
        found["launches"] = sum(event.count for event in events) / 2
    return found


def _report(found: dict[str, dict[str, Any]], passed: bool, dry: bool) -> str:
    outcome = "DRY RUN on the CPU, no verdict on any card" if dry else "PASSED" if passed else "FAILED"
    lines = [f"# gpu-check: {outcome}", "", "Printed by `lowrank-cache gpu-check --out DIR`.", ""]
    stages = [[name, "passed" if one["passed"] else "failed", f"{one['seconds']:.0f}"] for name, one in found.items()]
    lines += [Table(["stage", "outcome", "seconds"], stages).markdown(), ""]
    for name, one in found.items():
        if not one["passed"]:
            lines += [f"## {name} failed", "", "```", one["error"].strip(), "```", ""]
    if found["facts"]["passed"]:
        lines += [", ".join(f"{name} {value}" for name, value in found["facts"]["result"].items()), ""]
    if found["compile"]["passed"]:
        one = found["compile"]["result"]
        lines += [f"First calls: {one['kernels']} kernels compiled, {one['attention_s']:.1f} s for attention, "
                  f"{one['encoder_s']:.1f} s for encoding.", ""]  # fmt: skip
    for stage, entries in (("operation", "microseconds"), ("step", "steps")):
        if found[stage]["passed"]:
            lines += [f"## {stage}", "", _table(found[stage]["result"][entries]).markdown(), ""]
    return "\n".join(lines)


def _table(entries: list[dict[str, Any]]) -> Table:
    head = list(dict.fromkeys(name for entry in entries for name in entry))
    cells = [[entry.get(name, "–") for name in head] for entry in entries]
    return Table(head, [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in line] for line in cells])
