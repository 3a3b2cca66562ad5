"""Rules on texts: those that stages read are there, long enough, and kept apart."""

from collections.abc import Iterator
from typing import Any

from compression.core.errors import Problem
from tasks.checks.rule import Rule
from tasks.params.answers import Answers
from tasks.params.attack import Attack
from tasks.params.base import PARAMS
from tasks.params.calibrate import Calibrate
from tasks.params.classifier import Classifier
from tasks.params.corpora import Corpora, Pairs, Text
from tasks.params.evaluate import Evaluate
from tasks.params.imp import Imp
from tasks.params.prune import Prune
from tasks.params.quantize import Quantize
from tasks.params.retrain import Retrain
from tasks.params.sensitivity import Sensitivity
from tasks.params.teach import Teach
from tasks.params.unlearn import Unlearn

OWN_ANSWERS = "file://data/answers/"  # what stage answers writes, a row a question


def text_suffices(
    corpora: Corpora,
    teach: Teach,
    calibrate: Calibrate,
    sensitivity: Sensitivity,
    imp: Imp,
    prune: Prune,
    retrain: Retrain,
    quantize: Quantize,
    unlearn: Unlearn,
    attack: Attack,
    evaluate: Evaluate,
    layers: dict[str, list[int]],
) -> Iterator[Problem]:
    """No stage asks a role for more tokens than its slice can hold."""
    wanted: list[tuple[str, str, Text | Pairs, int]] = [
        ("teach.length", "forget", corpora.forget, teach.length if teach.method != "none" else 0),
        ("teach.length", "training", corpora.training, teach.length if teach.method != "none" and teach.mix else 0),
        ("calibrate.sequences", "calibration", corpora.calibration, calibrate.sequences * calibrate.length),
        (
            "sensitivity.sequences",
            "calibration",
            corpora.calibration,
            sensitivity.sequences * sensitivity.length,
        ),
        ("prune.sequences", "calibration", corpora.calibration, prune.sequences * prune.length),
        (
            "imp.retrain.length",
            "training",
            corpora.training,
            (imp.retrain.held_out + 1) * imp.retrain.length if imp.cycles else 0,
        ),
        ("retrain.length", "training", corpora.training, (retrain.held_out + 1) * retrain.length),
        (
            "quantize.sequences",
            "calibration",
            corpora.calibration,
            quantize.sequences * quantize.length if quantize.method == "gptq" else 0,
        ),
        (
            "quantize.tune.length",
            "training",
            corpora.training,
            (quantize.tune.held_out + 1) * quantize.tune.length if quantize.tunes else 0,
        ),
        ("unlearn.length", "forget", corpora.forget, unlearn.length),
        ("unlearn.length", "control", corpora.control, unlearn.length if unlearn.forget_ceiling == "control" else 0),
        ("unlearn.length", "training", corpora.training, (unlearn.held_out + 1) * unlearn.length),
    ]
    if corpora.neighbours:
        wanted.append(("unlearn.length", "neighbours", corpora.neighbours, unlearn.length))
    if attack.relearn + attack.requantize + attack.prune:
        windows = {"forget": attack.samples + attack.windows, "control": attack.windows, "retained": attack.windows}
        wanted += [("attack.windows", role, getattr(corpora, role), n * attack.length) for role, n in windows.items()]
    forgetting = evaluate.forget_windows * evaluate.forget_length
    for role in ("forget", "control", "retained"):
        wanted.append(("evaluate.forget_windows", role, getattr(corpora, role), forgetting))
    for name, judge in corpora.evaluation.items():
        wanted.append(("evaluate.windows", f"evaluation.{name}", judge, evaluate.windows * evaluate.length))
    for key, role, text, tokens in wanted:
        if isinstance(text, Pairs):  # how long they are is known once they are tokenised
            continue
        start, stop = text.tokens
        if stop is not None and tokens > stop - start:
            yield Problem(
                f"{PARAMS}: {key}",
                f"{tokens:,} tokens are needed of corpora.{role}, whose slice [{start}, {stop}] holds {stop - start:,}",
                "ask for fewer, or widen the slice",
            )


