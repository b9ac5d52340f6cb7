"""What an evaluation finds, as plain numbers: best-of-N over questions with candidates, and how steps are judged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dreamprm_jax import selection, step_benchmark
from dreamprm_jax.data.answers import vote_key
from dreamprm_jax.data.candidates import Contest
from dreamprm_jax.data.example import HUMAN, Example
from dreamprm_jax.data.formats.disciplines import discipline
from dreamprm_jax.errors import InputError
from dreamprm_jax.losses import AGGREGATIONS, PROBABILITIES
from dreamprm_jax.scoring import response_scores
from dreamprm_jax.selection import Field, Interval

FACETS = ("subject", "discipline", "image type", "difficulty")
"""What questions are grouped by."""


class Settings(NamedTuple):
    """How an evaluation reads scores; the fields are those of the config's `evaluate`, and `aggregate`."""

    aggregate: str = "mean"  # the one that stands for "the model"; the others are reported beside it
    step_score: str = "full"
    ties: selection.Ties = "first"
    num_samples: int = 400
    seed: int = 0
    threshold: float | None = None
    held_out: float = 0.2


class Scores(NamedTuple):
    """What a model says of chains, in their order."""

    steps: list[np.ndarray]  # of each chain [S]: P("+"), as Settings.step_score has it
    num_tokens: list[int] | None  # of each chain; None: not known
    num_unscored: int = 0  # chains that could not be scored: their steps have score 0


class Ballot(NamedTuple):
    """Questions and scores as arrays, Q questions of up to C candidates."""

    field: Field
    scores: dict[str, np.ndarray]  # by aggregation, [Q, C]; {} without a model
    outcomes: dict[str, np.ndarray]  # by rule of `selection`, [Q]


def facets(contest: Contest) -> dict[str, str | None]:
    """What a question counts under, by FACETS."""
    question = contest.question
    values = (question.subject, discipline(question.subject), question.image_type, question.difficulty)
    return dict(zip(FACETS, values, strict=True))


def ballot_of(contests: Sequence[Contest], scores: Scores | None, settings: Settings) -> Ballot:
    """Answers become votes, step scores response scores by every aggregation, and every rule chooses.

    Raises:
      InputError: a question without candidates.
    """
    for contest in contests:
        if not contest.candidates:
            raise InputError(f"{contest.question.place}: has no candidates; add them, or take the question out")
    field = selection.field_of(
        [[vote_key(c.answer, contest.question.options) for c in contest.candidates] for contest in contests],
        [[candidate.correct for candidate in contest.candidates] for contest in contests],
    )
    by_name = {} if scores is None else {name: response_scores(scores.steps, name) for name in AGGREGATIONS}
    packed = {name: selection.packed(field, values) for name, values in by_name.items()}
    return Ballot(field, packed, selection.outcomes(field, packed, settings.ties))


def model_rules(settings: Settings) -> dict[str, str]:
    """The rules of the aggregation that stands for the model: {title: rule}."""
    return {"weighted vote": f"weighted_vote/{settings.aggregate}", "PRM": f"prm/{settings.aggregate}"}


def selection_results(
    contests: Sequence[Contest], scores: Scores | None, ballot: Ballot, settings: Settings
) -> dict[str, Any]:
    """Best-of-N in numbers, JSON alone.

    `accuracy` by rule with a 95% bootstrap interval over questions; `runs`, the accuracy of the first candidates, the
    second ones, ...; `curves` by number of candidates; with a model also `gains` of each aggregation over each
    baseline, `ties`, and `lengths`; `groups` by FACETS.
    """
    field, found = ballot.field, ballot.outcomes
    counts = field.present.sum(axis=1)
    curves = selection.curves(field, ballot.scores, settings.ties, num_samples=settings.num_samples, seed=settings.seed)
    shown = [*selection.REFERENCES, *(model_rules(settings).values() if scores else ())]
    results = {
        "num_questions": len(contests),
        "num_candidates": int(counts.max()),
        "fewest_candidates": int(counts.min()),
        "num_responses": int(counts.sum()),
        "num_without_answer": int((field.present & (field.answers < 0)).sum()),
        "num_unscored": scores.num_unscored if scores else 0,
        "accuracy": {rule: _interval(values, settings.seed) for rule, values in found.items()},
        "runs": selection.run_accuracy(field).tolist(),
        "curves": {
            "sizes": list(curves.sizes),
            "mean": {rule: values.tolist() for rule, values in curves.mean.items()},
            "std": {rule: values.tolist() for rule, values in curves.std.items()},
        },
        "groups": _groups(contests, {rule: found[rule] for rule in shown}),
    }
    return results | (_model_results(scores, ballot, settings) if scores else {})


def _interval(values: np.ndarray, seed: int) -> dict[str, float]:
    return selection.paired_bootstrap([values], [np.zeros(len(values))], seed=seed)._asdict()


def _groups(contests: Sequence[Contest], found: Mapping[str, np.ndarray]) -> dict[str, dict]:
    labels = {name: [facets(contest)[name] for contest in contests] for name in FACETS}
    tables = {name: selection.by_group(found, own) for name, own in labels.items()}
    return {name: table for name, table in tables.items() if table}


