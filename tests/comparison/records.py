"""A record as a run leaves it."""

from petune.comparison.record import RESIDENT, Record


def record(accuracy: float = 0.5, **more) -> Record:
    """Of a run with that accuracy; `more` are other fields."""
    fields = {
        "metrics": {"val/accuracy": accuracy, "val/loss": 1 - accuracy},
        "rows": {"train": 96, "val": 32},
        "adapter": "FusedLoraConfig(r=8)",
        "learning_rate": 1e-3,
        "trainable_parameters": 1000,
        "weights_bytes": 4096,
        "peak_memory_bytes": 3 * 2**28,
        "memory": RESIDENT,
        "saved_for_backward_bytes": 2**20,
        "seconds": 2.0,
        "steps": 12,
        "device": "cpu",
    }
    return Record(**{**fields, **more})
