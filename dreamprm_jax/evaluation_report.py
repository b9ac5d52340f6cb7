"""results.md, report.html and plots/ of an evaluation: tables, curves, and every question with its candidates."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dreamprm_jax import browser, evaluation, page, plots, selection, step_benchmark
from dreamprm_jax.comparison_report import markdown
from dreamprm_jax.data.candidates import Candidate, Contest
from dreamprm_jax.data.conversation import IMAGE_MARKER
from dreamprm_jax.data.example import HUMAN, Example, ImageSource
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

_NONE = "–"  # noqa: RUF001
_THRESHOLD_NOTE = "steps above it count as right"


class Evaluated(NamedTuple):
    """Everything that a report is made of; None: not asked for."""

    settings: Settings
    contests: Sequence[Contest]
    scores: Scores | None  # of the contests' candidates
    ballot: Ballot | None
    steps: step_benchmark.Steps | None  # of the chains whose steps were judged
    results: dict[str, Any]  # results.json


def write_reports(workdir: Path, found: Evaluated, config: str, *, questions_shown: int, image_side: int) -> None:
    """Writes results.md, report.html and plots/ into `workdir`.

    Args:
      workdir: of the evaluation.
      found: what it found.
      config: shown as it stands.
      questions_shown: in the page, the first ones.
      image_side: pixels, of their pictures; 0: none.
    """
    tables, shown = tables_of(found.results, found.settings), plots_of(found)
    text = intro(found.results, found.settings)
    write_text(workdir / "results.md", "\n\n".join(["# Evaluation", text, *map(markdown, tables)]) + "\n")
    plots.write_plots(workdir / "plots", shown)
    sections = []
    if found.contests and questions_shown:
        first = questions_of(found, questions_shown, image_side)
        more = len(found.contests) - len(first)
        note = f"The first {len(first)} of {len(found.contests)} questions." if more else ""
        sections.append(browser.section(first, note=note))
    write_text(workdir / "report.html", page.render("Evaluation", tables, shown, config, sections=sections, intro=text))


def intro(results: Mapping[str, Any], settings: Settings) -> str:
    """How the tables are to be read."""
    parts = []
    if "selection" in results:
        found = results["selection"]
        parts.append(
            f"{found['num_questions']} questions, {found['num_responses']} candidate responses, up to "
            f"{found['num_candidates']} a question. Accuracies are in percent, in brackets 95% intervals of a "
            "bootstrap over questions; gains are in points, on the same questions, with the p-value of a two-sided "
            "sign-flip test (McNemar's exact one where no answer is tied). Tied answers share a vote's credit; a "
            "response without a recognised answer casts none."
        )
        if "gains" in found:
            which = {"full": "over the full vocabulary", "two_token": 'over "+" and "-"'}[settings.step_score]
            parts.append(
                f'A step\'s score is P("+") {which}; PRM chooses the response with the highest {settings.aggregate} of '
                f"them, of equals the {settings.ties}."
            )
        if found["num_unscored"]:
            parts.append(f"{found['num_unscored']} responses could not be scored and count as scored 0.")
    if "steps" in results:
        parts.append(_threshold_text(results["steps"]))
    return " ".join(parts)


def _threshold_text(steps: Mapping[str, Any]) -> str:
    chosen = steps["chosen_on"]
    if chosen is None:
        return f"Steps: threshold {steps['threshold']:.4g}, given; {_THRESHOLD_NOTE}, neutral ones do not count."
    return (
        f"Steps: threshold {steps['threshold']:.4g}, of highest macro-F1 on {chosen['num_chains']} chains that were "
        f"held out ({chosen['share_of_questions']:.0%} of the questions, by hash, seed {chosen['seed']}); "
        f"{_THRESHOLD_NOTE}. All figures are of the other {steps['num_chains']} chains; neutral steps do not count."
    )


# --- Tables.


def tables_of(results: Mapping[str, Any], settings: Settings) -> list[page.Table]:
    """All tables, those of best-of-N first."""
    tables = []
    if "selection" in results:
        found = results["selection"]
        tables.append(_best_of_n(found, settings))
        if "gains" in found:
            tables.append(_aggregations(found))
        tables += [_by_number(found, settings), _runs(found), *_groups(found, settings)]
        if "gains" in found:
            tables.append(_lengths(found))
        tables.append(_papers_table())
    if "steps" in results:
        tables += _steps(results["steps"])
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
    return page.Table(f"Best of {found['num_candidates']}", ("choice", "accuracy, %"), rows)


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
        pairs = zip(curves["mean"][rule], curves["std"][rule], strict=True)
        return [f"{percent(mean)} ± {percent(std)}" for mean, std in pairs]

    rows = [(title, *cells(rule)) for rule, title in titles.items() if rule in curves["mean"]]
    title = f"Accuracy by the number of candidates, {settings.num_samples} sub-samples, ± standard deviation over them"
    return page.Table(title, ("choice", *(f"N = {size}" for size in curves["sizes"])), rows)


def _runs(found: Mapping[str, Any]) -> page.Table:
    rows = [(number, percent(value)) for number, value in enumerate(found["runs"], start=1)]
    return page.Table(
        "Accuracy of each question's candidates by their place (runs)", ("candidate", "accuracy, %"), rows
    )


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


def _steps(found: Mapping[str, Any]) -> list[page.Table]:
    figures = ("f1_plus", "f1_minus", "macro_f1", "accuracy", "first_error_error_accuracy",
               "first_error_correct_accuracy", "first_error_f1")  # fmt: skip
    counts = ("num_right", "num_wrong", "num_neutral")
    lines = {"all sources": found["pooled"], **found["by_source"], "mean of the sources": found["mean_of_sources"]}
    lines["saying right to every step"] = found["all_right"]
    rows = [
        (
            name,
            *(fraction(values.get(figure)) for figure in figures),
            *(values.get(count, _NONE) for count in counts),
        )
        for name, values in lines.items()
    ]
    head = ("source", "F1 right", "F1 wrong", "macro-F1", "accuracy", "first error found", "right chains passed",
            "their harmonic mean", "right", "wrong", "neutral")  # fmt: skip
    overall = [
        ("AUROC", fraction(found["auroc"])),
        ("expected calibration error", fraction(found["calibration_error"])),
        ("Brier score", fraction(found["brier"])),
    ]
    return [page.Table("Steps", head, rows), page.Table("Step scores as probabilities", ("figure", "value"), overall)]


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
    scores = iter(found.scores.steps) if found.scores is not None else None
    return [
        _question(found, number, contest, scores, image_side) for number, contest in enumerate(found.contests[:count])
    ]


def _question(found: Evaluated, number: int, contest: Contest, scores: Any, image_side: int) -> browser.Question:
    field, outcomes, aggregate = found.ballot.field, found.ballot.outcomes, found.settings.aggregate
    responses = found.ballot.scores[aggregate][number] if scores is not None else [None] * len(contest.candidates)
    chosen = None
    if scores is not None:
        only = selection.Field(*(values[number : number + 1] for values in field))
        one = found.ballot.scores[aggregate][number : number + 1]
        chosen = int(selection.chosen(only, one, found.settings.ties)[0])
    leading = _leading(field.answers[number])
    candidates = []
    for place, candidate in enumerate(contest.candidates):
        rules = [browser.PRM] * (place == chosen) + [browser.MAJORITY] * (int(field.answers[number, place]) in leading)
        own = next(scores) if scores is not None else [None] * candidate.example.num_steps
        candidates.append(_candidate(candidate, own, responses[place], rules))
    question = contest.question
    return browser.Question(
        id=question.id,
        text=question.text,
        candidates=candidates,
        majority_correct=float(outcomes["majority"][number]),
        oracle=bool(outcomes["oracle"][number]),
        prm_correct=None if scores is None else float(outcomes[f"prm/{aggregate}"][number]),
        options=question.options,
        answer=question.answer or None,
        images=_pictures(question.images, question.place, image_side),
        facets=evaluation.facets(contest),
    )


def _candidate(
    candidate: Candidate, scores: Sequence[float | None], response: float | None, rules: list[str]
) -> browser.Candidate:
    truth = candidate.example.step_truth or [None] * candidate.example.num_steps
    texts = step_texts(candidate.example)
    steps = [browser.Step(*each) for each in zip(texts, scores, truth, strict=True)]
    return browser.Candidate(candidate.answer, candidate.correct, steps, response, rules)


def _leading(answers: np.ndarray) -> set[int]:
    """The answers with most votes."""
    values, counts = np.unique(answers[answers >= 0], return_counts=True)
    return {int(value) for value in values[counts == counts.max(initial=0)]}


def step_texts(example: Example) -> list[str]:
    """The steps of a chain, S of them; a question in the first one's turn is left out."""
    texts = [turn.text.replace(IMAGE_MARKER, "") for turn in example.turns if turn.role == HUMAN]
    texts = texts[len(texts) - example.num_steps :]
    return [texts[0].rpartition("### Solution Process:\n")[2], *texts[1:]]


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
