"""The most bytes that torch had allocated at once while a block ran."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

__all__ = ["Allocated", "watch_allocated"]


@dataclass
class Allocated:
    """Bytes beyond what was allocated when the block began, known when it has ended."""

    highest: int = 0
    left: int = 0


@contextmanager
def watch_allocated(device: torch.device) -> Iterator[Allocated]:
    """Watch torch's allocator on ``device`` while the block runs; on a CPU through its profiler, which costs time."""
    allocated = Allocated()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield allocated
        allocated.highest = torch.cuda.max_memory_allocated(device) - before
        allocated.left = torch.cuda.memory_allocated(device) - before
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield allocated
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated.left += event.nbytes()
        allocated.highest = max(allocated.highest, allocated.left)
