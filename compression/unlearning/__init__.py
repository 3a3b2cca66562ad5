"""Unlearning objectives: a file each, a line each.

An objective's module has
    combine(forget, retain, options) -> loss
with the mean losses in nats a token on the text to forget and on the text to retain, both scalars.
"""

METHODS = {
    "none": "compression.unlearning.none",
    "gradient_ascent": "compression.unlearning.gradient_ascent",
}
