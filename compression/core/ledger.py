"""What a method noted about each layer, and how a journal holds it."""

import torch
from torch import Tensor

Ledger = dict[str, dict[str, float]]  # layer -> name -> figure

_NOTE = "note/"


def pack(ledger: Ledger) -> dict[str, Tensor]:
    """A ledger as a journal holds it: a number a tensor."""
    return {
        f"{_NOTE}{layer}/{name}": torch.tensor(value, dtype=torch.float64)
        for layer, notes in ledger.items()
        for name, value in notes.items()
    }


def unpack(state: dict[str, Tensor]) -> Ledger:
    """The ledger in a journal's state, which may hold other tensors as well."""
    ledger: Ledger = {}
    for key, value in state.items():
        if key.startswith(_NOTE):
            layer, name = key.removeprefix(_NOTE).split("/")
            ledger.setdefault(layer, {})[name] = value.item()
    return ledger


def in_order(ledger: Ledger, layers: list[str]) -> Ledger:
    """Layers in the model's order, names in the alphabet's: the same text in every run."""
    return {layer: dict(sorted(ledger.get(layer, {}).items())) for layer in layers}
