"""Retraining methods: a file each, a line each.

A method's module has
    attach(model, keep, options) -> (parameters, merge)
which makes the model ready to learn: `parameters` by name are what is trained, and `merge(stored)` gives the
tensors that have changed otherwise than through a parameter of that very name. A method whose adapter is not merged
has
    save(folder, parameters, options)
as well, which writes it beside the weights.
"""

METHODS = {
    "none": "compression.retraining.none",
    "subset": "compression.retraining.subset",
    "mask_lora": "compression.retraining.mask_lora",
    "scale_lora": "compression.retraining.scale_lora",
    "lora_prune": "compression.retraining.lora_prune",
    "lora": "compression.retraining.lora",
    "full": "compression.retraining.full",
}
