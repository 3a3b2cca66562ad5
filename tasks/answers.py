"""Stage answers: the dense model answers prompts, so that there is something of its own to unlearn.

Writes `data/answers/harmful.jsonl` with a row a prompt in PKU-SafeRLHF's schema. No answer has been judged: all are
marked unsafe, and a classifier counts later how many are. Nothing is ever printed of them.
"""

import json
from itertools import chain, zip_longest
from typing import Any

import torch
from transformers import AutoTokenizer

from compression.core.errors import Problem
from compression.core.files import sha256, write_text
from compression.evaluation.generation import generate, load_model
from tasks.core.entry import run_stage
from tasks.core.paths import DATA
from tasks.core.stage import Stage, open_stage
from tasks.pairs import check_text, framed, read_records
from tasks.params.answers import Answers
from tasks.params.base import read
from tasks.sources import fetch

FILE = "harmful.jsonl"
WHERE = "params.yaml: answers"


def main() -> None:
    params = read(Answers)
    stage = open_stage("answers", DATA / "answers", [DATA / "model"], params)
    rows = answer_prompts(draw_prompts(params), params, stage) if params.prompts else []
    folder = stage.work / "answers"
    folder.mkdir(exist_ok=True)
    write_text(folder / FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    record = stage.record(params) | {"answers": "the model's own, unjudged", "files": {FILE: sha256(folder / FILE)}}
    write_text(folder / "manifest.json", json.dumps(record, indent=2) + "\n")
    stage.publish(folder)


def draw_prompts(params: Answers) -> list[tuple[str, str]]:
    """Prompts of all files in the order in which they are asked, each with its source: one of each file in turn.

    Raises:
        Problem: a file cannot be fetched or read, or has a row without a prompt.
    """
    files = []
    draw = torch.Generator().manual_seed(params.seed)
    for number, file in enumerate(params.prompts):
        where = f"{WHERE}.prompts.{number}"
        records = read_records(fetch(file.source, file.sha256, where=f"{where}.source"), f"{where}.source")
        for place, record in records:
            check_text(record.get("prompt", ""), f"the prompt of {place}", f"{where}.source")
        files.append([(records[row][1]["prompt"], file.source) for row in torch.randperm(len(records), generator=draw)])
    in_turn = (prompt for prompt in chain.from_iterable(zip_longest(*files)) if prompt is not None)
    return list(dict(in_turn).items())  # a prompt that is there twice is asked once


def answer_prompts(prompts: list[tuple[str, str]], params: Answers, stage: Stage) -> list[dict[str, Any]]:
    """The first prompts to which the model says something, with what it says.

    Raises:
        Problem: there are fewer than asked for.
    """
    folder = DATA / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    model = load_model(folder, stage.device, stage.dtype)
    rows: list[dict[str, Any]] = []
    asked = 0
    while len(rows) < params.count:  # a model may end at once, so that the next prompt has to stand in
        batch = prompts[asked : asked + params.count - len(rows)]
        if not batch:
            what = f"{params.count} prompts asked for, but of {len(prompts)} there are {len(rows)} the model answers"
            raise Problem(f"{WHERE}.count", what, f"at most {len(rows)}, or name more files")
        said = generate(
            model,
            [framed(tokenizer, prompt, params.frame) for prompt, _ in batch],
            params.tokens,
            params.seed + asked,
            params.temperature,
            params.top_p,
        )
        for (prompt, source), ids in zip(batch, said, strict=True):
            if text := tokenizer.decode(ids, skip_special_tokens=True).strip():
                rows.append(
                    {
                        "prompt": prompt,
                        "response_0": text,
                        "is_response_0_safe": False,
                        "prompt_source": source,
                        "response_0_source": "the model itself, unjudged",
                    }
                )
        asked += len(batch)
    return rows


if __name__ == "__main__":
    run_stage(main)
