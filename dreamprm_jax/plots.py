"""The plots of the reports: numbers in, a matplotlib figure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dreamprm_jax import page
from dreamprm_jax.errors import printable
from dreamprm_jax.metrics import write_bytes
from dreamprm_jax.selection import Interval
from dreamprm_jax.step_benchmark import calibration, roc

matplotlib.use("Agg")

RIGHT, WRONG = "tab:blue", "tab:orange"
"""Colours that the colour-blind can tell apart, as in the browser of questions."""

NUM_WINDOWS = 40
"""Points of a curve over a run: each is the mean of a stretch of it."""

_LONGEST_LABEL = 60  # characters


class Curve(NamedTuple):
    """A windowed course over a run, W points; NaN where a window has no value."""

    x: np.ndarray  # [W]
    y: np.ndarray  # [W]


class Band(NamedTuple):
    """A figure at each number of candidates, K of them, over resamples."""

    mean: Sequence[float]  # [K]
    std: Sequence[float]  # [K], 0 where there is one sample only


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    """Trailing mean over up to `window` values: [n] -> [n]."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def losses_by_step(rows: Sequence[dict]) -> Figure:
    """Training and meta loss by step; faint: each step, strong: trailing mean over 2% of the run, phase by phase."""
    figure = Figure(figsize=(9, 3.5))
    axes = figure.subplots()
    window = max(1, len(rows) // 50)
    for phase, phase_rows in groupby(rows, key=lambda row: row["phase"]):
        phase_rows = list(phase_rows)
        steps = [row["step"] for row in phase_rows]
        axes.axvline(steps[0], color="grey", linewidth=0.8, linestyle=":")
        axes.annotate(
            phase, (steps[0], 1), xycoords=("data", "axes fraction"), xytext=(3, -12), textcoords="offset points"
        )
        for name, colour in (("inner_loss", "tab:blue"), ("meta_loss", "tab:orange")):
            if name in phase_rows[0]:
                values = [row[name] for row in phase_rows]
                axes.plot(steps, values, colour, alpha=0.25, linewidth=0.7)
                axes.plot(steps, smooth(values, window), colour, label=name)
    axes.set(xlabel="step", ylabel="loss")
    named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # each curve once, not once a phase
    axes.legend(named.values(), named.keys(), loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def weight_histogram(groups: dict[str, list[float]]) -> Figure:
    """How the learned weights are distributed in each group of rows."""
    figure = Figure(figsize=(9, 3.5))
    axes = figure.subplots()
    every = [weight for weights in groups.values() for weight in weights]
    edges = np.linspace(min(every) - 1e-3, max(every) + 1e-3, 41)
    for name, weights in sorted(groups.items()):
        axes.hist(weights, bins=edges, alpha=0.5, label=f"{_label(name)} ({len(weights)})")
    axes.set(xlabel="instance weight", ylabel="rows")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _label(name: str) -> str:
    """A name that a row gave, for a legend: no formula in it, and not so long that the plot has no room."""
    short = name if len(name) <= _LONGEST_LABEL else name[:_LONGEST_LABEL] + "..."
    return printable(short).replace("$", "\\$")


def weight_curves(rows: Sequence[dict], groups: Mapping[int, str]) -> dict[str, Curve]:
    """The mean weight that each group of training rows was given, over the run.

    Args:
      rows: lines of metrics.jsonl; those without instance weights (a cold start's) are passed over.
      groups: the group of each training row, by its example id.
    """
    rows = [row for row in rows if "instance_weights" in row]
    names = sorted(set(groups.values()))
    number = {name: position for position, name in enumerate(names)}
    steps, means = [], []
    for window in _windows(len(rows)):
        drawn = [number[groups[row]] for line in rows[window] for row in line["example_ids"]]
        weights = np.concatenate([line["instance_weights"] for line in rows[window]])
        counts = np.bincount(drawn, minlength=len(names)).astype(float)
        sums = np.bincount(drawn, weights, minlength=len(names))
        means.append(np.divide(sums, counts, out=np.full(len(names), np.nan), where=counts > 0))
        steps.append(np.mean([line["step"] for line in rows[window]]))
    return {
        name: Curve(np.array(steps), np.array(values)) for name, values in zip(names, np.transpose(means), strict=True)
    }


def loss_curve(rows: Sequence[dict], name: str) -> Curve:
    """A loss over the training rows drawn so far, for runs that draw different numbers of them in a step."""
    rows = [row for row in rows if name in row]
    drawn = np.cumsum([len(row["example_ids"]) for row in rows])
    windows = _windows(len(rows))
    values = np.array([row[name] for row in rows])
    return Curve(np.array([drawn[w].mean() for w in windows]), np.array([values[w].mean() for w in windows]))


def _windows(count: int) -> list[slice]:
    edges = np.linspace(0, count, min(NUM_WINDOWS, count) + 1).astype(int)
    return [slice(first, last) for first, last in pairwise(edges)]


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Of several runs, point by point, over those that have a value there."""
    values = np.ma.masked_invalid([curve.y for curve in curves])
    return Curve(curves[0].x, values.mean(axis=0).filled(np.nan))


def curve_panels(panels: dict[str, dict[str, Curve]], xlabel: str, ylabel: str) -> Figure:
    """Named curves, a panel for each group of them; "NAME, corrupted" is a dashed curve in the colour of NAME."""
    figure = Figure(figsize=(9, 3.2 * len(panels)), layout="constrained")
    bases = list(dict.fromkeys(name.partition(",")[0] for curves in panels.values() for name in curves))
    for axes, (title, curves) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        for name, curve in curves.items():
            base, _, kind = name.partition(",")
            style = "--" if kind else "-"
            axes.plot(*curve, style, color=f"C{bases.index(base) % 10}", label=_label(name))
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def score_histograms(groups: dict[str, tuple[Sequence[float], Sequence[float]]]) -> Figure:
    """How the scores of right and of wrong chains are distributed, a panel for each name: {name: (right, wrong)}."""
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(9 if columns > 1 else 6, 2.6 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, (name, (right, wrong)) in zip(panels, groups.items(), strict=False):
        edges = np.linspace(0, 1, 31)
        axes.hist(right, bins=edges, alpha=0.5, color=RIGHT, density=len(right) > 0, label="right")
        axes.hist(wrong, bins=edges, alpha=0.5, color=WRONG, density=len(wrong) > 0, label="wrong")
        axes.set(title=name, xlabel="score", ylabel="density")
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")  # the same in every panel
    return figure


def means_beside(values: dict[str, Interval], references: dict[str, float], ylabel: str) -> Figure:
    """Means with intervals, and references as lines across. Points, as the axis need not begin at 0."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for position, interval in enumerate(values.values()):
        _interval(axes, [position], [interval], fmt="o", color="black")
    axes.set_xticks(range(len(values)), list(values), rotation=20, ha="right")
    for position, (name, level) in enumerate(references.items()):
        axes.axhline(level, color=f"C{position}", linestyle="--", label=f"{name} {level:.3f}")
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def sweep_lines(x: Sequence[float], panels: dict[str, dict[str, Sequence[Interval]]], xlabel: str) -> Figure:
    """Means with intervals against a setting, a panel for each quantity: {ylabel: {name: one interval a setting}}."""
    figure = Figure(figsize=(9, 3.2 * len(panels)), layout="constrained")
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))  # one colour in all panels
    for axes, (ylabel, lines) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        for name, values in lines.items():
            _interval(axes, x, values, marker="o", color=f"C{names.index(name)}", label=name)
        axes.grid(axis="y", alpha=0.3)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _interval(axes: Any, x: Sequence[float], values: Sequence[Interval], **style: Any) -> None:
    below = [value.mean - value.low for value in values]
    above = [value.high - value.mean for value in values]
    # A mean may lie outside the bootstrap's percentiles by rounding.
    axes.errorbar(x, [value.mean for value in values], np.maximum([below, above], 0), capsize=3, **style)


