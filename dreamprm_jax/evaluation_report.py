"""results.md, report.html and plots/ of an evaluation: tables, curves, and every question with its candidates."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dreamprm_jax import browser, evaluation, page, plots, selection, step_benchmark
from dreamprm_jax.data.candidates import Candidate, Contest
from dreamprm_jax.data.conversation import IMAGE_MARKER
from dreamprm_jax.data.example import HUMAN, Example, ImageSource, Question
from dreamprm_jax.data.formats.prompts import FIRST_STEP_HEADING
from dreamprm_jax.data.images import open_image
from dreamprm_jax.evaluation import Ballot, Scores, Settings
from dreamprm_jax.losses import PROBABILITIES
from dreamprm_jax.metrics import write_text

TITLES = {"pass_at_1": "a random candidate (pass@1)", "majority": "majority vote", "oracle": "oracle (any right)"}

PAPERS_TABLE = (
    ("DreamPRM-1.5, instance table", 84.6),
    ("DreamPRM-1.5, instance net", 83.6),
    ("self-consistency (majority vote)", 81.4),
    ("VisualPRM, all of its data, no weights", 80.5),
    ("GPT-5-mini, a random candidate", 80.0),
    ("no selection: the same data, no weights", 79.1),
)
"""Table 1 of arXiv 2509.05542: MMMU's validation split, eight candidates of GPT-5-mini a question, in percent."""

STEP_FIGURES = {
    "f1_plus": "F1 right",
    "f1_minus": "F1 wrong",
    "macro_f1": "macro-F1",
    "accuracy": "accuracy",
    "first_error_error_accuracy": "first error found",
    "first_error_correct_accuracy": "right chains passed",
    "first_error_f1": "their harmonic mean",
}
STEP_COUNTS = {
    "num_right": "right steps",
    "num_wrong": "wrong steps",
    "num_neutral": "neutral steps",
    "first_error_num_with_error": "chains with an error",
    "first_error_num_without": "chains without",
}
"""Figures of steps, and the heads of their columns."""

_NONE = "–"  # noqa: RUF001


class Evaluated(NamedTuple):
    """Everything that a report is made of; None: not asked for."""

    settings: Settings
    contests: Sequence[Contest]
    scores: Scores | None  # of the contests' candidates
    ballot: Ballot | None
    steps: step_benchmark.Steps | None  # judged ones, those that the figures are of
    results: dict[str, Any]  # results.json


def write_reports(
    workdir: Path, found: Evaluated, config: str, *, questions_shown: int, image_side: int, origin: str = ""
) -> None:
    """Writes results.md, report.html and plots/ into `workdir`.

    Args:
      workdir: of the evaluation.
      found: what it found.
      config: shown as it stands.
      questions_shown: in the page, the first ones.
      image_side: pixels, of their pictures; 0: none.
      origin: what was evaluated, and by which model.
    """
    tables, shown = tables_of(found.results, found.settings), plots_of(found)
    text, note = f"{origin} {intro(found.results, found.settings)}".strip(), notes(found.results)
    parts = ["# Evaluation", text, *map(page.markdown, tables), f"## {page.NOTES_TITLE}", note]
    write_text(workdir / "results.md", "\n\n".join(parts) + "\n")
    plots.write_plots(workdir / "plots", shown)
    sections = []
    if found.contests and questions_shown:
        first = questions_of(found, questions_shown, image_side)
        more = len(found.contests) - len(first)
        limit = f"The first {len(first):,} of {len(found.contests):,} questions." if more else ""
        sections.append(browser.section(first, note=limit))
    write_text(
        workdir / "report.html",
        page.render("Evaluation", tables, shown, config, sections=sections, intro=text, notes=note),
    )


def intro(results: Mapping[str, Any], settings: Settings) -> str:
    """What was evaluated, and how the model's scores were read."""
    parts = []
    if "selection" in results:
        parts += _selection_text(results["selection"])
    if "steps" in results or "gains" in results["selection"]:
        which = {"full": "over the full vocabulary", "two_token": 'over "+" and "-"'}[settings.step_score]
        parts.append(f'A step\'s score is P("+") {which}.')
    if "gains" in results.get("selection", {}):
        parts.append(
            f"PRM chooses the response with the highest {settings.aggregate} of its steps' scores, of equals the "
            f"{settings.ties}."
        )
    if "steps" in results:
        parts += _steps_text(results["steps"])
    return " ".join(parts)


