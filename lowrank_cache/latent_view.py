"""What one layer holds during a forward, by segment, and how it travels from the cache to the attention function.

``Cache.update`` returns dense keys and values, or, to a layer that attends to latents, the forward's own states with a
``LatentView`` of everything else. Between ``Cache.update`` and the attention function stands the model's
own code, which hands on two tensors, so the view rides on the key tensor. See docs/cache_contract.md, "Attending to
latents".
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_cache.kernels.api import attend_stored
from lowrank_cache.kernels.packed import StoredSide

CURE = "make the cache with attend='reconstruct'"


@dataclass(frozen=True)
class LatentView:
    """Keys and values of one layer, and where their segments stand among the slots."""

    key: StoredSide
    value: StoredSide
    slots: int  # tokens in all, those of the forward included
    encoded_end: int  # first slot of the tail; latents stand before it
    # [batch, sinks], the slot of each sequence's sinks, `slots` or more where one has not come yet; None if they are
    # the first slots of all.
    sink_slots: Tensor | None
    impl: str  # who reads the latents, see `kernels.api`
    note_read: Callable[[], object]  # called when they are attended to

    def attend(
        self,
        query: Tensor,
        *,
        scaling: float,
        mask: Tensor | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """Attention of the forward's queries over all slots.

        Args:
            query: ``[batch, q_heads, q_tokens, head_dim]``, post-RoPE, of the last ``q_tokens`` slots.
            scaling, softcap: see ``kernels.segments.attend``.
            mask: bool ``[1 or batch, 1, q_tokens, slots]``, True where a query sees a slot; None for causal.
            sink_logits: ``[q_heads]``, see ``kernels.segments.merge``.

        Returns:
            ``[batch, q_heads, q_tokens, value_dim]``, dtype of ``query`` or float32.
        """
        self.note_read()
        if mask is None and query.shape[2] > 1:
            mask = _causal(query.shape[2], self.slots, query.device)
        sink_mask, mask = self._split_off_sinks(mask)
        masks: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        if mask is not None:
            latents = 0 if self.key.latents is None else self.key.latents.tokens
            tail = mask[..., self.slots - self.key.tail.shape[2] :]
            masks = sink_mask, mask[..., self.encoded_end - latents : self.encoded_end], tail
        return attend_stored(
            query, self.key, self.value, scaling=scaling, masks=masks, softcap=softcap, sink_logits=sink_logits,
            impl=self.impl,
        )  # fmt: skip

    def _split_off_sinks(self, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The mask of the sink segment, and the mask of slots without those that sinks stand for."""
        if self.sink_slots is None:
            return (None if mask is None else mask[..., : self.key.sinks.shape[2]]), mask
        batch = self.sink_slots.shape[0]
        if mask is None:  # one query token and, says the model, no padding
            mask = self.sink_slots.new_ones(batch, 1, 1, self.slots, dtype=torch.bool)
        mask = mask.expand(batch, *mask.shape[1:])
        # A sink that is not there yet has a slot past the end: one more column takes them all.
        padded = torch.nn.functional.pad(mask, (0, 1))
        slots = self.sink_slots.clamp(max=self.slots)
        sinks = padded.gather(3, slots[:, None, None].expand(-1, 1, mask.shape[2], -1))
        elsewhere = padded.new_ones(batch, self.slots + 1).scatter_(1, slots, False)[:, None, None, : self.slots]
        return sinks, mask & elsewhere


def _causal(q_tokens: int, slots: int, device: torch.device) -> Tensor:
    """``[1, 1, q_tokens, slots]``: the last ``q_tokens`` slots see themselves and what is before them."""
    return torch.ones(q_tokens, slots, dtype=torch.bool, device=device).tril_(slots - q_tokens)[None, None]


def as_bool(mask: object, q_tokens: int, slots: int) -> Tensor:
    """Which slots queries see, bool ``[batch, 1, q_tokens, slots]``, of a mask in any form that says no more than this.

    Args:
        mask: ``[batch, slots]``, nonzero where a slot is no padding (flash attention); or
            ``[batch, 1, q_tokens, slots]``, bool, or 0 where a query sees a slot and else a very low number.

    Raises:
        NotImplementedError: If it is something else.
    """
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise NotImplementedError(f"attention over latents cannot read an attention_mask {type(mask).__name__}; {CURE}")
    if mask.dim() == 2:
        visible = mask.bool()[:, None, None, :]
        if mask.shape[1] == slots:
            visible = visible & _causal(q_tokens, slots, mask.device)
    elif mask.dtype == torch.bool:
        visible = mask
    else:
        visible = mask == 0
        # float64's masks may be clamped to float32's lowest number
        lowest = max(torch.finfo(mask.dtype).min, torch.finfo(torch.float32).min)
        if not bool((visible | (mask <= lowest / 2)).all()):
            raise NotImplementedError(
                f"attention_mask must be boolean or hold 0 and very low numbers only, got a bias; {CURE}"
            )
    if visible.shape[1:] != (1, q_tokens, slots):
        raise NotImplementedError(
            f"attention_mask must have shape [batch, 1, {q_tokens}, {slots}], got {list(mask.shape)}; {CURE}"
        )
    return visible


def attach_view(keys: Tensor, view: object) -> None:
    keys.latent_view = view  # type: ignore[attr-defined]  # tensors take attributes; the stubs do not know


def view_of(keys: Tensor) -> object | None:
    """What ``attach_view`` attached to this very tensor; nothing survives an operation on it."""
    return getattr(keys, "latent_view", None)
