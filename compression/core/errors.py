"""The one exception that is meant for people."""


class Problem(Exception):
    """Something a user can put right.

    Args:
        where: file and key, or the layer's name: `params.yaml: prune.sparsity`.
        what: what is wrong, with the offending value.
        valid: what would be valid, or what to do; may be empty.
    """

    def __init__(self, where: str, what: str, valid: str = "") -> None:
        self.where, self.what, self.valid = where, what, valid
        super().__init__(f"{where}: {what}" + (f"\n  {valid}" if valid else ""))
