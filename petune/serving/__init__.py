"""Many tasks of few bits on one base: `AdapterServer` answers batches whose rows take different ones."""

from petune.serving.server import AdapterServer

__all__ = ["AdapterServer"]
