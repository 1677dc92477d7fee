"""`RowReader`: what the rows of a batch are known by, and which of their tokens are worth keeping."""

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_NO_LABEL = -100  # of torch and transformers
_TARGETS = frozenset({"start_positions", "end_positions", "num_items_in_batch"})  # beside all that is called label
_TEXT = ("input_ids", "inputs_embeds")
_OF_TOKENS = frozenset({*_TEXT, "attention_mask", "token_type_ids", "position_ids", "labels"})  # [rows, tokens, ...]
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Spans:
    """Where the rows of a batch stand in padded sequences."""

    tokens: int
    """Of each sequence, with padding."""
    bounds: Sequence[tuple[int, int]]
    """Of each row its first token that is kept, and the one behind its last."""


@dataclass(frozen=True)
class BatchRows:
    """The rows of a batch."""

    digests: Sequence[bytes]
    """Of what the backbone makes a row's hidden states from, 16 bytes each."""
    encoder: Spans | None
    """Of the tokens of all blocks but a decoder's behind an encoder; None where every one is kept."""
    decoder: Spans | None
    """Of a decoder's behind an encoder."""


class RowReader:
    """Reads a batch from the arguments of a model's forward.

    A row is known by its inputs, not by its place: ids, masks, positions, pixels, sounds, a decoder's ids, or the
    labels that the model makes those of. Padding at the end of a row is neither part of its digest nor kept, and
    padding before it only in a decoder with rotary positions, which alone does not see how much of it there is. It is
    kept where a loss reads it: at a label outside of the mask, and before a row whose first token has a label, since
    that is predicted from the padding in front; such a row is another one with more padding.

    Args:
        model: its configuration says whether it has a decoder behind an encoder.
    """

    def __init__(self, model: nn.Module) -> None:
        self._seq2seq = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        parts = [(name.rpartition(".")[2], module) for name, module in model.named_modules()]
        rotary = any(name == "rotary_emb" for name, _ in parts)
        causal = any(getattr(module, "is_causal", False) is True for _, module in parts)
        self._relative = rotary and causal and not self._seq2seq

    def read(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> BatchRows | None:
        """The rows that a forward of `model`, or of its trunk, is called with; None where they cannot be told.

        They cannot where there is more than tensors: states of an encoder, or a cache.
        """
        given = {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}
        given = {name: value for name, value in given.items() if value is not None}
        if not all(isinstance(value, (Tensor, bool, int, float, str)) for value in given.values()):
            return None
        inputs = {name: value for name, value in given.items() if isinstance(value, Tensor) and not _is_target(name)}
        main = next((name for name in (*_TEXT, getattr(model, "main_input_name", "")) if name in inputs), None)
        if main is None:
            return None
        arrays = _arrays(inputs, rows=len(inputs[main]))
        labels = _token_labels(given.get("labels"))
        layout = _Layout(arrays, arrays[main].shape[:2] if main in _TEXT else None, relative=self._relative)
        layout.read_encoder(None if self._seq2seq else labels)
        if self._seq2seq:
            layout.read_decoder(labels)
        return BatchRows(layout.digests(), layout.encoder, layout.decoder)


class _Layout:
    """The arrays of a batch and how its rows are cut out of them."""

    def __init__(self, arrays: dict[str, np.ndarray], shape: tuple[int, ...] | None, *, relative: bool) -> None:
        self.arrays, self.shape, self.relative = arrays, shape, relative
        self.rows = len(next(iter(arrays.values())))
        self.encoder: Spans | None = None
        self.decoder: Spans | None = None

    def read_encoder(self, labels: np.ndarray | None) -> None:
        mask = self.arrays.get("attention_mask")
        if mask is None or mask.shape != self.shape:
            return
        tokens, seen = mask.shape[1], mask != 0
        first, last = seen.argmax(1), _behind_last(seen)
        last[last == 0] = tokens  # nothing but padding
        start = first.copy() if self.relative else np.zeros_like(first)
        if labels is not None and labels.shape == mask.shape:
            labelled = labels != _NO_LABEL
            last = np.maximum(last, _behind_last(labelled))
            from_padding = (first > 0) & (labelled.argmax(1) <= first) & labelled.any(1)
            start[from_padding] = 0
        self.encoder = Spans(tokens, list(zip(start.tolist(), last.tolist(), strict=True)))

    def read_decoder(self, labels: np.ndarray | None) -> None:
        ids = next((self.arrays[f"decoder_{name}"] for name in _TEXT if f"decoder_{name}" in self.arrays), None)
        mask = self.arrays.get("decoder_attention_mask")
        if ids is None and labels is None:
            self.decoder = self.encoder  # models that shift the encoder's ids
            return
        if ids is None:
            assert labels is not None
            self.arrays["decoder_labels"] = ids = labels  # models that shift the labels
        shape = ids.shape[:2]
        if labels is not None and labels.shape == shape:
            last = _behind_last(labels != _NO_LABEL)
        elif mask is not None and mask.shape == shape:
            last = _behind_last(mask != 0)
        else:
            return
        self.decoder = Spans(shape[1], [(0, end) for end in last.tolist()])

    def digests(self) -> list[bytes]:
        """blake2b of each row's part of each array."""
        cuts = {name: self._spans(name, array) for name, array in self.arrays.items()}
        named = [(name, self.arrays[name], cuts[name]) for name in sorted(cuts)]
        head = repr([(name, str(a.dtype), a.shape[2 if cut else 1 :]) for name, a, cut in named]).encode()
        return [self._digest(row, head, named) for row in range(self.rows)]

    def _spans(self, name: str, array: np.ndarray) -> Spans | None:
        """The spans of the tokens that an array's second axis counts; None where it counts none."""
        spans = self.decoder if name.startswith("decoder_") else self.encoder
        if spans is None or name.removeprefix("decoder_") not in _OF_TOKENS:
            return None
        return spans if array.ndim > 1 and array.shape[1] == spans.tokens else None

    def _digest(self, row: int, head: bytes, named: Sequence[tuple[str, np.ndarray, Spans | None]]) -> bytes:
        digest = hashlib.blake2b(head, digest_size=16)
        for name, array, spans in named:
            part = array[row]
            if spans is not None:
                start, end = spans.bounds[row]
                part = part[start:end]
                digest.update(len(part).to_bytes(4, "little"))
            if not (name.endswith("attention_mask") and spans is not None and (part == 1).all()):
                digest.update(np.ascontiguousarray(part).data)
        return digest.digest()


def _is_target(name: str) -> bool:
    return "label" in name or name in _TARGETS


def _token_labels(labels: Any) -> np.ndarray | None:
    """Labels of tokens, [rows, tokens]."""
    if isinstance(labels, Tensor) and labels.dim() == 2 and labels.dtype in _INTEGERS:
        return _array(labels)
    return None


def _arrays(inputs: Mapping[str, Tensor], *, rows: int) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, tensor in inputs.items():
        if tensor.dim() == 0 or len(tensor) != rows:  # the same for all rows
            tensor = tensor.expand(rows, *tensor.shape[1:]) if tensor.dim() > 1 and len(tensor) == 1 else tensor
            tensor = tensor if tensor.dim() > 1 and len(tensor) == rows else tensor.expand(rows, *tensor.shape)
        found[name] = _array(tensor)
    return found


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    if tensor.dtype in _INTEGERS:
        return tensor.long().numpy()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()  # numpy has no bfloat16


def _behind_last(where: np.ndarray) -> np.ndarray:
    """Of each row the index behind its last true element; 0 without one."""
    return np.where(where.any(1), where.shape[1] - where[:, ::-1].argmax(1), 0)
