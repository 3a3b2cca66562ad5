"""Sensitivities of blocks and layers: a file each, a line each.

A measure's module has
    measure(skeleton, ids, journal, settings) -> {column: {layer: value}}
with a column of the measure's own name, where larger means that the layer suffers more. A measure that says what a
layer costs at each width has columns cost_2, cost_3 and so on as well: by how many nats a token the loss is expected to
rise (of an encoder, see there) when that layer alone is rounded to so many bits. Costs of several layers add up.
"""

METHODS = {
    "none": "compression.sensitivity.none",
    "pmpq": "compression.sensitivity.pmpq",
    "cmpq": "compression.sensitivity.cmpq",
    "tdmpq": "compression.sensitivity.tdmpq",
    "noise": "compression.sensitivity.noise",
    "measured": "compression.sensitivity.measured",
}
"""Method `none`: nothing is scored; the table has outlier ratios only."""
