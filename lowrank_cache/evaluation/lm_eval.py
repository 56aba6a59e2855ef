"""lm-eval's command line with the model ``hf-lowrank`` and the tasks of ``lm_eval_tasks``: ``python -m`` this file.

lm-eval finds models by a registry that only running code can add to, so its own command does not know this one.
"""

import sys
from pathlib import Path

from lm_eval.__main__ import cli_evaluate

from lowrank_cache.evaluation.hf_lowrank import register

__all__ = ["TASKS", "main"]

TASKS = Path(__file__).parent / "lm_eval_tasks"  # look-ups, which need no network


def main() -> None:
    """Run lm-eval with the arguments of this process."""
    register()
    given = {argument.partition("=")[0] for argument in sys.argv[1:]}
    if given & {"--tasks", "-t"} and "--include_path" not in given:
        sys.argv += ["--include_path", str(TASKS)]
    cli_evaluate()


if __name__ == "__main__":
    main()
