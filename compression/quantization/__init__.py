"""Quantisers: a file each, a line each.

A quantiser's module has
    STATISTIC           class that sums up a layer's inputs, or None if the quantiser does not look at them
    quantize(weight, bits, settings, statistic, keep, given) -> Quantized
with weight [out, in], in whose type scales are stored; keep, the mask bool [out, in] that pruning has left, or
None; and given, the Grid on which pruning has left the weights, or None. A pruned weight stays exactly zero.
"""

METHODS = {
    "none": "compression.quantization.none",
    "rtn": "compression.quantization.rtn",
    "gptq": "compression.quantization.gptq",
    "given": "compression.quantization.given",
}
