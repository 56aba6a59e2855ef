"""``hf-lowrank``: lm-eval's Hugging Face model, whose contexts are read from a cache that was filled by streaming.

lm-eval scores a context and its continuation in one forward, which attends exactly to its own tokens: with a compressed
cache nothing would be lost, whatever it stores. Here contexts and continuations go through the cache ``chunk`` tokens a
forward, for the full cache too, so that both are measured on one path.

``python -m`` this file is lm-eval's command line with this model and with look-ups as tasks: lm-eval finds models by a
registry that only running code can add to, so its own command does not know this one. Needs the package lm-eval, which
nothing else of this project imports.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lowrank_cache import Projections
from lowrank_cache.evaluation.caches import BASELINES, cache_entry
from lowrank_cache.evaluation.streaming import branch, feed, fill, padded
from lowrank_cache.probe import cache_argument

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError('hf-lowrank needs lm-eval: pip install "lowrank-cache[lm-eval]"') from error

__all__ = ["TASKS", "LowRankLM", "main", "register"]

TASKS = Path(__file__).parent / "lm_eval_tasks"  # look-ups, which need no network
_log = logging.getLogger(__name__)
Request = tuple[Any, list[int], list[int]]  # a key for lm-eval's own cache, context and continuation


def register() -> None:
    """Make lm-eval know ``hf-lowrank``; to be called once before its command line or ``simple_evaluate``."""
    register_model("hf-lowrank")(LowRankLM)


class LowRankLM(HFLM):
    """A causal language model of transformers with a lossy prefill.

    Args:
        pretrained: As for lm-eval's ``hf``, whose other arguments are taken too.
        cache: ``"lowrank"``, or a baseline by name, e.g. ``"full"``.
        projections: Folder, hub repository or ``Projections`` for ``"lowrank"``.
        method: ``"xkv"`` instead of projections.
        compression_ratio, ranks, bits, layer_group_size, new_tokens, latent_dtype: Of ``LowRankCache``.
        chunk: Tokens per forward; each sees its own tokens exactly and all others as cached.
        residual_length, num_sink_tokens, block_size: Of ``LowRankCache``. A context no longer than these keep exactly
            measures nothing, so the window is shorter than the library's default.
        attend: Attend to latents; False reconstructs keys and values.

    Raises:
        ValueError: If the cache cannot be made, ``chunk`` is below 1 or ``batch_size`` is not a number.
    """

    def __init__(
        self, pretrained, cache: str = "lowrank", projections: str | Projections | None = None,
        method: str | None = None, compression_ratio: float = 8.0, ranks: int | None = None, bits: int | None = None,
        layer_group_size: int | None = None, new_tokens: str | None = None,
        latent_dtype: str | torch.dtype | None = "float16", chunk: int = 32, residual_length: int = 32,
        num_sink_tokens: int = 4, block_size: int = 32, attend: bool = True, **arguments,
    ):  # fmt: skip
        if cache != "lowrank" and cache not in BASELINES:
            raise ValueError(f"cache must be 'lowrank' or one of {BASELINES}, got {cache!r}")
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        if not str(arguments.get("batch_size", 1)).isdigit():
            raise ValueError(f"batch_size must be a number for hf-lowrank, got {arguments['batch_size']!r}")
        super().__init__(pretrained, **arguments)
        bases, options = None, dict[str, Any]()
        if cache == "lowrank":
            bases = Projections.from_pretrained(projections) if isinstance(projections, str) else projections
            if isinstance(latent_dtype, str):
                if not isinstance(getattr(torch, latent_dtype, None), torch.dtype):
                    raise ValueError(f"latent_dtype must be None or the name of a torch dtype, got {latent_dtype!r}")
                latent_dtype = getattr(torch, latent_dtype)
            options = {
                "method": method, "compression_ratio": compression_ratio, "ranks": ranks, "bits": bits,
                "layer_group_size": layer_group_size, "new_tokens": new_tokens, "latent_dtype": latent_dtype,
            }  # fmt: skip
        sizes = {"residual_length": residual_length, "num_sink_tokens": num_sink_tokens, "block_size": block_size}
        self.chunk, self.attend, self._exactly = chunk, attend, sum(sizes.values())
        self.entry = cache_entry(cache, bases, options, self.model, sizes)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is what greedy decoding gives.

        A context is streamed once for all continuations that are asked of it.
        """
        cut: list[tuple[list[int], list[int]]] = []
        groups: dict[tuple, list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            # What is too long for the model is cut on the left, as lm-eval cuts.
            kept = (context + continuation)[-(self.max_length + 1) :]
            kept = kept[: len(kept) - len(continuation)]
            cut.append((kept, continuation))
            # Of a context of one token, as rolling windows have it, there is nothing to share.
            groups.setdefault((tuple(kept), index if len(kept) == 1 else None), []).append(index)
        self._warn_if_exact([len(context) + len(continuation) for context, continuation in cut])
        ordered = sorted(groups.values(), key=lambda indices: -len(cut[indices[0]][0]))
        found: dict[int, tuple[float, bool]] = {}
        batch = override_bs or int(self.batch_size)
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="lossy loglikelihoods") as bar:
            for start in range(0, len(ordered), batch):
                for index, answer in self._score(ordered[start : start + batch], cut):
                    found[index] = answer
                    if requests[index][0] is not None:  # windows of a rolling likelihood have no key of their own
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
                    bar.update()
        return [found[index] for index in range(len(requests))]

    def _warn_if_exact(self, lengths: list[int]) -> None:
        if self.entry.latent_ratio is not None and lengths and max(lengths) <= self._exactly:
            _log.warning(
                "no request of %d is longer than the %d tokens that the cache keeps exactly, so none reads a latent; "
                "choose a smaller residual_length or longer contexts", len(lengths), self._exactly,
            )  # fmt: skip

    @contextmanager
    def _reading(self) -> Iterator[None]:
        dtype = self.mixed_precision_dtype
        precision = torch.autocast(device_type=self.device.type, dtype=dtype, enabled=dtype is not None)
        with precision:
            yield

    @torch.no_grad()
    def _score(
        self, asked: list[list[int]], cut: list[tuple[list[int], list[int]]]
    ) -> list[tuple[int, tuple[float, bool]]]:
        """Of the requests that are ``asked`` about each context, all contexts as one batch: index and answer.

        ``cut`` has all requests' contexts and continuations; the n-th continuations of all contexts go together.
        """
        answers = []
        with self._reading():
            contexts = [torch.tensor(cut[indices[0]][0][:-1]).long() for indices in asked]
            ids, mask = padded(contexts, "left", self.device)
            read = self.entry.make(self.attend)
            fill(self.model, read, ids, mask, chunk=self.chunk)
            for turn in range(max(map(len, asked))):
                # A context without a continuation left repeats its last one, so that the batch stays as it is.
                chosen = [cut[indices[min(turn, len(indices) - 1)]] for indices in asked]
                inputs = [torch.tensor([context[-1], *continuation[:-1]]) for context, continuation in chosen]
                ids, real = padded(inputs, "right", self.device)
                wanted, _ = padded([torch.tensor(continuation) for _, continuation in chosen], "right", self.device)
                values, likeliest = [], []
                for start, logits in feed(self.model, ids, torch.cat([mask, real], 1), branch(read), chunk=self.chunk):
                    part = wanted[:, start : start + logits.shape[1], None]
                    values.append(logits.log_softmax(-1, dtype=self.softmax_dtype).gather(2, part)[..., 0])
                    likeliest.append(logits.argmax(-1) == part[..., 0])
                value, greedy = torch.cat(values, 1), torch.cat(likeliest, 1)
                for row, indices in enumerate(asked):
                    if turn < len(indices):
                        size = len(inputs[row])
                        answer = float(value[row, :size].sum()), bool(greedy[row, :size].all())
                        answers.append((indices[turn], answer))
        return answers

    @torch.no_grad()
    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs) -> Tensor:
        """Stream all but the last token of each left-padded context, and generate from there."""
        if generation_kwargs.get("num_beams", 1) != 1 or generation_kwargs.get("num_return_sequences", 1) != 1:
            raise NotImplementedError("hf-lowrank generates one sequence a context without beams, got other settings")
        mask = generation_kwargs.pop("attention_mask", torch.ones_like(context))
        cache = self.entry.make(self.attend)
        self._warn_if_exact([int(mask.sum(1).max())])
        with self._reading():
            fill(self.model, cache, context[:, :-1], mask[:, :-1], chunk=self.chunk)
            return super()._model_generate(
                context, max_length, stop, attention_mask=mask, **cache_argument(self.model, cache), **generation_kwargs
            )


def main() -> None:
    """lm-eval's command line with the arguments of this process."""
    from lm_eval.__main__ import cli_evaluate

    register()
    given = {argument.partition("=")[0] for argument in sys.argv[1:]}
    if given & {"--tasks", "-t"} and "--include_path" not in given:
        sys.argv += ["--include_path", str(TASKS)]
    cli_evaluate()


if __name__ == "__main__":
    main()
