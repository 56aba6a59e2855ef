"""lm-eval's command line with the model ``hf-lowrank`` and the tasks of ``lm_eval_tasks``: ``python -m`` this file.

lm-eval finds models by a registry that only running code can add to, so its own command does not know this one.
"""

from pathlib import Path

from lm_eval._cli import HarnessCLI
from lm_eval.utils import setup_logging

from lowrank_cache.evaluation.hf_lowrank import register

__all__ = ["TASKS", "main"]

TASKS = Path(__file__).parent / "lm_eval_tasks"  # look-ups, which need no network


def main() -> None:
    """Run lm-eval with the arguments of this process."""
    setup_logging()
    register()
    parser = HarnessCLI()
    arguments = parser.parse_args()
    if arguments.command == "run" and getattr(arguments, "include_path", None) is None:
        arguments.include_path = str(TASKS)
    parser.execute(arguments)


if __name__ == "__main__":
    main()
