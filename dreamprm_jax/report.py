"""report.html: one self-contained page with a run's curves, weights, scores and extreme rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dreamprm_jax import page, plots
from dreamprm_jax.data.conversation import IMAGE_MARKER
from dreamprm_jax.data.example import HUMAN, Example
from dreamprm_jax.metrics import read_metrics, write_text

NUM_EXTREMES = 10
"""Rows of highest weight, and of lowest, that the report pictures."""

_MOST_GROUPS = 12
"""Sources that a plot has room for in its legend, those of most rows; the table has all."""


class Pictured(NamedTuple):
    """A training row for the gallery."""

    example: Example
    weight: float
    step_scores: Sequence[float]  # P("+") under the trained model, all earlier labels "+"


def group_name(source: str | None, corrupted: bool | None) -> str:
    """What a row counts under in tables and plots of weights."""
    return f"{source or 'all rows'}{', corrupted' if corrupted else ''}"


def weight_groups(weights: Sequence[dict[str, Any]], domains: Sequence[str | None]) -> dict[str, list[float]]:
    """The weights by source, told apart by corruption where that is known; rows that were never drawn are left out."""
    groups = defaultdict(list)
    for row, domain in zip(weights, domains, strict=True):
        if row["visits"] and row["weight"] is not None:
            groups[group_name(domain, row.get("corrupted"))].append(row["weight"])
    return dict(groups)


def extremes(weights: Sequence[dict[str, Any]], count: int = NUM_EXTREMES) -> tuple[list[int], list[int]]:
    """The rows of highest and of lowest weight among those drawn, from the very highest and the very lowest on.

    At most half of the rows each, so that none is in both; none at all where the weights are equal.
    """
    drawn = [row for row in weights if row["visits"] and row["weight"] is not None]
    if len({row["weight"] for row in drawn}) < 2:
        return [], []
    ordered = [row["example_id"] for row in sorted(drawn, key=lambda row: row["weight"])]
    count = min(count, len(ordered) // 2)
    return ordered[::-1][:count], ordered[:count]


def galleries(highest: Sequence[Pictured], lowest: Sequence[Pictured]) -> list[page.Gallery]:
    """Both ends of the weights, row by row."""
    note = (
        'Each step with the label that it was trained on, coloured by the trained model\'s P("+") after it (in '
        "brackets): green where the model believes it, red where it does not."
    )
    named = {"Rows of highest weight": highest, "Rows of lowest weight": lowest}
    return [page.Gallery(title, note, list(map(_card, rows))) for title, rows in named.items() if rows]


def _card(row: Pictured) -> page.Card:
    example = row.example
    steps = [turn.text.replace(IMAGE_MARKER, "") for turn in example.turns if turn.role == HUMAN]
    labels = [turn.text for turn in example.turns if turn.role != HUMAN]
    truth = {True: ", corrupted", False: ", not corrupted", None: ""}[example.corrupted]
    title = f"row {example.row}, {example.dataset or 'no source'}{truth}: weight {row.weight:.3f}"
    scored = [page.Step(*step) for step in zip(steps, labels, map(float, row.step_scores), strict=True)]
    return page.Card(title, example.images[0], scored)


def write_report(
    workdir: Path,
    summary: dict[str, Any],
    weights: Sequence[dict[str, Any]],
    domains: Sequence[str | None],
    config: str,
    *,
    scored: Sequence[dict[str, Any]] = (),
    pictured: tuple[Sequence[Pictured], Sequence[Pictured]] = ((), ()),
) -> None:
    """Writes `workdir/report.html`.

    Args:
      workdir: of a finished run, with its metrics.
      summary: nested numbers, as in summary.json.
      weights: the lines of instance_weights.jsonl; may be empty.
      domains: each line's source.
      config: shown as it stands.
      scored: the lines of test_scores.jsonl, where there is a test.
      pictured: the rows of highest and of lowest weight, where they are to be shown.
    """
    rows = read_metrics(workdir)
    plain = [(name, value) for name, value in summary.items() if not isinstance(value, dict)]
    tables = [page.Table("Summary", ("figure", "value"), plain)]
    for name, value in summary.items():
        if isinstance(value, dict):
            tables.append(page.Table(name.replace("_", " "), ("figure", "value"), list(value.items())))
    shown = [_plot("losses", "Losses by step (faint: each step; strong: trailing mean).", plots.losses_by_step(rows))]
    groups = weight_groups(weights, domains) if weights else {}
    drawn = dict(sorted(groups.items(), key=lambda group: -len(group[1]))[:_MOST_GROUPS])
    which = f", of the {_MOST_GROUPS} sources with most rows" if len(groups) > len(drawn) else ""
    if groups:
        lines = [(name, len(v), float(np.mean(v)), float(np.std(v))) for name, v in sorted(groups.items())]
        tables.append(page.Table("Learned weights", ("rows", "number", "mean", "standard deviation"), lines))
        shown.append(_plot("weights", f"Learned instance weights{which}.", plots.weight_histogram(drawn)))
    if any("instance_weights" in row for row in rows):
        named = zip(weights, domains, strict=True)
        names = {row["example_id"]: group_name(domain, row.get("corrupted")) for row, domain in named}
        curves = plots.weight_curves(rows, names)
        panels = {"mean weight of the rows drawn": {name: curve for name, curve in curves.items() if name in drawn}}
        figure = plots.curve_panels(panels, "step", "weight")
        shown.append(_plot("weights_by_source", f"Instance weights by source over the training{which}.", figure))
    if scored:
        figure = plots.score_histograms({"test chains": right_and_wrong(scored)})
        shown.append(_plot("scores", "Scores of right and of wrong test chains.", figure))
    title = f"DreamPRM-1.5 in JAX: {summary['weighting']}, recipe {summary['recipe']}"
    write_text(workdir / "report.html", page.render(title, tables, shown, config, galleries=galleries(*pictured)))


def right_and_wrong(scored: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """The scores of the right chains and of the wrong ones."""
    return tuple([line["score"] for line in scored if line["correct"] == correct] for correct in (True, False))


def _plot(name: str, caption: str, figure: Any) -> page.Plot:
    return page.Plot(name, caption, page.png_of(figure))
