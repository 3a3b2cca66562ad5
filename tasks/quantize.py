"""Stage quantize: put the weights on a grid, finer where the model is sensitive, and pack them."""

from importlib import import_module

import pandas as pd

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.core.journal import Journal
from compression.quantization import METHODS
from compression.quantization.bits import bits_by_sensitivity
from compression.quantization.packed import config_entry
from compression.quantization.run import quantize_model
from tasks.core.entry import run_stage
from tasks.core.passing import lineage, pass_through
from tasks.core.paths import DATA
from tasks.core.stage import open_stage
from tasks.params.base import read
from tasks.params.quantize import Quantize

TABLE = DATA / "sensitivity" / "sensitivity.csv"


def main() -> None:
    params = read(Quantize)
    method = import_module(METHODS[params.method])
    stage = open_stage("quantize", DATA / "quantized", [DATA / "retrained", TABLE], params)
    source = Checkpoint(DATA / "retrained")
    folder = stage.work / "checkpoint"
    if params.method == "none":
        pass_through(source, folder, stage.record(params))
        return stage.publish(folder)
    bits = _bits(params, source)
    writer = CheckpointWriter(folder, source.folder)
    quantize_model(source, writer, Journal(stage.work / "journal"), method, bits, params.group_size)
    config = source.config() | {"quantization_config": config_entry(bits, params.group_size)}
    quantization = {"quantization": {"group_size": params.group_size, "bits": bits}}
    writer.finish(source.depth, lineage(source) | stage.record(params) | quantization, config)
    stage.publish(folder)


def _bits(params: Quantize, source: Checkpoint) -> dict[str, int]:
    table = pd.read_csv(TABLE)
    if params.sensitive_share and table[params.by].isna().any():
        raise Problem(
            "params.yaml: quantize.by",
            f"the sensitivity table has no `{params.by}`",
            "set sensitivity.method to pmpq, or quantize.sensitive_share to 0",
        )
    blocks = dict(zip(table["layer"], table["block"].astype(int), strict=True))
    scores = dict(enumerate(table.groupby("block")[params.by].mean().tolist()))
    layers = {layer: blocks[layer] for layer in source.layers}
    return bits_by_sensitivity(scores, layers, params.sensitive_share, params.bits, params.sensitive_bits)


if __name__ == "__main__":
    run_stage(main)