def questions_suffice(
    corpora: Corpora,
    answers: Answers,
    unlearn: Unlearn,
    attack: Attack,
    evaluate: Evaluate,
    layers: dict[str, list[int]],
) -> Iterator[Problem]:
    """No stage asks a role for more questions than it has; told only where a row has one answer, and not several."""
    wanted = [("evaluate.forget_windows", role, evaluate.forget_windows) for role in ("forget", "control", "retained")]
    wanted += [("evaluate.harm_answers", role, evaluate.harm_answers) for role in ("forget", "control")]
    if unlearn.method != "none":
        wanted.append(("unlearn.held_out", "training", unlearn.held_out + 1))
    if attack.relearn + attack.requantize + attack.prune:
        wanted.append(("attack.samples", "forget", attack.samples + attack.windows))
        wanted += [("attack.windows", role, attack.windows) for role in ("control", "retained")]
    for key, role, count in wanted:
        there = _questions(getattr(corpora, role), answers)
        if there is not None and count > there:
            yield Problem(
                f"{PARAMS}: {key}",
                f"{count} questions are needed of corpora.{role}, whose rows hold {there}",
                "ask for fewer, or widen the rows",
            )


def _questions(text: Text | Pairs, answers: Answers) -> int | None:
    """How many a role has, at most; None where params.yaml does not tell."""
    if isinstance(text, Text):
        return None
    own, (start, stop) = text.source.startswith(OWN_ANSWERS), text.rows
    if own and answers.prompts:
        stop = min(stop or answers.count, answers.count)
    elif own or text.format == "pairs":  # nothing to count, or a row may have several answers
        return None
    return max(stop - start, 0) if stop is not None else None


def classifier_is_apart(
    classifier: Classifier, answers: Answers, corpora: Corpora, layers: dict[str, list[int]]
) -> Iterator[Problem]:
    """The classifier has not learned from what models are asked and judged on."""
    asked = {"answers": answers, "corpora.forget": corpora.forget, "corpora.control": corpora.control}
    for role, entry in asked.items():
        judged = _addresses(entry.model_dump())
        for number, part in enumerate(classifier.harmful):
            if judged & {part.source, part.sha256} - {None}:
                yield Problem(
                    f"{PARAMS}: classifier.harmful.{number}",
                    f"it is also in {role}, on which models are judged",
                    "take it out here or there",
                )


def _addresses(entry: Any) -> set[str]:
    """Every source and hash in a role's entry, however it nests them."""
    if isinstance(entry, dict):
        own = {entry[key] for key in ("source", "sha256") if isinstance(entry.get(key), str)}
        return own.union(*map(_addresses, entry.values()))
    return set().union(*map(_addresses, entry)) if isinstance(entry, list | tuple) else set()


def answers_are_there(answers: Answers, corpora: Corpora, layers: dict[str, list[int]]) -> Iterator[Problem]:
    """A role reads the model's own answers only if it gives some, and no more than it gives."""
    for role, text in corpora.roles().items():
        if not text.source.startswith(OWN_ANSWERS):
            continue
        key = f"{PARAMS}: corpora.{role.replace('/', '.')}"
        if not answers.prompts:
            yield Problem(f"{key}.source", "answers.prompts is empty, so there are no answers", "name files of prompts")
        elif isinstance(text, Pairs) and (text.rows.stop or text.rows.start + 1) > answers.count:
            what = f"[{text.rows.start}, {text.rows.stop or 'null'}] goes beyond the {answers.count} of answers.count"
            yield Problem(f"{key}.rows", what, "ask for fewer, or raise answers.count")


RULES: list[Rule] = [
    text_suffices,
    questions_suffice,
    classifier_is_apart,
    answers_are_there,
]
