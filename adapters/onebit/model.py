"""The tuners of the 1-bit methods."""

from torch import nn

from petune.adapters.onebit.layer import BiLoraLayer
from petune.quantized.tuner import PackedTuner

_FUSED = frozenset({"c_attn", "qkv_proj", "qkv", "Wqkv"})
"""Names of layers that hold all queries, then all keys, then all values; others interleave them head by head."""


class BiLoraModel(PackedTuner):
    """Puts `BiLoraLayer`s in, by default on query and value projections."""

    prefix = "petune_bilora_"
    tuner_layer_cls = BiLoraLayer

    def make_layer(self, target: nn.Module, name: str) -> BiLoraLayer:
        layer = BiLoraLayer(target)
        if name.rpartition(".")[2] in _FUSED:
            layer.fused_parts = query_and_value_rows(self.model, layer.out_features)
        return layer


def query_and_value_rows(model: nn.Module, out_features: int) -> tuple[tuple[int, int], ...]:
    """Rows [start, stop) of queries and of values in a fused layer; () if it does not have the sizes of one."""
    config = getattr(model, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    if config is None or heads is None:
        return ()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    queries = heads * head_dim
    keys = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    if out_features != queries + 2 * keys:
        return ()
    return ((0, queries), (queries + keys, out_features))
