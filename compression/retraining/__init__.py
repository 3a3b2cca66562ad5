"""Retraining methods: a file each, a line each.

A method's module has
    attach(model, keep, options) -> (parameters, merge)
which makes the model ready to learn: `parameters` by name are what is trained, and `merge(stored)` gives the
tensors that have changed otherwise than through a parameter of that very name.
"""

METHODS = {
    "none": "compression.retraining.none",
    "mask_lora": "compression.retraining.mask_lora",
    "subset": "compression.retraining.subset",
}
