"""Checkpoint files that a killed process cannot spoil and that cannot run code when read."""

import errno
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from typing_extensions import override

from petune.atomic import replacing_file


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's file format, written beside the old file and renamed over it, read with `weights_only=True`.

    Lightning's own writing goes through a temporary file in the system's folder for those, and copies from there when
    that is another disk: a kill during the copy leaves half a file. Remote paths are left to Lightning.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None or not _is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with replacing_file(Path(path)) as incoming:
                torch.save(checkpoint, incoming)
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
            full = f"the checkpoint {path} was not written ({error}); the one that was there before is untouched."
            raise OSError(getattr(error, "errno", None) or errno.EIO, full) from error

    @override
    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> Any:
        """Read a checkpoint of tensors and plain values.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it holds pickled code, or is cut short.
        """
        if not get_filesystem(str(path)).exists(str(path)):
            raise FileNotFoundError(f"no checkpoint {path}; pass the path of a .ckpt file.")
        try:
            return super().load_checkpoint(path, map_location, weights_only is None or weights_only)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} holds pickled objects beyond tensors and plain values, which can run code when read, or is "
                "no checkpoint at all; only weights are read: train it again, or export it from where you trust it."
            ) from error
        except PermissionError:
            raise
        except (EOFError, OSError, RuntimeError) as error:  # torch seeks before the start of a zip file cut short
            reason = (str(error) or "it ends too early").splitlines()[0]
            raise ValueError(f"{path} is cut short or damaged ({reason}); use an earlier checkpoint.") from error


def _is_local(path: str | os.PathLike[str]) -> bool:
    return "file" in (protocol := get_filesystem(str(path)).protocol) or protocol == "file"
