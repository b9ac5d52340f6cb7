"""What an evaluation finds, as plain numbers: best-of-N over questions with candidates, and how steps are judged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dreamprm_jax import selection, step_benchmark
from dreamprm_jax.data.answers import vote_key
from dreamprm_jax.data.candidates import Contest
from dreamprm_jax.data.example import HUMAN, Example, ImageSource
from dreamprm_jax.data.formats.disciplines import discipline
from dreamprm_jax.data.formats.prompts import FIRST_STEP_HEADING
from dreamprm_jax.data.images import image_size
from dreamprm_jax.errors import InputError
from dreamprm_jax.losses import AGGREGATIONS, PROBABILITIES
from dreamprm_jax.scoring import response_scores
from dreamprm_jax.selection import Field

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
    unscored: tuple[int, ...] = ()  # numbers of the chains that could not be scored: their steps have score 0


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
    second ones, ..., and `run_files`, where each is a file's; `curves` by number of candidates; with a model also
    `gains` of each aggregation over each baseline, `ties`, and `lengths`; `groups` by FACETS.
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
        "num_unscored": len(scores.unscored) if scores else 0,
        "accuracy": {rule: _interval(values, settings.seed) for rule, values in found.items()},
        "runs": selection.run_accuracy(field).tolist(),
        "run_files": _run_files(contests),
        "curves": {
            "sizes": list(curves.sizes),
            "mean": {rule: values.tolist() for rule, values in curves.mean.items()},
            "std": {rule: values.tolist() for rule, values in curves.std.items()},
        },
        "groups": _groups(contests, {rule: found[rule] for rule in shown}),
    }
    return results | (_model_results(scores, ballot, settings) if scores else {})


def outcome_lines(contests: Sequence[Contest], ballot: Ballot, settings: Settings) -> list[dict[str, Any]]:
    """A line a question, for those who compare models question by question: its id, and what each rule makes of it.

    A rule's value is the (expected) correctness of what it chooses, in [0, 1]; `chosen` is the model's candidate,
    counted from 0.
    """
    rules = {rule: rule for rule in selection.REFERENCES}
    if ballot.scores:
        rules |= {rule.partition("/")[0]: rule for rule in model_rules(settings).values()}
    columns = {name: ballot.outcomes[rule].tolist() for name, rule in rules.items()}
    if ballot.scores:
        columns["chosen"] = selection.chosen(ballot.field, ballot.scores[settings.aggregate], settings.ties).tolist()
    values = zip(*columns.values(), strict=True)
    return [
        {"id": contest.question.id, **dict(zip(columns, row, strict=True))}
        for contest, row in zip(contests, values, strict=True)
    ]


def _run_files(contests: Sequence[Contest]) -> list[str] | None:
    """The file of the first candidates, of the second ones, ...; None where all are of one file."""
    places = [[candidate.example.place for candidate in contest.candidates] for contest in contests]
    files = [[place.rpartition(" row ")[0] for place in row] for row in places]
    return files[0] if len(set(files[0])) > 1 and all(row == files[0] for row in files) else None


def _interval(values: np.ndarray, seed: int) -> dict[str, float]:
    return selection.paired_bootstrap([values], [np.zeros(len(values))], seed=seed)._asdict()


def _groups(contests: Sequence[Contest], found: Mapping[str, np.ndarray]) -> dict[str, dict]:
    labels = {name: [facets(contest)[name] for contest in contests] for name in FACETS}
    tables = {name: selection.by_group(found, own) for name, own in labels.items()}
    return {name: table for name, table in tables.items() if table}


def _model_results(scores: Scores, ballot: Ballot, settings: Settings) -> dict[str, Any]:
    field, response_score = ballot.field, ballot.scores[settings.aggregate]
    lengths = {"steps": selection.packed(field, [len(steps) for steps in scores.steps])}
    if scores.num_tokens is not None:
        lengths["tokens"] = selection.packed(field, scores.num_tokens)
    return {
        "gains": {name: gains(ballot.outcomes, name, settings.seed) for name in ballot.scores},
        "ties": {name: selection.tie_figures(field, values) for name, values in ballot.scores.items()},
        "lengths": _length_effects(scores, field, response_score, lengths, settings.ties),
        "score_by_steps": selection.scores_by_length(field, response_score, lengths["steps"]),
        "responses": _told_apart(field.correct[field.present], response_score[field.present], settings.aggregate),
    }


def _length_effects(
    scores: Scores, field: Field, response_score: np.ndarray, lengths: Mapping[str, np.ndarray], ties: selection.Ties
) -> dict[str, dict[str, Any]]:
    """`selection.length_effect` by unit, over the questions whose candidates were all scored."""
    lost = np.zeros(int(field.present.sum()))
    lost[list(scores.unscored)] = 1
    whole = ~selection.packed(field, lost).any(axis=1)
    if not whole.any():
        return {}
    part = Field(*(values[whole] for values in field))
    return {
        unit: selection.length_effect(part, response_score[whole], values[whole], ties)._asdict()
        for unit, values in lengths.items()
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


class Judged(NamedTuple):
    """K chains whose steps people judged (`Example.step_truth`)."""

    chains: Sequence[Example]  # [K]
    keys: Sequence[str]  # [K]: equal for chains about one question, which must not lie on both sides of a split


def judged_chains(chains: Sequence[Example]) -> Judged:
    """Chains of a step benchmark; those with one question text and pictures of the same size are about one question.

    So the split is the same wherever the pictures lie, in files or in a prepared set. Where one is not at hand its name
    stands for its size: the same question text is often asked of many pictures, and the split is then another one.
    """
    return Judged(chains, [_question_key(chain) for chain in chains])


def _question_key(chain: Example) -> str:
    first = next(turn.text for turn in chain.turns if turn.role == HUMAN)
    sizes = [str(image_size(image, chain.place) if _is_at_hand(image) else image) for image in chain.images]
    return "\n".join([first.partition(FIRST_STEP_HEADING)[0].strip(), *sizes])


def has_pictures(chain: Example) -> bool:
    """Whether all pictures of a chain are at hand."""
    return all(map(_is_at_hand, chain.images))


def _is_at_hand(image: ImageSource) -> bool:
    return isinstance(image, bytes) or image.is_file()


def judged_candidates(contests: Sequence[Contest]) -> Judged | None:
    """The candidates, where the truth of all their steps is known, as the embedded benchmark's is."""
    pairs = [(candidate.example, contest.question.id) for contest in contests for candidate in contest.candidates]
    if any(example.step_truth is None for example, _ in pairs):
        return None
    return Judged([example for example, _ in pairs], [key for _, key in pairs])


