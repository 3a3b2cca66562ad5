"""Mask bits, packed by hand."""

from torch import Tensor


def pack(keep: Tensor) -> list[list[int]]:
    """Bytes of every row: the first input in the highest bit, the last byte filled up with zeros."""
    packed = []
    for row in keep.int().tolist():
        padded = row + [0] * (-len(row) % 8)
        packed.append([int("".join(map(str, padded[start : start + 8])), 2) for start in range(0, len(padded), 8)])
    return packed