def _selection_text(found: Mapping[str, Any]) -> list[str]:
    fewest, most = found["fewest_candidates"], found["num_candidates"]
    each = f"{most}" if fewest == most else f"{fewest} to {most}"
    questions, responses = _count(found["num_questions"], "question"), _count(found["num_responses"], "response")
    parts = [f"{questions} with {each} candidates each, {responses} in all."]
    if found["num_without_answer"]:
        parts.append(f"{_count(found['num_without_answer'], 'response')} without a recognised answer.")
    if found["num_unscored"]:
        parts.append(
            f"{_count(found['num_unscored'], 'response')} could not be scored: the steps count as scored 0, and the "
            "questions are left out where scores are compared with lengths."
        )
    if found["num_disagreements"]:
        number = _count(found["num_disagreements"], "response")
        parts.append(f"The record and MMMU's rules disagree on {number}, listed in disagreements.jsonl.")
    return parts


def _steps_text(found: Mapping[str, Any]) -> list[str]:
    chosen, counted = found["chosen_on"], _count(found["num_chains"], "chain")
    threshold = f"{found['threshold']:.8g}"  # 0.99999 is not 1
    if chosen is None:
        parts = [f"Steps of {counted}: those scored above {threshold}, the threshold given, are taken to be right."]
    else:
        parts = [
            f"Steps of {counted}: those scored above {threshold} are taken to be right, the threshold of highest "
            f"macro-F1 on {chosen['num_chains']:,} others, which were held out "
            f"({chosen['share_of_questions']:.0%} of the questions, by hash, seed {chosen['seed']})."
        ]
        if chosen["num_without_pictures"]:
            number = _count(chosen["num_without_pictures"], "chain")
            parts.append(f"The pictures of {number} were not at hand: with them other questions would be held out.")
    if found["num_unscored"]:
        parts.append(f"{_count(found['num_unscored'], 'chain')} could not be scored: the steps count as scored 0.")
    return parts


def notes(results: Mapping[str, Any]) -> str:
    """What the figures in the tables are."""
    parts = []
    if "selection" in results:
        parts.append(
            "Accuracies are in percent, in brackets 95% percentile intervals of a bootstrap over questions (10,000 "
            "resamples). Tied answers share a vote's credit; a response without a recognised answer casts none. All "
            "rows have the same sub-samples, without replacement; of fewer than N candidates all are in them."
        )
    if "gains" in results.get("selection", {}):
        parts.append(
            "Gains are in points, on the same questions, with the p-value of a two-sided sign-flip test (McNemar's "
            "exact one where no answer is tied). In a weighted vote scores are votes, of sum_logprob and sum_logit "
            "their exponentials. Ties: questions whose highest score is shared, in brackets those where right "
            "and wrong responses share it, so that the tie rule decides."
        )
    if "steps" in results:
        parts.append(
            "Neutral steps do not count. F1 is 0 where no step of its kind is found. First error found: of the chains "
            "with an error, the share whose first wrong step is the first that is called wrong; right chains passed: "
            "of the others, the share where none is."
        )
    if "steps" in results or "responses" in results.get("selection", {}):
        parts.append("Calibration errors are over ten bins of equal width.")
    return " ".join(parts)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


# --- Tables.


def tables_of(results: Mapping[str, Any], settings: Settings) -> list[page.Table]:
    """All tables: what was asked first, then what it is made of, and figures of others last."""
    tables, found = [], results.get("selection")
    if found is not None:
        tables.append(_best_of_n(found, settings))
        if "gains" in found:
            tables.append(_aggregations(found))
    if "steps" in results:
        tables.append(_steps(results["steps"]))
    told = {"responses": (found or {}).get("responses"), "steps": results.get("steps")}
    if any(told.values()):
        tables.append(_probabilities({name: figures for name, figures in told.items() if figures}))
    if found is not None:
        tables += [_by_number(found, settings), *_groups(found, settings), _runs(found)]
        if found.get("lengths"):
            tables.append(_lengths(found))
        tables.append(_papers_table())
    return tables