def _model_results(scores: Scores, ballot: Ballot, settings: Settings) -> dict[str, Any]:
    field, chosen = ballot.field, ballot.scores[settings.aggregate]
    num_steps = selection.packed(field, [len(steps) for steps in scores.steps])
    lengths = {"steps": selection.length_effect(field, chosen, num_steps, settings.ties)._asdict()}
    if scores.num_tokens is not None:
        num_tokens = selection.packed(field, scores.num_tokens)
        lengths["tokens"] = selection.length_effect(field, chosen, num_tokens, settings.ties)._asdict()
    return {
        "gains": {name: gains(ballot.outcomes, name, settings.seed) for name in ballot.scores},
        "ties": {name: selection.tie_figures(field, values) for name, values in ballot.scores.items()},
        "lengths": lengths,
        "score_by_steps": selection.scores_by_length(field, chosen, num_steps),
        "responses": _told_apart(field.correct[field.present], chosen[field.present], settings.aggregate),
    }


def gains(outcomes: Mapping[str, np.ndarray], name: str, seed: int) -> dict[str, dict[str, float]]:
    """What the choice by one aggregation gains over each baseline, with interval and p-value: {baseline: figures}."""
    ours = outcomes[f"prm/{name}"]
    baselines = {"pass_at_1": "pass_at_1", "majority": "majority", "weighted_vote": f"weighted_vote/{name}"}
    found = {title: selection.gain(ours, outcomes[rule], seed=seed) for title, rule in baselines.items()}
    return {title: {**each.interval._asdict(), "p_value": each.p_value} for title, each in found.items()}


def _told_apart(is_right: np.ndarray, scores: np.ndarray, aggregate: str) -> dict[str, float | None]:
    """How well response scores tell right responses from wrong ones, over all of them."""
    found: dict[str, float | None] = {"auroc": step_benchmark.auroc(is_right, scores)}
    if aggregate in PROBABILITIES:
        calibration = step_benchmark.calibration(is_right, scores)
        found |= {"calibration_error": calibration.expected_error, "brier": calibration.brier}
    return found


# --- Steps.


def judged_steps(examples: Sequence[Example], scores: Scores) -> step_benchmark.Steps:
    """The steps of chains that people judged (`Example.step_truth`), with their scores.

    Raises:
      InputError: a score that is no probability.
    """
    return step_benchmark.steps_of(
        [example.step_truth for example in examples],
        [steps.tolist() for steps in scores.steps],
        [example.dataset or "no source" for example in examples],
        [_question_key(example) for example in examples],
    )


def _question_key(example: Example) -> str:
    """Equal for chains about one question: they must not lie on both sides of a split."""
    first = next(turn.text for turn in example.turns if turn.role == HUMAN)
    images = [str(image) if not isinstance(image, bytes) else str(hash(image)) for image in example.images]
    return "\n".join([first.partition("### Solution Process:")[0].strip(), *images])


def step_results(steps: step_benchmark.Steps, settings: Settings) -> dict[str, Any]:
    """How well steps are judged, in numbers, JSON alone.

    Where the threshold is chosen (`settings.threshold` None), all figures are of the chains that were not held out.
    `all_right` is what saying "right" to every step would give, on the same chains.

    Raises:
      InputError: the held-out part or the rest has steps of one kind alone.
    """
    chosen: dict[str, Any] = {"threshold": settings.threshold, "chosen_on": None}
    if settings.threshold is None:
        tuned = step_benchmark.tuned_step_f1(steps, settings.held_out, settings.seed)
        chosen = {
            "threshold": tuned.threshold,
            "chosen_on": {
                "num_chains": int(tuned.held_out.sum()),
                "share_of_questions": settings.held_out,
                "seed": settings.seed,
                "macro_f1": tuned.held_out_figures["macro_f1"],
            },
        }
        steps = step_benchmark.of_chains(steps, ~tuned.held_out)
    threshold = chosen["threshold"]

    def figures(part: step_benchmark.Steps) -> dict[str, Any]:
        first = step_benchmark.first_error(part, threshold)
        return {**step_benchmark.step_f1(part, threshold), **{f"first_error_{name}": first[name] for name in first}}

    known = step_benchmark.judged(steps)
    is_right = known.truth == step_benchmark.RIGHT
    calibration = step_benchmark.calibration(is_right, known.scores)
    by_source = step_benchmark.by_source(steps, figures)
    return {
        **chosen,
        "num_chains": len(steps.sources),
        "pooled": figures(steps),
        "mean_of_sources": _mean_of(by_source),
        "by_source": by_source,
        "all_right": step_benchmark.step_f1(steps._replace(scores=np.ones(len(steps.scores))), 0.5),
        "auroc": step_benchmark.auroc(is_right, known.scores),
        "calibration_error": calibration.expected_error,
        "brier": calibration.brier,
    }


def _mean_of(by_source: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The mean over the sources, of shares that every source has."""
    names = [name for name in next(iter(by_source.values()), {}) if "num_" not in name]
    columns = {name: [figures[name] for figures in by_source.values()] for name in names}
    return {name: float(np.mean(values)) for name, values in columns.items() if None not in values}


def finite(value: Any) -> Any:
    """The same with None for every number that JSON has not."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def interval_of(figures: Mapping[str, float]) -> Interval:
    """An interval as results have it."""
    return Interval(figures["mean"], figures["low"], figures["high"])
