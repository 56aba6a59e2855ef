"""Whether the Hugging Face hub can be asked for a file, found out quickly."""

import urllib.request
from http.client import HTTPException

from huggingface_hub import constants

__all__ = ["hub_reachable"]


def hub_reachable(path: str, timeout: float = 5.0) -> bool:
    """Ask the hub for the header of one file; False at once when ``HF_HUB_OFFLINE`` is set.

    The hub's own client retries for minutes where the network drops packets; this does not. Proxies
    and ``HF_ENDPOINT`` are honoured.

    Args:
        path: Below the hub's address, e.g. ``"gpt2/resolve/main/config.json"``.
        timeout: Seconds for the connection and for each answer.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        request = urllib.request.Request(f"{constants.ENDPOINT}/{path}", method="HEAD")
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status < 400
    except (OSError, HTTPException, ValueError):  # URLError is an OSError
        return False
