"""The ``lowrank-cache`` command and its sub-commands: arguments and messages."""

import platform
import re
import time
from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from inspect import Parameter, Signature, signature
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

import torch
import typer
from rich.console import Console
from typer.core import TyperGroup

from lowrank_cache import Projections, calibration
from lowrank_cache.calibration.collect import NoGradientError
from lowrank_cache.calibration.text import mixed_batches
from lowrank_cache.evaluation import inputs
from lowrank_cache.evaluation.bench import WEIGHTS_ALONE, BenchSettings
from lowrank_cache.evaluation.bench import bench as run_bench
from lowrank_cache.evaluation.caches import GRAMMAR, CacheSizes
from lowrank_cache.evaluation.demo import DownloadError, run_demo
from lowrank_cache.evaluation.evaluate import EvaluationSettings, run_evaluation
from lowrank_cache.evaluation.gpu_check import gpu_check as run_gpu_check
from lowrank_cache.evaluation.inputs import Run, load_model, load_text
from lowrank_cache.evaluation.inspection import inspect_projections, plot_projections
from lowrank_cache.evaluation.streaming import processor
from lowrank_cache.evaluation.tasks import TASKS
from lowrank_cache.kernels import native


class _Commands(TyperGroup):
    """Print what is wrong with an input or the machine as one message; let a bug keep its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, NotImplementedError, ImportError, OSError, DownloadError, NoGradientError) as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    help="A KV cache of quantized low-rank latents for Hugging Face transformers.", cls=_Commands, no_args_is_help=True,
    pretty_exceptions_enable=False,
)  # fmt: skip
PACKAGES = "lowrank-cache torch transformers triton accelerate safetensors huggingface_hub bitsandbytes numpy".split()
EVAL_CACHES = ["full", "quantized-fp8", "fisher:8"]
BENCH_CACHES = ["full", WEIGHTS_ALONE, "quantized-fp8", "fisher:8,groups=1,frame=64,joint=0", "fisher:10"]
Cache = Annotated[list[str] | None, typer.Option(help=f"A cache to measure, repeatable: a baseline or {GRAMMAR}.")]
BenchCache = Annotated[
    list[str] | None,
    typer.Option(help=f"As for eval, or {WEIGHTS_ALONE}; ',attend=0' at the end reconstructs keys and values."),
]
Out = Annotated[Path, typer.Option(help="Folder of the results; rerunning resumes.")]
Ready = Annotated[list[str] | None, typer.Option(help="Ready projections: folder or hub repository; one of a method.")]
Ratio = Annotated[float, typer.Option(help="Target compression ratio per token in latents.")]


def _takes(*parts: type) -> Callable[[Any], Any]:
    """Give a command that takes ``**options`` the annotated fields of dataclasses as options."""

    def with_options(command: Any) -> Any:
        own = [one for one in signature(command).parameters.values() if one.kind is not Parameter.VAR_KEYWORD]
        more = [
            Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
            for field in chain(*map(fields, parts))
            if get_origin(field.type) is Annotated
        ]
        command.__signature__ = Signature([*own, *more])
        return command

    return with_options


def _made(kind: type, options: dict[str, Any], **more: Any) -> Any:
    """One of the dataclasses of ``_takes``, from those of the options that are its fields."""
    names = {field.name for field in fields(kind)}
    return kind(**{name: value for name, value in options.items() if name in names}, **more)


@app.command()
def env() -> None:
    """Print the versions that a bug report should name."""
    typer.echo(f"Python {platform.python_version()}, {platform.platform()}, {platform.machine()}")
    for name in PACKAGES:
        try:
            typer.echo(f"{name} {version(name)}")
        except PackageNotFoundError:
            typer.echo(f"{name} is not installed")
    accelerators = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    typer.echo(f"processor: {processor()}")
    typer.echo(f"attention on CPUs: {native.build().description}")
    typer.echo(f"accelerators: {', '.join(accelerators) or 'none'}; {torch.get_num_threads()} threads")


@app.command()
def gpu_check(out: Annotated[Path, typer.Option(help="Folder of report.md and report.json.")]) -> None:
    """Check the Triton kernels on this GPU, and time them; a pass makes caches use them."""
    if not run_gpu_check(out, typer.echo):
        raise typer.Exit(1)


@app.command()
def demo(
    calibrate_on: inputs.CalibrateOn = None,
    out: Annotated[Path, typer.Option(help="Folder for the projections.")] = Path("artefacts/demo"),
    ratio: Ratio = 8.0,
) -> None:
    """Calibrate a small real model, then generate with its full cache and with both presets."""
    run_demo(out, load_text(calibrate_on), ratio)


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="Name on the hub, or folder, of a decoder-only model.")],
    out: Annotated[Path, typer.Option(help="Folder for the projections.")],
    calibrate_on: inputs.CalibrateOn = None,
    tokens: inputs.Tokens = inputs.CALIBRATION_TOKENS,
    window: Annotated[int, typer.Option(help="Tokens per calibration sequence.")] = 512,
    recall_share: inputs.RecallShare = 0.5,
    seed: Annotated[int, typer.Option(help="Of the generated look-ups.")] = 0,
    method: Annotated[str | None, typer.Option(help="How bases are found: fisher (default), palu or recalkv.")] = None,
    preset: Annotated[
        Literal["default", "smallest", "fastest"], typer.Option(help="Defaults of the next three options.")
    ] = "default",
    frame_length: Annotated[int | None, typer.Option(help="Tokens per rotary frame; 1 stores pre-RoPE keys.")] = None,
    layer_group_size: Annotated[
        str | None, typer.Option(help="Layers that share a latent: a number, KEYS,VALUES or auto.")
    ] = None,
    joint: Annotated[bool | None, typer.Option(help="Share a latent of keys and values; fisher's default.")] = None,
    refit_ratio: Annotated[
        float | None, typer.Option(help="Ratio at 16 bits for recalkv's values; 3 by default.")
    ] = None,
    save_moments: Annotated[Path | None, typer.Option(help="File for the statistics, for eval and bench.")] = None,
    sensitivity: inputs.Sensitivity = "gradient",
    dtype: inputs.Dtype = "auto",
    device: inputs.Device = None,
) -> None:
    """Calibrate projections for MODEL on text and save them."""
    options: dict[str, Any] = {
        "method": method, "frame_length": frame_length, "layer_group_size": _group_size(layer_group_size),
        "joint": joint, "refit_ratio": refit_ratio, "save_moments": save_moments, "sensitivity": sensitivity,
    }  # fmt: skip
    options = calibration.PRESETS[preset] | {name: value for name, value in options.items() if value is not None}
    prose, source = load_text(calibrate_on)
    typer.echo(f"Text: {source}")
    loaded, tokenizer, _ = load_model(model, typer.echo, dtype, device)
    mixed = mixed_batches(tokenizer, prose, tokens=tokens, window=window, recall_share=recall_share, seed=seed)
    facts = {"text": source, "recall_share": recall_share, "seed": seed}
    start = time.perf_counter()  # recalkv reads the batches twice
    projections = calibration.calibrate(loaded, list(mixed), provenance=facts, **options)
    typer.echo(f"Calibrated in {time.perf_counter() - start:.0f} s on {torch.get_num_threads()} threads.")
    projections.save_pretrained(out)
    typer.echo(f"Saved to {out}. 'lowrank-cache inspect {out}' describes it.")


@app.command()
def inspect(
    projections: Annotated[str, typer.Argument(help="Folder or hub repository of projections.")],
    ratio: Ratio = 8.0,
    plot: Annotated[Path | None, typer.Option(help="PNG to draw bits per layer and predicted loss into.")] = None,
) -> None:
    """Show what PROJECTIONS store at a ratio: ranks and bits per layer, predicted loss, bytes."""
    if not Path(projections).is_dir() and projections.count("/") != 1:
        raise ValueError(f"PROJECTIONS must be a folder or a repository OWNER/NAME on the hub, got {projections!r}")
    loaded = Projections.from_pretrained(projections)
    inspection, console = inspect_projections(loaded, ratio), Console()
    console.print(f"{loaded.method}, frames of {loaded.frame_length}, for {loaded.shape.model_type}")
    console.print(inspection.table())
    console.print(inspection.summary())
    if plot is not None:
        plot_projections(loaded, ratio, plot)
        console.print(f"Drawn into {plot}")


@app.command(name="eval")
@_takes(Run, EvaluationSettings)
def evaluate(
    cache: Cache = None,
    out: Out = Path("artefacts/eval"),
    projections: Ready = None,
    device: inputs.Device = None,
    lengths: Annotated[
        str, typer.Option(help="Tokens of contexts, by commas; empty for no tasks, bytes, times.")
    ] = "1024,2048,4096",
    tasks: Annotated[str, typer.Option(help="Long-context tasks, separated by commas.")] = ",".join(TASKS),
    needles: Annotated[
        list[str] | None, typer.Option(help="TOKENS:QUESTIONS about codes in prose; repeatable.")
    ] = None,
    **options: Any,
) -> None:
    """Evaluate caches on MODEL: perplexity, look-ups, long-context tasks, bytes and times, as a report."""
    sizes = _numbers("lengths", lengths) if lengths else ()
    asked = {"tasks": tuple(map(str.strip, tasks.split(","))), "needles": _needles(needles or [])}
    settings = _made(EvaluationSettings, options, lengths=sizes, **asked)
    run = _made(Run, options, out=out, projections=tuple(projections or ()), device=device)
    run_evaluation(run, cache or EVAL_CACHES, settings, typer.echo)


@app.command()
@_takes(Run, CacheSizes)
def bench(
    cache: BenchCache = None,
    out: Out = Path("artefacts/bench"),
    projections: Ready = None,
    device: inputs.Device = None,
    contexts: Annotated[str, typer.Option(help="Tokens in the cache, separated by commas.")] = "1024,4096,8192",
    batches: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,4",
    new_tokens: Annotated[int, typer.Option(help="Timed decode steps of each cache.")] = 24,
    threads: Annotated[int, typer.Option(help="Threads of PyTorch.")] = 1,
    **options: Any,
) -> None:
    """Time prefill and decoding of compressed caches against the full cache, and count their bytes."""
    sizes = {"contexts": _numbers("contexts", contexts), "batches": _numbers("batches", batches)}
    settings = _made(BenchSettings, options, new_tokens=new_tokens, threads=threads, **sizes)
    run = _made(Run, options, out=out, projections=tuple(projections or ()), device=device)
    run_bench(run, cache or BENCH_CACHES, settings, typer.echo)


def _group_size(given: str | None) -> int | str | tuple[int, ...] | None:
    """``"5"`` → 5, ``"2,5"`` → (2, 5); other words are left to ``calibrate`` to judge."""
    if given is None or not all(part.strip().isdigit() for part in given.split(",")):
        return given
    sizes = _numbers("layer_group_size", given)
    return sizes[0] if len(sizes) == 1 else sizes


def _numbers(name: str, given: str) -> tuple[int, ...]:
    parts = [part.strip() for part in given.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{name} must be positive integers separated by commas, got {given!r}")
    return tuple(int(part) for part in parts)


def _needles(given: list[str]) -> tuple[tuple[int, ...], ...]:
    """``["1024:16", "4096:8"]`` → ((1024, 16), (4096, 8))."""
    if not all(re.fullmatch(r"\d+:\d+", text) for text in given):
        raise ValueError(f"needles must be TOKENS:QUESTIONS, e.g. 1024:16, got {given}")
    return tuple(tuple(map(int, text.split(":"))) for text in given)
