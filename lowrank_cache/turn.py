"""Which thread's forward a cache is in. A forward changes a cache layer by layer, so there can be one at a time."""

import threading

__all__ = ["Turn"]


class Turn:
    """Taken by a thread when its forward begins, given back when the cache is whole again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None

    def take(self) -> None:
        """Begin; a thread may begin again after a forward of its own that failed, or of a thread that has ended.

        Raises:
            RuntimeError: If a forward of another living thread has not ended.
        """
        with self._lock:
            others = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
            if self._holder in others:
                raise RuntimeError(
                    "another thread's forward with this cache has not ended; give each thread a cache of its own "
                    "(copy.deepcopy shares the bases), or, if that forward failed, call cache.crop(0) first"
                )
            self._holder = threading.get_ident()

    def is_mine(self) -> bool:
        """Whether this thread began last."""
        return self._holder == threading.get_ident()

    def give_back(self) -> None:
        self._holder = None

    def __deepcopy__(self, memo: dict) -> "Turn":
        return Turn()
