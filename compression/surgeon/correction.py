"""Between two shots what is left of the model learns a little, so that the next one starts from less damage.

Every linear in the blocks gets a low-rank adapter under its mask, which is merged before the next shot: the paper's
LoRA correction (arXiv 2312.17244), but one that keeps single weights and N:M as well. Norms and biases stay as they
are, so that the bias of a removed row stays zero. After the last shot comes stage retrain, which has more to choose
from. This alone of the surgeon has the whole model in memory.

    work/shot-T/correction    journal of the training
    work/shot-T/corrected     the model that the shot starts from
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compression.core.checkpoint import MANIFEST, Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.core.journal import Journal
from compression.core.skeleton import empty_model
from compression.retraining import mask_lora
from compression.retraining.run import retrain_model
from compression.training.loop import Recipe

CORRECTED = "corrected"
CORRECTION = "correction"


@dataclass(frozen=True)
class Correction:
    """How much is learned between two shots.

    Attributes:
        steps: of one sequence each.
        rank: of the adapters; the update is B A, without a factor.
        learning_rate: of the first step, falling in a line to zero.
        seed: with the number of the shot it draws A and the order of the sequences.
    """

    steps: int
    rank: int
    learning_rate: float
    seed: int


def check_correctable(source: Checkpoint) -> None:
    """Raises Problem for a model that does not predict the next token, before any shot is taken."""
    if not empty_model(source.folder).can_generate():  # type: ignore[operator]
        raise Problem("params.yaml: surgeon.correction_steps", "an encoder learns by no next-token loss", "valid: 0")


def correct(
    before: Checkpoint,
    folder: Path,
    correction: Correction,
    shot: int,
    ids: Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> Checkpoint:
    """The checkpoint that a shot starts from, going on behind the last saved step of a killed run.

    Args:
        before: what the shot before has left; weights float32.
        folder: of the shot.
        shot: its number.
        ids: calibration tokens int64 [N, T].
        dtype: of the forward and backward pass.

    Returns:
        the same masks and record; `corrections` of its manifest has one list of losses more, by step in nats a token.

    Raises:
        Problem: a loss or gradient that is not finite.
    """
    target = folder / CORRECTED
    if (target / MANIFEST).exists():
        return Checkpoint(target)
    adapters = {"targets": [], "rank": correction.rank, "alpha": correction.rank, "seed": correction.seed + shot}
    frozen = dict.fromkeys(("biases", "norms", "head", "embeddings"), False)
    training = {"checkpointing": True, "distillation": 0.0, "held_out": 0, "search": [], "search_steps": 0}
    writer = CheckpointWriter(target, before.folder)
    try:
        told = retrain_model(
            before,
            before,
            writer,
            Journal(folder / CORRECTION),
            mask_lora,
            adapters | frozen | training,
            Recipe(correction.steps, correction.learning_rate, warmup=0.0, clip=1.0),
            ids,
            1,
            device,
            dtype,
        )
    except Problem as problem:
        where = f"correction before shot {shot}"
        raise Problem(where, problem.what, "lower surgeon.correction_learning_rate") from problem
    record = {key: before.manifest[key] for key in ("blocks", "layers", "pruning")}
    curves = [*before.manifest["corrections"], told["losses"]]
    writer.finish(before.depth, record | {"corrections": curves})
    return Checkpoint(target)