# The plots of an evaluation.


def accuracy_by_candidates(
    num_candidates: Sequence[int], rules: Mapping[str, Band], references: Mapping[str, Sequence[float] | float]
) -> Figure:
    """Accuracy against the number of candidates, on a scale of powers of two.

    Args:
      num_candidates: [K], increasing.
      rules: of selection, each a line with a band of one standard deviation.
      references: dashed lines: one level at each number of candidates, or one for all.
    """
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    for position, (name, band) in enumerate(rules.items()):
        mean, std = np.asarray(band.mean), np.asarray(band.std)
        axes.plot(num_candidates, mean, marker="o", color=f"C{position}", label=name)
        axes.fill_between(num_candidates, mean - std, mean + std, color=f"C{position}", alpha=0.2, linewidth=0)
    markers = "s^vDPX"
    for position, (name, level) in enumerate(references.items()):
        levels = np.broadcast_to(level, len(num_candidates))
        grey = str(0.25 + 0.4 * position / max(1, len(references) - 1))
        axes.plot(num_candidates, levels, "--", marker=markers[position % 6], markersize=4, color=grey, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(num_candidates, [str(number) for number in num_candidates])
    axes.minorticks_off()
    axes.set(title="Accuracy by number of candidates", xlabel="candidates per question (N)", ylabel="accuracy")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), title="band: one standard deviation")
    return figure


