"""The adapter methods. Importing this package registers all of them with PEFT."""

if __name__ != "petune.adapters":
    raise ImportError(
        f"this folder is the package petune.adapters, but it was imported as {__name__!r}; "
        "write `import petune.adapters`, and run Python from outside of the repository's top folder or install it."
    )

from petune.adapters import emoe, lora, onebit, pat, side
from petune.registry import load_entry_points

__all__ = ["emoe", "lora", "onebit", "pat", "side"]

load_entry_points()
