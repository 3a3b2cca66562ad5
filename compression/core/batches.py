"""How many sequences go through a block together."""

import torch
from torch import Tensor

CPU_TOKENS = 1024  # activations of a batch stay in the cache; more tokens only cost page faults
DEVICE_TOKENS = 16384  # an accelerator wants them by the thousand


def split(ids: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    """Token ids [N, T] -> batches [n, T], in order, the last one perhaps smaller."""
    tokens = CPU_TOKENS if device.type == "cpu" else DEVICE_TOKENS
    return ids.split(max(1, tokens // ids.shape[1]))
