"""The mask: an artifact of its own, one bit a weight, never guessed from `W == 0`."""

import numpy as np
import torch
from torch import Tensor

from compression.core.errors import Problem


def pack(keep: Tensor) -> Tensor:
    """bool [out, in], True where the weight stays -> uint8 [out, ceil(in / 8)], first input in the high bit."""
    return torch.from_numpy(np.packbits(keep.cpu().numpy(), axis=1))


def unpack(bits: Tensor, width: int) -> Tensor:
    """The inverse of `pack`; `width` is the number of inputs."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=width)).to(torch.bool)


def revived(weight: Tensor, keep: Tensor) -> int:
    """How many pruned weights are not zero: the ledger's figure, which has to be 0."""
    return int((weight.ne(0) & ~keep.to(weight.device)).count_nonzero())


def prove(layer: str, weight: Tensor, keep: Tensor) -> None:
    """Raises Problem when a pruned weight of the layer came back to life."""
    if count := revived(weight, keep):
        raise Problem(layer, f"{count} pruned weights are not zero any more: the mask was broken")
