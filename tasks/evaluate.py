"""Stage evaluate@X: what a checkpoint is worth, measured on the bytes that ship. The same figures every time.

The dense model, which was never taught anything, judges beside it: how far the checkpoint has moved on retained text,
and whether what it says is language. Texts are read and written here; no figure tells what they say.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import AutoTokenizer

from compression.core.checkpoint import Checkpoint
from compression.core.files import read_tensors, write_text
from compression.core.skeleton import Skeleton
from compression.evaluation.answers import Decode, answer_figures, answers, pieces, prompts, true_answers
from compression.evaluation.fluency import Answer, Bounds, calibrate_lengths, is_gibberish
from compression.evaluation.generation import generate, load_model
from compression.evaluation.harm import HARMFUL, classify, failure_rate, harmful_rate, open_classifier
from compression.evaluation.loss import (
    TokenFigures,
    divergence,
    last_states,
    state_losses,
    token_figures,
)
from compression.evaluation.membership import auc, scores
from compression.evaluation.memorisation import answer_mean, sample_figures
from compression.evaluation.size import measure_size
from compression.quantization.packed import block_reader, plain_outer
from compression.training.samples import Samples, padded
from tasks.checkpoints import CHECKPOINTS, checkpoint_name
from tasks.core.entry import run_stage
from tasks.core.passing import figures_of_dense
from tasks.core.paths import DATA
from tasks.core.stage import Stage, open_stage
from tasks.core.text import CORPORA, corpus_file, read_samples, read_sequences
from tasks.params.base import read
from tasks.params.evaluate import Evaluate

DENSE = DATA / CHECKPOINTS["dense"]
CLASSIFIER = DATA / "classifier"
ROLES = ("forget", "control", "retained")
BATCH = 32  # prompts that are answered together; more are no faster on two cores, and are padded more


def main(name: Annotated[str, typer.Argument(callback=checkpoint_name)]) -> None:
    params = read(Evaluate)
    folder = DATA / CHECKPOINTS[name]
    texts = [f"evaluation/{file.stem}" for file in sorted((CORPORA / "evaluation").glob("*.safetensors"))]
    output = DATA / "evaluation" / f"{name}.json"
    if figures_of_dense(name, folder, output):
        return
    inputs = dict.fromkeys([folder, DENSE, CLASSIFIER / "classifier.json", *map(corpus_file, [*texts, *ROLES])])
    stage = open_stage(f"evaluate-{name}", output, list(inputs), params)

    samples = {role: read_role(role, params, params.prompt) for role in ROLES}
    whole = read_role("retained", params, prompt=1)  # all of it is there to be kept, not only what follows a prompt
    ids = {role: read_sequences(role, params.windows, params.length, "params.yaml: evaluate.windows") for role in texts}
    skeleton, judge = open_skeleton(folder, stage), open_skeleton(DENSE, stage)
    decode = partial(AutoTokenizer.from_pretrained(folder, local_files_only=True).decode, skip_special_tokens=True)

    states = last_states(skeleton, ids | {role: own.ids for role, own in samples.items()})
    found = {role: token_figures(skeleton, states[role]) for role in ROLES}
    asked = {role: own for role in ROLES if len((own := questions(role, samples[role], params)).ids)}
    said = say(folder, asked, params, stage) if asked else {}
    judged = last_states(judge, {"retained": whole.ids} | {f"said/{role}": own.ids for role, own in said.items()})
    losses = {role: state_losses(judge, own) for role, own in judged.items()}
    spoken = {role: answers(own, losses[f"said/{role}"], decode) for role, own in said.items()}
    cut = partial(pieces, samples["retained"], losses["retained"], decode=decode)
    bounds = calibrate_lengths(cut, params.answer_tokens)
    figures = {
        "checkpoint": name,
        "perplexity": {
            role.removeprefix("evaluation/"): state_losses(skeleton, states[role]).double().mean().exp().item()
            for role in texts
        },
        "forget": {
            "loss": answer_mean(found["forget"].loss, samples["forget"]),
            "control_loss": answer_mean(found["control"].loss, samples["control"]),
            "tokens": int(samples["forget"].answer.sum()),
        },
        "retain": {
            "loss": answer_mean(found["retained"].loss, whole),
            "divergence": answer_mean(divergence(judge, judged["retained"], skeleton, states["retained"]), whole),
            "tokens": int(whole.answer.sum()),
        },
        "membership": membership(found, samples, decode),
        "answers": {
            role: answer_figures(own, true_answers(asked[role], decode, params.answer_tokens), bounds)
            for role, own in spoken.items()
        },
        "harm": harm({role: own for role, own in spoken.items() if judged_for_harm(role)}, bounds, stage),
        **memorised(found, samples),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, json.dumps(figures | measure_size(Checkpoint(folder)), indent=2) + "\n")


def read_role(role: str, params: Evaluate, prompt: int) -> Samples:
    return read_samples(
        role, params.forget_windows, params.forget_length, "params.yaml: evaluate.forget_windows", prompt
    )


def open_skeleton(folder: Path, stage: Stage) -> Skeleton:
    checkpoint = Checkpoint(folder)
    return Skeleton(folder, plain_outer(checkpoint), block_reader(checkpoint), stage.device, stage.dtype)


def memorised(found: dict[str, TokenFigures], samples: dict[str, Samples]) -> dict[str, Any]:
    """Under `memorisation` the means by role, under `samples` the figures of each sample."""
    known = {role: sample_figures(found[role], samples[role]) for role in ROLES}
    return {
        "memorisation": {role: {key: own.mean().item() for key, own in known[role].items()} for role in ROLES},
        "samples": {role: {key: own.tolist() for key, own in known[role].items()} for role in ROLES},
    }


def membership(found: dict[str, TokenFigures], samples: dict[str, Samples], decode: Decode) -> dict[str, float]:
    """By score: how well it tells the text to forget from the control text, as AUC."""
    seen, unseen = (scores(found[role], samples[role], true_answers(samples[role], decode)) for role in ROLES[:2])
    return {score: auc(seen[score], unseen[score]) for score in seen}


def judged_for_harm(role: str) -> bool:
    """Whether the role is questions whose answers could be harmful."""
    return role != "retained" and "ids" in read_tensors(corpus_file(role))


def questions(role: str, samples: Samples, params: Evaluate) -> Samples:
    """Those of a role that the model is asked; rates of harmful answers need more of them than other figures."""
    if not judged_for_harm(role):
        return Samples(samples.ids[: params.answers], samples.answer[: params.answers])
    if not params.harm_answers:
        return Samples(samples.ids[:0], samples.answer[:0])
    return read_samples(role, params.harm_answers, params.forget_length, "params.yaml: evaluate.harm_answers")


def say(folder: Path, asked: dict[str, Samples], params: Evaluate, stage: Stage) -> dict[str, Samples]:
    """What the model goes on with behind each role's prompts."""
    model = load_model(folder, stage.device, stage.dtype)
    before = {role: prompts(own) for role, own in asked.items()}
    together = [prompt for own in before.values() for prompt in own]
    said = iter(generate(model, together, params.answer_tokens, sequences=BATCH))
    behind = {role: [next(said) for _ in own] for role, own in before.items()}
    length = max(map(len, together)) + params.answer_tokens
    return {role: padded(own, behind[role], length, filler=0) for role, own in before.items()}


def harm(spoken: dict[str, list[Answer]], bounds: Mapping[int, Bounds], stage: Stage) -> dict[str, Any]:
    """By role, the share of answers that are harmful, that of those that are harmful or gibberish, and which are what.

    Args:
        spoken: answers to questions, by role.
        bounds: of language, by length.
    """
    if not spoken:
        return {}
    classifier = open_classifier(CLASSIFIER, stage.device)
    found: dict[str, Any] = {}
    for role, own in spoken.items():
        probabilities = classify(classifier, [answer.text for answer in own])
        gibberish = [is_gibberish(answer, bounds) for answer in own]
        found[role] = {
            "answers": len(own),
            "rate": harmful_rate(probabilities),
            "failed": failure_rate(probabilities, gibberish),
            "harmful": (probabilities >= HARMFUL).tolist(),
            "gibberish": gibberish,
        }
    return found


if __name__ == "__main__":
    run_stage(lambda: typer.run(main))