Scored = Mapping[str, tuple[Sequence[float], Sequence[bool]]]
"""By name: scores [n] and whether each of the scored is right [n]."""


def calibration_curves(groups: Scored, num_bins: int = 10) -> Figure:
    """The share of right ones against the score, with the diagonal of perfect calibration; below, their numbers."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    above.plot([0, 1], [0, 1], ":", color="grey", label="perfect")
    width = 1 / num_bins / (len(groups) + 0.5)
    for position, (name, (scores, is_right)) in enumerate(groups.items()):
        bins = calibration(np.asarray(is_right, bool), np.asarray(scores), num_bins)
        filled = bins.counts > 0
        label = f"{name} (error {bins.expected_error:.3f})"
        above.plot(bins.mean_score[filled], bins.share_right[filled], marker="o", color=f"C{position}", label=label)
        centres = (np.arange(num_bins) + 0.5) / num_bins + width * (position - (len(groups) - 1) / 2)
        below.bar(centres, bins.counts, width, color=f"C{position}")
    above.set(title="Calibration", ylabel="share that is right", xlim=(0, 1), ylim=(-0.03, 1.03))
    above.grid(alpha=0.3)
    above.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    below.set(xlabel="score", ylabel="count")
    below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    return figure


def roc_curves(groups: Scored) -> Figure:
    """True against false positives at every threshold; a group without both kinds has no curve, and says so."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for position, (name, (scores, is_right)) in enumerate(groups.items()):
        curve = roc(np.asarray(is_right, bool), np.asarray(scores))
        if curve is None:
            axes.plot([], [], color=f"C{position}", label=f"{name} (all of one kind)")
            continue
        label = f"{name} (AUROC {curve.auroc:.3f})"
        axes.plot(curve.false_positive, curve.true_positive, color=f"C{position}", label=label)
    axes.plot([0, 1], [0, 1], ":", color="grey", label="by chance (0.500)")
    axes.set(title="ROC", xlabel="share of the wrong above the threshold", ylabel="share of the right above it")
    axes.set_aspect("equal")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def score_by_steps(num_steps: Sequence[int], scores: Sequence[float], is_right: Sequence[bool]) -> Figure:
    """The score against the number of steps, [n] each: a point a response, and means of right and of wrong ones.

    A mean is over a tenth of the responses or more, so that the few longest ones do not draw a line of noise; its
    interval is 1.96 standard errors to each side.
    """
    steps, found, right = np.asarray(num_steps), np.asarray(scores, float), np.asarray(is_right, bool)
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    shifts = np.random.default_rng(0).uniform(-0.3, 0.3, len(steps))  # points on one another would hide their number
    for name, kind, colour, marker in (("right", right, RIGHT, "o"), ("wrong", ~right, WRONG, "s")):
        axes.plot(steps[kind] + shifts[kind], found[kind], ".", color=colour, alpha=0.25, markersize=3)
        groups = [(kind & group) for group in _length_groups(steps) if (kind & group).any()]
        means = [(steps[group].mean(), found[group].mean()) for group in groups]
        errors = [1.96 * found[group].std() / np.sqrt(group.sum()) for group in groups]
        axes.errorbar(
            *np.reshape(means, (-1, 2)).T, errors, marker=marker, color=colour, capsize=3, markeredgecolor="white",
            label=f"{name}, mean ({kind.sum()})",
        )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(steps.min() - 0.7, steps.max() + 0.7)  # also where all are of one length
    axes.set(title="Score by number of steps", xlabel="steps", ylabel="score")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _length_groups(steps: np.ndarray) -> list[np.ndarray]:
    edges = np.unique(np.quantile(steps, np.linspace(0, 0.9, 10), method="lower"))
    groups = np.searchsorted(edges, steps, side="right")
    return [groups == group for group in np.unique(groups)]


def write_plots(directory: Path, plots: Sequence[page.Plot]) -> None:
    """Each plot as NAME.png in `directory`, which is made; each file is written whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    for plot in plots:
        write_bytes(directory / f"{plot.name}.png", plot.png)
