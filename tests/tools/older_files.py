"""Write what a release saves, with logits of what follows, for ``tests/cache/test_older_files.py``.

    git worktree add OLD b096bff
    python -P tests/tools/older_files.py OLD tests/data/b096bff

The release in ``OLD`` writes the files; models come from this tree, so that the test builds the same ones.
"""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

__all__ = ["CASES", "Case", "forward_parts", "padded_text"]

SIZES = {"residual_length": 4, "num_sink_tokens": 2, "block_size": 8}
PROMPT = 26  # 2 sinks, 16 latents and a window of 8, which takes 3 tokens more before it gives a block away
PARTS = (1, 1, 1, 1, 3, 1)  # tokens that follow; the last two parts read latents that were made after loading
READ_ONLY = 4  # of them, those that read what was saved and nothing else


@dataclass(frozen=True)
class Case:
    """One saved cache.

    Attributes:
        family: Of ``tests.oracle.models``.
        cache: Arguments of ``LowRankCache`` beside the sizes.
        projections: Name of the saved projections; None for xkv.
        bases: What they were calibrated with.
    """

    family: str
    cache: dict
    projections: str | None = None
    bases: dict = field(default_factory=dict)


_PALU = {"method": "palu"}  # 6 heads in groups of 4 and 2: two bases in each store
_RECALKV = {"method": "recalkv"}
CASES = {
    "joint": Case("qwen2-narrow", {"compression_ratio": 2}, "joint", {"layer_group_size": 3, "joint": True}),
    "joint-4bit": Case("qwen2-narrow", {"ranks": 16, "bits": 4}, "joint", {"layer_group_size": 3, "joint": True}),
    "frames": Case(
        "llama-dynamic-narrow",
        {"compression_ratio": 1.5},
        "frames",
        {"frame_length": 4, "layer_group_size": (3, 2), "joint": False},
    ),
    "palu": Case("qwen2-six-narrow-heads", {"compression_ratio": 1.5}, "palu", _PALU),
    "palu-4bit": Case("qwen2-six-narrow-heads", {"compression_ratio": 2, "bits": 4}, "palu", _PALU),
    "recalkv": Case("qwen2-six-narrow-heads", {"compression_ratio": 1.5, "latent_dtype": None}, "recalkv", _RECALKV),
    "recalkv-4bit": Case("qwen2-six-narrow-heads", {"compression_ratio": 2, "bits": 4}, "recalkv", _RECALKV),
    "xkv": Case("qwen2-narrow", {"method": "xkv", "ranks": 8, "layer_group_size": 3}),
    "xkv-exact": Case(
        "qwen2-narrow", {"method": "xkv", "ranks": 8, "bits": 8, "layer_group_size": 2, "new_tokens": "exact"}
    ),
    "sliding": Case("gemma2-narrow", {"compression_ratio": 1.5}, "sliding"),
    "linear": Case("qwen3-next-narrow", {"compression_ratio": 1.5}, "linear"),
}


def padded_text(family: str) -> tuple[Tensor, Tensor]:
    """Tokens and mask ``[2, PROMPT + what follows]``; the first sequence is left-padded."""
    from tests.oracle.models import random_tokens

    tokens = random_tokens(2, PROMPT + sum(PARTS), seed=len(family))
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    return tokens, mask


def forward_parts(
    model: PreTrainedModel, cache: Cache, tokens: Tensor, mask: Tensor, parts: tuple[int, ...], start: int = 0
) -> Tensor:
    """Logits ``[2, sum(parts), vocabulary]`` of ``parts`` of the text from ``start`` on, one forward each."""
    positions, logits = (mask.cumsum(1) - 1).clamp(min=0), []
    with torch.no_grad():
        for part in parts:
            here, start = slice(start, start + part), start + part
            arguments = {"attention_mask": mask[:, :start], "position_ids": positions[:, here]}
            logits.append(model(tokens[:, here], past_key_values=cache, **arguments).logits)
    return torch.cat(logits, dim=1)


def write(folder: Path) -> None:
    """Everything under ``folder``: projections, caches, moments, and logits in ``expected.safetensors``."""
    from transformers import DynamicCache

    from lowrank_cache import LowRankCache
    from lowrank_cache.calibration import calibrate
    from tests.oracle.models import random_tokens, tiny_model

    projections: dict = {None: None}
    expected = {}
    for name, case in CASES.items():
        model = tiny_model(case.family)
        if case.projections not in projections:
            batches = [random_tokens(4, 20, seed=seed) for seed in (101, 102, 103)]
            options = {"layer_group_size": 1, **case.bases, "progress": False}
            if case.projections == "joint":
                options["save_moments"] = folder / "moments.safetensors"
                folder.mkdir(parents=True, exist_ok=True)
            made = projections[case.projections] = calibrate(model, batches, **options)
            made.save_pretrained(folder / "projections" / case.projections)
        tokens, mask = padded_text(case.family)
        cache = LowRankCache(model, projections[case.projections], **SIZES, **case.cache)
        forward_parts(model, cache, tokens, mask, (PROMPT,))
        cache.save_pretrained(folder / "caches" / name)
        expected[f"{name}.logits"] = forward_parts(model, cache, tokens, mask, PARTS, PROMPT)
        model = tiny_model(case.family)  # a dynamic rotary embedding has changed its frequencies
        full = forward_parts(model, DynamicCache(config=model.config), tokens, mask, (PROMPT, *PARTS))
        expected[f"{case.family}.full"] = full[:, -1].contiguous()
    save_file(expected, folder / "expected.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", type=Path, help="A worktree of the release.")
    parser.add_argument("folder", type=Path, help="Where to write; must not exist.")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        parser.error(f"{arguments.folder} exists; the files of a release are written once")
    sys.path.insert(0, str(arguments.release.resolve()))
    import lowrank_cache.calibration  # of the release, and so are all its modules from now on

    assert Path(lowrank_cache.__file__).is_relative_to(arguments.release.resolve()), lowrank_cache.__file__
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    torch.set_num_threads(1)
    write(arguments.folder)


if __name__ == "__main__":
    main()
