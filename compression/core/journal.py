"""What a killed stage needs to go on where it died: finished blocks, and the live state for the next one."""

from pathlib import Path

import torch
from torch import Tensor

from compression.core.files import read_tensors, write_tensors

FINISHED = "journal.finished"


class Journal:
    """A folder outside the stage's outputs, named by the fingerprint of inputs, parameters and code.

    The live state is stored, not recomputed: chain values that are computed anew from stored blocks are not
    always equal to the bit, and then a resumed run would end in other bytes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._live = folder / "live.safetensors"

    def save(self, finished: int, state: dict[str, Tensor]) -> None:
        """Notes that `finished` steps or blocks are done and `state` is what the next one starts from."""
        write_tensors(self._live, state | {FINISHED: torch.tensor(finished)})

    def load(self) -> tuple[int, dict[str, Tensor]]:
        """(finished, state) of the last save; (0, {}) at the start."""
        if not self._live.exists():
            return 0, {}
        state = read_tensors(self._live)
        return int(state.pop(FINISHED)), state
