"""Unlearning objectives: a file each, a line each.

An objective's module has
    SETTINGS                   the options that it reads beside the weights, with the values that its paper has
    RISES                      False where it does not push the loss on the forget text up; left out: it does
    loss(draw, options) -> (loss, figures)
with a scalar to descend on, and what is worth keeping of the step: `forget` and `retain`, the mean losses of both texts
in nats a token where they are known, and terms of its own. `compression.unlearning.draw.Draw` is what it may look at.

Symbols: p the model in training, p0 the one it started as, y an answer behind its prompt x; NLL is -log p(y | x), a sum
over the answer's tokens, and `forget_weight` and `retain_weight` are the weights of what is forgotten and retained.
"""

METHODS = {
    "none": "compression.unlearning.none",
    "gradient_ascent": "compression.unlearning.gradient_ascent",
    "grad_diff": "compression.unlearning.grad_diff",
    "llmu": "compression.unlearning.llmu",
    "npo": "compression.unlearning.npo",
    "simnpo": "compression.unlearning.simnpo",
    "dpo": "compression.unlearning.dpo",
    "refuse": "compression.unlearning.refuse",
    "rmu": "compression.unlearning.rmu",
    "undial": "compression.unlearning.undial",
}

# What of the model learns (unlearn.train), a file each, a line each: its module has
#     freed(model, source, stored, keep, options) -> compression.training.trained.Trained
# which frees parameters of the whole `model`, given the checkpoint that it came from, its tensors as stored, by full
# name, and its masks, bool [out, in] by layer.
TRAINED = {
    "codes": "compression.training.codes",
    "scales": "compression.training.scales",
}
