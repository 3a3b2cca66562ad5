"""Sensitivities of blocks: a file each, a line each.

A measure's module has
    measure(skeleton, ids, journal, sparsity) -> {block: score}
where a larger score means that the block suffers more.
"""

METHODS = {
    "none": "compression.sensitivity.none",
    "pmpq": "compression.sensitivity.pmpq",
}