def _titles(settings: Settings) -> dict[str, str]:
    """Rules and their titles, the model's last but for the oracle's."""
    own = {rule: f"{title} ({settings.aggregate})" for title, rule in evaluation.model_rules(settings).items()}
    return {"pass_at_1": TITLES["pass_at_1"], "majority": TITLES["majority"], **own, "oracle": TITLES["oracle"]}


def percent(value: float | None) -> str:
    """A share in percent, to two places."""
    return _NONE if value is None else f"{100 * value:.2f}"


def fraction(value: float | None) -> str:
    """A figure to four places."""
    return _NONE if value is None else f"{value:.4f}"


def interval(figures: Mapping[str, float]) -> str:
    """A mean with its interval, in percent."""
    return f"{percent(figures['mean'])} [{percent(figures['low'])}, {percent(figures['high'])}]"


def gain(figures: Mapping[str, float]) -> str:
    """A gain in points with interval and p-value."""
    low, high = 100 * figures["low"], 100 * figures["high"]
    p_value = "p < .001" if figures["p_value"] < 0.001 else f"p = {figures['p_value']:.3f}"
    return f"{100 * figures['mean']:+.2f} [{low:+.2f}, {high:+.2f}], {p_value}"


def _best_of_n(found: Mapping[str, Any], settings: Settings) -> page.Table:
    rows = [
        (title, interval(found["accuracy"][rule]))
        for rule, title in _titles(settings).items()
        if rule in found["accuracy"]
    ]
    return page.Table(f"Best of {found['num_candidates']}", ("choice", "accuracy, % [95% interval]"), rows)


def _aggregations(found: Mapping[str, Any]) -> page.Table:
    rows = [
        (
            name,
            interval(found["accuracy"][f"prm/{name}"]),
            gain(gains["pass_at_1"]),
            gain(gains["majority"]),
            percent(found["accuracy"][f"weighted_vote/{name}"]["mean"]),
            f"{ties['num_shared']} ({ties['num_deciding']})",
            f"{percent(ties['first'])} / {percent(ties['last'])}",
        )
        for name, gains, ties in ((name, found["gains"][name], found["ties"][name]) for name in sorted(found["gains"]))
    ]
    head = (
        "aggregation",
        "accuracy, %",
        "over pass@1",
        "over the majority vote",
        "weighted vote, %",
        "ties (deciding)",
        "first / last of equals, %",
    )
    return page.Table("PRM by aggregation of its step scores", head, rows)


def _by_number(found: Mapping[str, Any], settings: Settings) -> page.Table:
    curves, titles = found["curves"], _titles(settings)
    titles |= {f"prm/{name}": f"PRM ({name})" for name in sorted(found.get("gains", ()))}

    def cells(rule: str) -> list[str]:
        *samples, whole = zip(
            curves["mean"][rule], curves["std"][rule], strict=True
        )  # all candidates: there is but one
        return [*(f"{percent(mean)} ± {percent(std)}" for mean, std in samples), percent(whole[0])]

    rows = [(title, *cells(rule)) for rule, title in titles.items() if rule in curves["mean"]]
    title = f"Accuracy by the number of candidates, {settings.num_samples} sub-samples, ± standard deviation over them"
    return page.Table(title, ("choice", *(f"N = {size}" for size in curves["sizes"])), rows)


def _runs(found: Mapping[str, Any]) -> page.Table:
    columns = {"candidate": range(1, len(found["runs"]) + 1), "accuracy, %": map(percent, found["runs"])}
    if found["run_files"]:
        columns["file"] = found["run_files"]
    rows = list(zip(*columns.values(), strict=True))
    return page.Table("Accuracy of each question's candidates by their place (runs)", tuple(columns), rows)


def _groups(found: Mapping[str, Any], settings: Settings) -> list[page.Table]:
    titles = _titles(settings)
    tables = []
    for facet, groups in found["groups"].items():
        rules = [rule for rule in titles if rule in next(iter(groups.values()))]
        rows = [
            (label, figures["num_questions"], *(percent(figures[rule]) for rule in rules))
            for label, figures in groups.items()
        ]
        tables.append(page.Table(f"By {facet}", (facet, "questions", *(titles[rule] for rule in rules)), rows))
    return tables


