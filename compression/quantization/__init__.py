"""Quantisers: a file each, a line each.

A quantiser's module has
    quantize(weight, bits, group_size, given) -> (codes, grid)
with weight [out, in], codes int8 [out, in] and the Grid on which they lie; `given` is the Grid on which pruning has
left the weights, or None. Zero has to be a point of the grid,
so that a pruned weight stays exactly zero.
"""

METHODS = {
    "none": "compression.quantization.none",
    "rtn": "compression.quantization.rtn",
    "given": "compression.quantization.given",
}
