"""The arms of llm-compressor in benchmarks/pruning.py; run by the Python of an environment that holds it.

    python -m venv peer && peer/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    python -m benchmarks.pruning peer/wanda peer/sparsegpt --peer peer/bin/python --sequences 16

Its usual pipeline on its usual settings, float32, one thread; the head is left out by a pattern, since the plain name
`lm_head` is missed and half of the head and of the tied embedding would go.
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

MODIFIERS = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}


def main() -> None:
    method, source, scratch = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    ids = load_file(scratch / "ids.safetensors")["ids"]
    torch.set_num_threads(1)
    wall, cpu = time.perf_counter(), time.process_time()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    recipe = MODIFIERS[method](sparsity=0.5, mask_structure="0:0", targets=["Linear"], ignore=["re:.*lm_head"])
    oneshot(
        model=model,
        dataset=rows,
        recipe=recipe,
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(scratch / "checkpoint", save_compressed=False)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"cpu_s": cpu, "wall_s": wall, "peak_mib": peak}))


if __name__ == "__main__":
    main()