def _lengths(found: Mapping[str, Any]) -> page.Table:
    rows = [
        (
            unit,
            fraction(effect["correlation"]),
            fraction(effect["within_questions"]),
            f"{effect['mean_length']:.2f}",
            f"{effect['mean_chosen']:.2f}",
        )
        for unit, effect in found["lengths"].items()
    ]
    head = ("length in", "rank correlation with the score", "within questions", "mean", "mean of the chosen")
    return page.Table("Does the score follow the length?", head, rows)


def _papers_table() -> page.Table:
    rows = [(name, f"{value:.1f}") for name, value in PAPERS_TABLE]
    title = (
        "For reference: the paper's own figures (MMMU validation, eight candidates of GPT-5-mini), not measured here"
    )
    return page.Table(title, ("as the paper reports (arXiv 2509.05542, Table 1)", "accuracy, %"), rows)


def _steps(found: Mapping[str, Any]) -> page.Table:
    lines = [
        ("all sources", found["pooled"]),
        *found["by_source"].items(),
        ("mean of the sources", found["mean_of_sources"]),
        ("saying right to every step", found["all_right"]),
    ]
    rows = [
        (
            name,
            *(fraction(values.get(figure)) for figure in STEP_FIGURES),
            *(values.get(count, _NONE) for count in STEP_COUNTS),
        )
        for name, values in lines
    ]
    head = ("source", *STEP_FIGURES.values(), *STEP_COUNTS.values())
    return page.Table("Steps", head, rows)


def _probabilities(told: Mapping[str, Mapping[str, Any]]) -> page.Table:
    names = ("auroc", "calibration_error", "brier")
    rows = [(what, *(fraction(figures.get(name)) for name in names)) for what, figures in told.items()]
    head = ("scores of", "AUROC", "expected calibration error", "Brier score")
    return page.Table("Do the scores tell right from wrong?", head, rows)


# --- Plots.


def plots_of(found: Evaluated) -> list[page.Plot]:
    """The plots that there are figures for."""
    shown = []
    if found.ballot is not None:
        shown.append(_curves(found.results["selection"]["curves"], found.settings))
    told: plots.Scored = {}
    if found.scores is not None and found.ballot is not None:
        field, scores = found.ballot.field, found.ballot.scores[found.settings.aggregate]
        right, values = field.correct[field.present], scores[field.present]
        if found.settings.aggregate in PROBABILITIES:
            told["responses"] = (values, right)
            figure = plots.score_histograms({"responses": (values[right], values[~right])})
            shown.append(_plot("scores", "Response scores of right and of wrong responses.", figure))
        num_steps = [len(steps) for steps in found.scores.steps]
        caption = "Response score against the number of steps, of right and of wrong responses."
        shown.append(_plot("score_by_steps", caption, plots.score_by_steps(num_steps, values, right)))
    if found.steps is not None:
        known = step_benchmark.judged(found.steps)
        right = known.truth == step_benchmark.RIGHT
        told["steps"] = (known.scores, right)
        figure = plots.score_histograms({"steps": (known.scores[right], known.scores[~right])})
        shown.append(_plot("step_scores", "Scores of right and of wrong steps.", figure))
    if told:
        caption = "Calibration: the share that is right among what has about the same score, and how many those are."
        shown.append(_plot("calibration", caption, plots.calibration_curves(told)))
        caption = "ROC: how many of the right ones are above a threshold, by how many of the wrong ones are."
        shown.append(_plot("roc", caption, plots.roc_curves(told)))
    return shown


def _curves(curves: Mapping[str, Any], settings: Settings) -> page.Plot:
    titles = _titles(settings)
    rules = {
        titles[rule]: plots.Band(curves["mean"][rule], curves["std"][rule])
        for rule in evaluation.model_rules(settings).values()
        if rule in curves["mean"]
    }
    references = {titles[rule]: curves["mean"][rule] for rule in ("oracle", "majority", "pass_at_1")}
    figure = plots.accuracy_by_candidates(curves["sizes"], rules, references)
    return _plot("accuracy", "Accuracy by the number of candidates, over random sub-samples of them.", figure)


