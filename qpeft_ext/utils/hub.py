"""Find out whether the Hugging Face Hub can be asked for a name.

Its library asks for a file that is not in the cache six times, with a warning each and half a minute of pauses. On a
machine without network that stands before every message about a name that is misspelt.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

# of httpx, of its successors and of requests, as different versions of the library use them
_NO_CONNECTION = ("ConnectError", "ConnectTimeout", "ConnectionError", "ProxyError", "SSLError")


def expect_in_reach(name: str, files: tuple[str, ...], where: Mapping[str, Any]) -> None:
    """Check that what a name stands for is in the Hub's cache, or that there is a connection to the Hub.

    Whether the Hub has it is left to the library, as is all that goes wrong after the connection is made.

    Args:
        name: of a repository.
        files: those of which one is in the cache if an earlier process has loaded what is loaded now.
        where: keywords of ``from_pretrained``, of which some say where the files are.
    Raises: OSError if it is not in the cache and two attempts to connect have failed.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError, get_session

    if where.get("local_files_only") or constants.HF_HUB_OFFLINE:
        return
    folder = f"{where['subfolder']}/" if where.get("subfolder") else ""
    try:
        for file in files:
            place = try_to_load_from_cache(name, folder + file, where.get("cache_dir"), where.get("revision"))
            if isinstance(place, str):
                return
    except HFValidationError:  # the library says what is wrong with the name
        return
    reason = ""
    for pause in (0, 1):  # a name server may be slow once
        time.sleep(pause)
        try:
            get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            return
        except Exception as error:
            if type(error).__name__ not in _NO_CONNECTION:
                return
            reason = " ".join(str(error).split())[:120]
    raise OSError(
        f"there is no such folder, it is not in the cache of the Hugging Face Hub, and {constants.ENDPOINT} cannot be "
        f"reached ({reason}); check the name, or connect to the network"
    )
