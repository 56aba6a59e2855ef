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
from lowrank_cache.evaluation.streaming import fill, force_answers
from lowrank_cache.probe import cache_argument

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError('hf-lowrank needs lm-eval: pip install "lowrank-cache[lm-eval]"') from error

TASKS = Path(__file__).parent / "lm_eval_tasks"  # look-ups, which need no network
OPTIONS = ("method", "compression_ratio", "ranks", "bits", "layer_group_size", "new_tokens", "latent_dtype")
SIZES = {"residual_length": 32, "num_sink_tokens": 4, "block_size": 32}  # and their defaults here
_log = logging.getLogger(__name__)
Request = tuple[Any, list[int], list[int]]  # a key for lm-eval's own cache, context and continuation


def register() -> None:
    """Make lm-eval know ``hf-lowrank``; to be called once before its command line or ``simple_evaluate``."""
    register_model("hf-lowrank")(LowRankLM)


class LowRankLM(HFLM):
    """A causal language model of transformers with a lossy prefill.

    Args:
        pretrained: As for lm-eval's ``hf``, whose other arguments are taken too; scores are always float32's.
        cache: ``"lowrank"``, or a baseline by name, e.g. ``"full"``.
        projections: Folder, hub repository or ``Projections`` for ``"lowrank"``.
        compression_ratio, residual_length and the other ``OPTIONS`` and ``SIZES``: Of ``LowRankCache``. A context no
            longer than the sizes keep exactly measures nothing, so they are smaller than the library's defaults.
        chunk: Tokens per forward; each sees its own tokens exactly and all others as cached.
        attend: Attend to latents; False reconstructs keys and values.

    Raises:
        ValueError: If the cache cannot be made, ``chunk`` is below 1 or ``batch_size`` is not a number.
    """

    def __init__(
        self, pretrained, cache: str = "lowrank", projections: str | Projections | None = None, chunk: int = 32,
        attend: bool = True, **arguments,
    ):  # fmt: skip
        if cache != "lowrank" and cache not in BASELINES:
            raise ValueError(f"cache must be 'lowrank' or one of {list(BASELINES)}, got {cache!r}")
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        if not str(arguments.get("batch_size", 1)).isdigit():
            raise ValueError(f"batch_size must be a number for hf-lowrank, got {arguments['batch_size']!r}")
        sizes = {name: arguments.pop(name, default) for name, default in SIZES.items()}
        options = {"method": None} | {name: arguments.pop(name) for name in OPTIONS if name in arguments}
        if isinstance(dtype := options.get("latent_dtype"), str):
            options["latent_dtype"] = getattr(torch, dtype, None)
            if not isinstance(options["latent_dtype"], torch.dtype):
                raise ValueError(f"latent_dtype must be None or the name of a torch dtype, got {dtype!r}")
        super().__init__(pretrained, **arguments)
        bases = Projections.from_pretrained(projections) if isinstance(projections, str) else projections
        given = (bases, options) if cache == "lowrank" else (None, {})
        self.chunk, self.attend, self._exactly = chunk, attend, sum(sizes.values())
        self.entry = cache_entry(cache, *given, self.model, sizes)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is what greedy decoding gives.

        A context, its last token apart, is streamed once for all continuations that are asked of it.
        """
        groups: dict[tuple, dict[int, tuple[Tensor, Tensor]]] = {}
        for index, (_, context, wanted) in enumerate(requests):
            # What is too long for the model is cut on the left, as lm-eval cuts.
            kept = (context + wanted)[-(self.max_length + 1) :]
            *read, last = kept[: len(kept) - len(wanted)]
            # Of a context of one token, as rolling windows have it, there is nothing to share.
            pairs = groups.setdefault((tuple(read), None if read else index), {})
            pairs[index] = torch.tensor([last]), torch.tensor(wanted)
        self._warn_if_exact([len(ids) + 1 + len(pair[1]) for (ids, _), of in groups.items() for pair in of.values()])
        ordered = sorted(groups.items(), key=lambda group: -len(group[0][0]))
        found: dict[int, tuple[float, bool]] = {}
        batch = override_bs or int(self.batch_size)
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="lossy loglikelihoods") as bar:
            for start in range(0, len(ordered), batch):
                part = ordered[start : start + batch]
                contexts = [torch.tensor(ids).long() for (ids, _), _ in part]
                asked = [tuple(pairs.values()) for _, pairs in part]
                with self._reading():
                    chunks = {"chunk": self.chunk, "question_chunk": self.chunk}
                    scores = force_answers(self.model, contexts, asked, self.entry.make, **chunks)
                for (_, pairs), answers in zip(part, scores, strict=True):
                    for (index, (_, continuation)), (loss, greedy) in zip(pairs.items(), answers, strict=True):
                        found[index] = -loss * len(continuation), greedy
                        if requests[index][0] is not None:  # windows of a rolling likelihood have no key of their own
                            self.cache_hook.add_partial("loglikelihood", requests[index][0], found[index])
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
