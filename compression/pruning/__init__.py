"""Pruning methods: a file each, a line each.

A method's module has
    STATISTIC           class that sums up a layer's inputs, or None if the method does not look at them
    SCOPES              among which weights an unstructured mask is chosen (pattern.Scope), the usual one first
    prune(weight, statistic, pattern, settings) -> Pruned
with weight [out, in] in the type in which it is stored. `surgeon` alone looks at the whole model and has no `prune`.
"""

METHODS = {
    "none": "compression.pruning.none",
    "magnitude": "compression.pruning.magnitude",
    "wanda": "compression.pruning.wanda",
    "sparsegpt": "compression.pruning.sparsegpt",
    "magnitude_obs": "compression.pruning.magnitude_obs",
    "wanda_obs": "compression.pruning.wanda_obs",
    "alps": "compression.pruning.alps",
    "surgeon": "compression.pruning.surgeon",
}