def judged_steps(judged: Judged, scores: Scores) -> step_benchmark.Steps:
    """The steps of judged chains with their scores.

    Raises:
      InputError: a score that is no probability.
    """
    return step_benchmark.steps_of(
        [chain.step_truth for chain in judged.chains],
        [steps.tolist() for steps in scores.steps],
        [chain.dataset or "no source" for chain in judged.chains],
        judged.keys,
    )


def check_judged(judged: Judged, settings: Settings) -> None:
    """Whether there will be figures; to be asked before hours of scoring, since it does not depend on the scores.

    Raises:
      InputError: no step is right or wrong; or, where the threshold is to be chosen, the held-out part or the rest has
        steps of one kind alone.
    """
    blank = Scores([np.zeros(chain.num_steps) for chain in judged.chains], None)
    choose_threshold(judged_steps(judged, blank), settings)


def choose_threshold(steps: step_benchmark.Steps, settings: Settings) -> tuple[dict[str, Any], step_benchmark.Steps]:
    """The threshold with what it was chosen on (None: it is given), and the steps that figures are of.

    These are all steps where it is given, else those of the chains that were not held out to choose it.

    Raises:
      InputError: as `check_judged` has them.
    """
    if settings.threshold is not None:
        step_benchmark.step_f1(steps, settings.threshold)
        return {"threshold": settings.threshold, "chosen_on": None}, steps
    tuned = step_benchmark.tuned_step_f1(steps, settings.held_out, settings.seed)
    chosen_on = {
        "num_chains": int(tuned.held_out.sum()),
        "share_of_questions": settings.held_out,
        "seed": settings.seed,
        "macro_f1": tuned.held_out_figures["macro_f1"],
    }
    return (
        {"threshold": tuned.threshold, "chosen_on": chosen_on},
        step_benchmark.of_chains(steps, ~tuned.held_out),
    )


def step_results(steps: step_benchmark.Steps, threshold: float) -> dict[str, Any]:
    """How well steps are judged, in numbers, JSON alone.

    `all_right` is what saying "right" to every step would give, on the same chains. Where a source has no chain with an
    error, or none without, the figures of its first errors are null and have no mean over the sources.
    """

    def figures(part: step_benchmark.Steps, threshold: float = threshold) -> dict[str, Any]:
        first = step_benchmark.first_error(part, threshold)
        return {**step_benchmark.step_f1(part, threshold), **{f"first_error_{name}": first[name] for name in first}}

    known = step_benchmark.judged(steps)
    is_right = known.truth == step_benchmark.RIGHT
    calibration = step_benchmark.calibration(is_right, known.scores)
    by_source = step_benchmark.by_source(steps, figures)
    return {
        "num_chains": len(steps.sources),
        "pooled": figures(steps),
        "mean_of_sources": _mean_of(by_source),
        "by_source": by_source,
        "all_right": figures(steps._replace(scores=np.ones(len(steps.scores))), 0.5),
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
