"""What a user, or an attacker, may do to an unlearned model, and what then comes back.

An attack gives a `Reader`: the weights of a block as the attacked model has them, made when the block is read. The
measures of forgetting walk it like any checkpoint, and nothing is written to disk.
"""

from collections.abc import Callable

from torch import Tensor

Reader = Callable[[int], dict[str, Tensor]]  # block -> its tensors by full name, plain
