"""llm-compressor's GPTQ, 4 bits, symmetric, groups of 64; run by the Python of an environment that holds it.

    python -m venv peer && peer/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    peer/bin/python benchmarks/quantize_peer.py data/model data/corpora/calibration.safetensors out --length 512

Its usual pipeline and settings (static activation order, damping 0.01, blocks of 128), with what it writes packed by
itself; head and embedding are left as they are. The config group is spelled out, since the preset W4A16 has groups of
128 and fails on widths that these do not divide. The last line printed is JSON; times are those of reading,
quantising and writing, without the start of Python and its libraries.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  loaded before the clock starts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder that transformers loads")
    parser.add_argument("tokens", type=Path, help="safetensors file with whole numbers `tokens`, of any shape")
    parser.add_argument("out", type=Path, help="folder for the quantised model")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    chosen = parser.parse_args()
    ids = load_file(chosen.tokens)["tokens"].flatten().long()
    ids = ids[: chosen.sequences * chosen.length].view(-1, chosen.length)
    torch.set_num_threads(chosen.threads)
    wall, cpu = time.perf_counter(), time.process_time()
    quantize(chosen.model, ids, chosen.out, getattr(torch, chosen.dtype))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"cpu_s": cpu, "wall_s": wall, "peak_mib": peak}))


def quantize(source: Path, ids: torch.Tensor, out: Path, dtype: torch.dtype) -> None:
    """Reads the model, quantises it on tokens [sequences, length] and writes it."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    grid = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=64)
    scheme = QuantizationScheme(targets=["Linear"], weights=grid)
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["re:.*lm_head"]),
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(out, save_compressed=True)


if __name__ == "__main__":
    main()
