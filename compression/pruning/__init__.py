"""Pruning methods: a file each, a line each.

A method's module has
    STATISTIC           class that sums up a layer's inputs, or None if the method does not look at them
    prune(weight, statistic, pattern) -> (weight, keep)
with weight [out, in] in the type in which it is stored, and keep bool [out, in].
"""

METHODS = {
    "none": "compression.pruning.none",
    "magnitude": "compression.pruning.magnitude",
    "wanda": "compression.pruning.wanda",
}
