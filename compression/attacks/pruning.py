"""Pruning on: the smallest weights of every row dropped, as a user may do with a model that was unlearned dense."""

from collections.abc import Collection

from torch import Tensor

from compression.attacks import Reader
from compression.pruning.pattern import Unstructured
from compression.pruning.select import keep_highest


def pruned(read: Reader, layers: Collection[str], sparsity: float) -> Reader:
    """The weights of `layers` without the share `sparsity` of each row that is smallest; zeros go first."""

    def attacked(index: int) -> dict[str, Tensor]:
        tensors = read(index)
        for name in tensors.keys() & {f"{layer}.weight" for layer in layers}:
            weight = tensors[name]
            tensors[name] = weight * keep_highest(weight.abs().float(), Unstructured(sparsity, "row"))
        return tensors

    return attacked
