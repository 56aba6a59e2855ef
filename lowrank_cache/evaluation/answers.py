"""Answers generated from a cache that was filled by streaming a context into it."""

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from lowrank_cache.cache_argument import cache_argument
from lowrank_cache.evaluation.streaming import branch, feed

__all__ = ["Prompter", "fill", "greedy_answer"]

_QUESTION = "<<question>>"  # where a question will stand in a chat message


class Prompter:
    """Token ids of contexts and of questions about them, as plain text or as one message of a chat.

    Args:
        tokenizer: Of transformers.
        chat: Put context and question into one user message by the tokenizer's chat template.

    Raises:
        ValueError: If ``chat`` is asked of a tokenizer without a template, or one that alters messages.
    """

    def __init__(self, tokenizer, chat: bool = False):
        self.tokenizer = tokenizer
        self._parts: tuple[str, str] | None = None
        if chat:
            if not getattr(tokenizer, "chat_template", None):
                raise ValueError("chat needs a tokenizer with a chat template, and this one has none")
            message = [{"role": "user", "content": _QUESTION}]
            rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            before, found, after = rendered.partition(_QUESTION)
            if not found:
                raise ValueError("chat needs a chat template that takes a message as it is")
            self._parts = (before, after)

    def count(self, text: str) -> int:
        """Tokens of a text, special ones apart."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def overhead(self) -> int:
        """Tokens that a context and a question take beside their texts."""
        return len(self.context("")) + len(self.question("", ""))

    def context(self, text: str) -> Tensor:
        """``[tokens]`` ids of what is read first."""
        if self._parts is None:
            return torch.tensor(self.tokenizer(text)["input_ids"])
        return self._ids(self._parts[0] + text)

    def question(self, text: str, prefix: str) -> Tensor:
        """``[tokens]`` ids of a question about what was read, and of how its answer begins."""
        return self._ids(text + ("" if self._parts is None else self._parts[1]) + prefix)

    def _ids(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def fill(model: PreTrainedModel, cache: Cache, context: Tensor, *, chunk: int, first: int = 0) -> None:
    """Stream ``[tokens]`` ids into an empty cache; ``chunk`` and ``first`` as in ``streaming.feed``."""
    ids = context.to(model.device)[None]
    for _ in feed(model, ids, torch.ones_like(ids), cache, chunk=chunk, first=first, logits_to_keep=1):
        pass


@torch.no_grad()
def greedy_answer(model: PreTrainedModel, cache: Cache, question: Tensor, limit: int, stop: set[int]) -> list[int]:
    """Token ids of the answer to ``[tokens]`` ids, at most ``limit``; ``cache`` stays as it is.

    The question is one forward; from then on every token is read from what a copy of the cache stores.
    """
    cache = branch(cache)
    ids, answer, argument = question.to(model.device)[None], [], cache_argument(model, cache)
    for _ in range(limit):
        logits = model(input_ids=ids, **argument, use_cache=True, logits_to_keep=1).logits
        token = int(logits[0, -1].argmax())
        if token in stop:
            break
        answer.append(token)
        ids = torch.tensor([[token]], device=ids.device)
    return answer
