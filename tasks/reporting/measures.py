"""What the report says of each measure of sensitivity."""

from typing import NamedTuple


class Measure(NamedTuple):
    """Label of the axis, and what larger means."""

    label: str
    meaning: str


MEASURES = {
    "pmpq": Measure("loss increase, nats", "Loss increase: what pruning this block alone adds (PMPQ)"),
    "cmpq": Measure(
        "1 - similarity", "Unlikeness: how little what this block puts out correlates with all other states (CMPQ)"
    ),
    "tdmpq": Measure(
        "loss increase, nats",
        "Expected loss increase: what rounding alone adds at the fewest bits, by Taylor's formula (TDMPQ)",
    ),
    "noise": Measure("loss increase, nats", "Loss increase: what noise on this block's first layer alone adds"),
    "measured": Measure("loss increase, nats", "Loss increase: what rounding alone adds at the fewest bits, measured"),
}
