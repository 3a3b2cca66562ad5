"""Stage quantize: put the weights on a grid, finer where the model is sensitive, tune its scales, and pack them."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.journal import Journal
from compression.core.skeleton import empty_model
from compression.export.vllm import vllm_faults
from compression.quantization import METHODS
from compression.quantization.method import Settings
from compression.quantization.run import quantize_model
from compression.quantization.scheme import Scheme, anatomy, config_entry, to_manifest
from compression.quantization.tune import tune_model
from compression.training.loop import Recipe
from compression.training.whole import check_causal
from tasks.core.entry import run_stage
from tasks.core.passing import lineage, pass_through
from tasks.core.paths import DATA
from tasks.core.stage import open_stage
from tasks.core.text import corpus_file, read_sequences
from tasks.params.base import read
from tasks.params.quantize import Quantize, Tune
from tasks.plan import bits_by_layer

DENSE = DATA / "taught"
TABLE = DATA / "sensitivity" / "sensitivity.csv"


def main() -> None:
    params = read(Quantize)
    method = import_module(METHODS[params.method])
    inputs = [DATA / "retrained", DENSE, TABLE, *map(corpus_file, ("calibration", "training"))]
    stage = open_stage("quantize", DATA / "quantized", inputs, params)
    source = Checkpoint(DATA / "retrained")
    folder = stage.work / "checkpoint"
    if params.method == "none":
        pass_through(source, folder, stage.record(params))
        return stage.publish(folder)
    if method.STATISTIC is None:
        ids = torch.empty(0, 0, dtype=torch.int64)
    else:
        ids = read_sequences("calibration", params.sequences, params.length, "params.yaml: quantize.sequences")
    bits = bits_by_layer(params, pd.read_csv(TABLE) if params.ranks else None, source.layers)
    model = anatomy(source.folder)
    schemes = all_schemes(params, bits, model.embedding)
    entry = config_entry(schemes, model)  # first of all, since it refuses what would not load
    if params.tunes:
        check_causal(empty_model(source.folder))
    rounded = stage.work / "rounded" if params.tunes else folder
    writer = CheckpointWriter(rounded, source.folder)
    ledger = quantize_model(
        source,
        writer,
        Journal(stage.work / "journal"),
        method,
        schemes,
        model,
        Settings(params.group_size, params.symmetric, params.clip, params.order, params.damping),
        ids,
        stage.device,
        stage.dtype,
    )
    quantization = to_manifest(schemes) | {"vllm_faults": vllm_faults(entry)}
    record = lineage(source) | stage.record(params) | {"quantization": quantization, "rounding": ledger}
    writer.finish(source.depth, record, source.config() | {"quantization_config": entry})
    if params.tunes:
        dense, journal = Checkpoint(DENSE), Journal(stage.work / "tuning")
        tuned(Checkpoint(rounded), dense, folder, params.tune, journal, stage.device, stage.dtype, record)
    stage.publish(folder)


def tuned(
    source: Checkpoint,
    dense: Checkpoint,
    folder: Path,
    params: Tune,
    journal: Journal,
    device: torch.device,
    dtype: torch.dtype,
    record: dict[str, Any],
) -> dict[str, Any]:
    """Writes the rounded checkpoint `source` to `folder` with scales that have learned.

    Args:
        record: what its manifest says beside what this adds under `training`, which is returned.
    """
    writer = CheckpointWriter(folder, source.folder)
    training = tune_model(
        source,
        dense,
        writer,
        journal,
        Recipe(params.steps, params.learning_rate, params.warmup, params.clip),
        read_sequences("training", None, params.length, "params.yaml: quantize.tune.length"),
        **params.model_dump(include={"sequences", "distillation", "held_out", "check_every", "seed"}),
        device=device,
        dtype=dtype,
    )
    writer.finish(source.depth, record | {"training": training}, source.config())
    return training


def all_schemes(params: Quantize, bits: dict[str, int], embedding: str) -> dict[str, Scheme]:
    """The scheme of every layer that is rounded, the embedding before the others if it is.

    Among layers of another scheme an embedding has to have 8 bits, for which a symmetric grid and one scale a row are
    fine enough.
    """
    layers = {layer: Scheme(width, params.group_size, params.symmetric) for layer, width in bits.items() if width <= 8}
    if not params.embeddings:
        return layers
    alike = Scheme(params.embeddings, params.group_size, params.symmetric)
    return {embedding: alike if set(layers.values()) <= {alike} else Scheme(params.embeddings, "row")} | layers


if __name__ == "__main__":
    run_stage(main)
