"""Codes as the bits of 32-bit words, one bit after the other."""

from torch import Tensor


def words(codes: Tensor, bits: int) -> list[list[int]]:
    """The signed 32-bit words of every row: codes counted from the lowest one, each with its lowest bit first."""
    packed = []
    for row in codes.tolist():
        stream = [(code + 2 ** (bits - 1)) >> place & 1 for code in row for place in range(bits)]
        stream += [0] * (-len(stream) % 32)
        unsigned = [
            sum(bit << place for place, bit in enumerate(stream[start : start + 32]))
            for start in range(0, len(stream), 32)
        ]
        packed.append([word - 2**32 if word >= 2**31 else word for word in unsigned])
    return packed
