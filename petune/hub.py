"""Find a model by folder, cache or hub, without waiting for a network that is not there."""

import os
import ssl
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

_WAIT_SECONDS = 5.0


def locate_model(name: str | os.PathLike[str], *, option: str = "base") -> str:
    """Where `from_pretrained` is to read `name`: a folder, the snapshot in the hub's cache, or the hub id itself.

    transformers asks the hub for several files of a model even when all are cached, and tries each six times: an
    unplugged machine waits 46 s for the error. Here the cache comes first, and the hub is tried once.

    Args:
        name: a folder or a hub id.
        option: what the user can set to point elsewhere, for the message.

    Raises:
        OSError: neither a folder, nor in the cache, nor to be had from the hub.
    """
    text = os.fspath(name)
    if Path(text).is_dir():
        return text
    remedy = f"pass {option}=<folder with config.json and weights>, or fetch it once with `hf download {text}`."
    try:
        validate_repo_id(text)
    except HFValidationError:
        raise OSError(f"{text!r} is no folder, and no name that the hub could know; pass {option}=<folder>.") from None
    snapshot = _cached(text)
    if snapshot is not None:
        return snapshot
    if constants.HF_HUB_OFFLINE:
        raise OSError(f"{text!r} is neither a folder nor in the hub's cache, and HF_HUB_OFFLINE is set; {remedy}")
    error = _unreachable(constants.ENDPOINT)
    if error is not None:
        raise OSError(
            f"{text!r} is neither a folder nor in the hub's cache, and {constants.ENDPOINT} cannot be reached "
            f"({error}); {remedy}"
        ) from error
    return text


def _unreachable(url: str) -> OSError | None:
    """Why nothing answers at `url`; None where something does, be it with an error or an unknown certificate."""
    try:
        with urlopen(Request(url, method="HEAD"), timeout=_WAIT_SECONDS):
            return None
    except HTTPError:
        return None
    except URLError as error:
        reason = error.reason
        if isinstance(reason, ssl.SSLError):  # the hub's client may know certificates that Python does not
            return None
        return reason if isinstance(reason, OSError) else OSError(str(reason))
    except TimeoutError as error:
        return error


def _cached(repo_id: str) -> str | None:
    """The snapshot folder of a model whose config and weights are in the cache."""
    config = try_to_load_from_cache(repo_id, "config.json")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    return str(folder) if has_weights else None