def _plot(name: str, caption: str, figure: Any) -> page.Plot:
    return page.Plot(name, caption, page.png_of(figure))


# --- The browser.


def questions_of(found: Evaluated, count: int, image_side: int) -> list[browser.Question]:
    """The first `count` questions as the page shows them, pictures of at most `image_side` pixels (0: none)."""
    picked, step_scores = None, None
    if found.scores is not None:
        response_score = found.ballot.scores[found.settings.aggregate]
        picked = selection.chosen(found.ballot.field, response_score, found.settings.ties)
        step_scores = iter(found.scores.steps)
    shown = []
    for number, contest in enumerate(found.contests[:count]):
        marks = _chosen_by(found, number, None if picked is None else int(picked[number]))
        candidates = []
        for place, (candidate, rules) in enumerate(zip(contest.candidates, marks, strict=True)):
            own = [None] * candidate.example.num_steps if step_scores is None else next(step_scores)
            score = None if picked is None else float(response_score[number, place])
            candidates.append(_candidate(candidate, contest.question, own, score, rules))
        shown.append(_question(found, number, candidates, image_side))
    return shown


def _chosen_by(found: Evaluated, number: int, picked: int | None) -> list[list[str]]:
    """For each candidate of a question, the rules that choose it; the majority chooses all that give its answer."""
    answers = found.ballot.field.answers[number][: len(found.contests[number].candidates)]
    leading = _leading(answers)
    return [
        [browser.PRM] * (place == picked) + [browser.MAJORITY] * (int(answer) in leading)
        for place, answer in enumerate(answers)
    ]


def _question(
    found: Evaluated, number: int, candidates: Sequence[browser.Candidate], image_side: int
) -> browser.Question:
    contest, outcomes = found.contests[number], found.ballot.outcomes
    question = contest.question
    return browser.Question(
        id=question.id,
        text=question.text,
        candidates=candidates,
        majority_correct=float(outcomes["majority"][number]),
        oracle=bool(outcomes["oracle"][number]),
        prm_correct=None if found.scores is None else float(outcomes[f"prm/{found.settings.aggregate}"][number]),
        options=question.options,
        answer=question.answer or None,
        images=_pictures(question.images, question.place, image_side),
        facets=evaluation.facets(contest),
    )


def _candidate(
    candidate: Candidate,
    question: Question,
    scores: Sequence[float | None],
    response_score: float | None,
    rules: list[str],
) -> browser.Candidate:
    truth = candidate.example.step_truth or [None] * candidate.example.num_steps
    texts = step_texts(candidate.example, question)
    steps = [browser.Step(*each) for each in zip(texts, scores, truth, strict=True)]
    return browser.Candidate(candidate.answer, candidate.correct, steps, response_score, rules)


def _leading(answers: np.ndarray) -> set[int]:
    """The answers with most votes."""
    values, counts = np.unique(answers[answers >= 0], return_counts=True)
    return {int(value) for value in values[counts == counts.max(initial=0)]}


def step_texts(example: Example, question: Question) -> list[str]:
    """The steps of a chain, S of them; where the first one stands behind the question, the question is left out."""
    texts = [turn.text.replace(IMAGE_MARKER, "") for turn in example.turns if turn.role == HUMAN]
    if len(texts) > example.num_steps:  # the question has a turn of its own
        return texts[-example.num_steps :]
    _, heading, first = texts[0].partition(FIRST_STEP_HEADING)
    return [first if heading else texts[0].removeprefix(question.text).lstrip(), *texts[1:]]


def _pictures(images: Sequence[ImageSource], place: str, side: int) -> list[bytes]:
    if not side:
        return []
    return [_picture(source, place, side) for source in images if isinstance(source, bytes) or source.is_file()]


def _picture(source: ImageSource, place: str, side: int) -> bytes:
    """A picture for the page: small, and a JPEG where it is large."""
    image = open_image(source, place)
    small = max(image.size) <= side
    if not small:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if small and max(image.size) < 100:
        image.save(file, "PNG")
    else:
        image.save(file, "JPEG", quality=80)
    return file.getvalue()
