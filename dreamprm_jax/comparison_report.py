"""results.md, report.html and plots/ of a comparison: the same tables in both, the same plots in both places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamprm_jax import page, plots
from dreamprm_jax.comparison import COLD_START
from dreamprm_jax.losses import AGGREGATIONS
from dreamprm_jax.metrics import read_json_lines, read_metrics, write_text
from dreamprm_jax.report import group_name, right_and_wrong
from dreamprm_jax.selection import Interval
from dreamprm_jax.sweeps import AXES

TITLES = {
    "cold_start": "cold start",
    "uniform": "uniform (no selection)",
    "domain": "domain table",
    "table": "instance table",
    "net": "instance net",
    "table_identity": "instance table, published formula",
    "net_identity": "instance net, published formula",
    "clean": "clean data (upper reference)",
}
_REFERENCE_TITLES = {"pass_at_1": "a random candidate (pass@1)", "majority": "majority vote", "oracle": "oracle"}
_NONE = "–"  # noqa: RUF001

Workdirs = Mapping[str, Mapping[str, Sequence[Path]]]
"""By setting and method: the workdir of each seed's part."""


def write_reports(workdir: Path, results: dict[str, Any], workdirs: Workdirs, config: str) -> None:
    """Writes results.md, report.html and plots/ into `workdir`.

    Args:
      workdir: of the comparison.
      results: as in results.json.
      workdirs: of the finished parts.
      config: shown as it stands.
    """
    tables, shown = tables_of(results), plots_of(results, workdirs)
    title = f"noisy_steps, seeds {', '.join(map(str, results['seeds']))}"
    title += f", by {AXES[results['sweep']]}" if results["sweep"] in AXES else ""
    text = intro(results)
    write_text(workdir / "results.md", "\n\n".join([f"# {title}", text, *map(page.markdown, tables)]) + "\n")
    plots.write_plots(workdir / "plots", shown)
    write_text(workdir / "report.html", page.render(title, tables, shown, config, intro=text))


def intro(results: dict[str, Any]) -> str:
    """How the tables are to be read."""
    return (
        "Mean and standard error over the seeds, each with a benchmark and a cold start of its own. Best of "
        f"{results['num_candidates']}: share of {results['num_questions']} test questions whose chosen candidate is "
        f"right, in percent; a chain's score is the {results['aggregate'].replace('_', ' ')} of its step scores. Gains "
        "are in points, with 95% intervals of a paired bootstrap over seeds and questions. AUROC: the chance that a "
        "clean training row has a higher weight than a corrupted one (of the loss: a lower loss). Seconds: training "
        "and evaluation on one core."
    )


# Cells.


def percent(stat: dict[str, Any] | None) -> str:
    """A share and its standard error, in percent."""
    return _cell(stat, 100, 1)


def fraction(stat: dict[str, Any] | None) -> str:
    """A figure and its standard error, to three places."""
    return _cell(stat, 1, 3)


def _cell(stat: dict[str, Any] | None, scale: float, places: int) -> str:
    if stat is None:
        return _NONE
    error = stat["standard_error"]
    return f"{scale * stat['mean']:.{places}f}" + ("" if error is None else f" ± {scale * error:.{places}f}")


def points(interval: dict[str, float] | None) -> str:
    """A gain with its interval, in points."""
    if interval is None:
        return _NONE
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * interval[name] for name in ("mean", "low", "high")))


# Tables.


def tables_of(results: dict[str, Any]) -> list[page.Table]:
    """All tables of a comparison; a sweep has the setting's name in their titles."""
    if results["sweep"] not in AXES:
        (comparison,) = results["settings"].values()
        return setting_tables(comparison, results["num_candidates"])
    tables = [sweep_table(results)]
    for name, comparison in results["settings"].items():
        for table in setting_tables(comparison, results["num_candidates"])[:1]:
            tables.append(table._replace(title=f"{AXES[results['sweep']]}: {name}"))
    return tables


def sweep_table(results: dict[str, Any]) -> page.Table:
    """Best-of-N and its gain over uniform, setting by setting."""
    methods = [name for name in next(iter(results["settings"].values()))["methods"] if name != COLD_START]
    head = [AXES[results["sweep"]], "corrupted rows, measured (%)", *(TITLES[name] for name in methods)]
    head += [f"{TITLES[name]}: gain over uniform" for name in methods if name != "uniform" and "uniform" in methods]
    rows = []
    for name, found in results["settings"].items():
        share = max((found["methods"][method]["corrupted_share"] for method in methods), key=lambda stat: stat["mean"])
        row = [name, percent(share), *(percent(found["methods"][method]["prm"]) for method in methods)]
        gains = [found["gains"][method].get("uniform") for method in methods]
        rows.append([*row, *(points(gain) for gain in gains if gain is not None)])
    return page.Table("By setting", head, rows)


def setting_tables(comparison: dict[str, Any], num_candidates: int) -> list[page.Table]:
    """The tables of one setting: headline, aggregations, AUROCs, weights, and exact against published formula."""
    methods, found_gains = comparison["methods"], comparison["gains"]
    head = [
        "method", f"best of {num_candidates}", "over uniform", "over cold start", "over majority vote",
        "weighted vote", "step accuracy", "step AUROC", "weight AUROC", "seconds",
    ]  # fmt: skip
    rows = [
        [_REFERENCE_TITLES[rule], percent(stat), *[_NONE] * (len(head) - 2)]
        for rule, stat in comparison["references"].items()
    ]
    for name, figures in methods.items():
        gains = [points(found_gains[name].get(rival)) for rival in ("uniform", COLD_START, "majority")]
        shares = [percent(figures.get(figure)) for figure in ("weighted_vote", "step_accuracy")]
        others = [fraction(figures.get("step_auroc")), fraction(figures.get("auroc")), _cell(figures["seconds"], 1, 0)]
        rows.append([TITLES[name], percent(figures["prm"]), *gains, *shares, *others])
    tables = [page.Table("Results", head, rows)]
    rows = [
        [TITLES[name], *(percent(figures["aggregations"][a]) for a in AGGREGATIONS)]
        for name, figures in methods.items()
    ]
    names = [name.replace("_", " ") for name in AGGREGATIONS]
    tables.append(
        page.Table(f"Best of {num_candidates} by the aggregation of the step scores", ["method", *names], rows)
    )
    tables += [auroc_table(methods), weight_table(methods), formula_table(found_gains)]
    return [table for table in tables if table.rows]


def auroc_table(methods: dict[str, Any]) -> page.Table:
    """How well weights tell corrupted rows apart, over all rows and within sources of both kinds; and losses."""
    learned = {name: figures for name, figures in methods.items() if "auroc" in figures}
    sources = sorted({source for figures in learned.values() for source in figures["auroc_by_source"]})
    rows = [
        [TITLES[name], fraction(figures["auroc"]), *(fraction(figures["auroc_by_source"].get(s)) for s in sources),
         fraction(figures.get("loss_auroc"))]
        for name, figures in learned.items()
    ]  # fmt: skip
    if "loss_auroc" in methods[COLD_START]:
        loss = fraction(methods[COLD_START]["loss_auroc"])
        rows.insert(0, [TITLES[COLD_START], *[_NONE] * (1 + len(sources)), loss])
    head = ["method", "weight, all rows", *(f"weight, {source}" for source in sources), "loss, all rows"]
    return page.Table("AUROC against corruption", head, rows)


def weight_table(methods: dict[str, Any]) -> page.Table:
    """Mean weights by source."""
    learned = {name: figures["weight_by_source"] for name, figures in methods.items() if "weight_by_source" in figures}
    groups = sorted({group for figures in learned.values() for group in figures})
    rows = [[TITLES[name], *(fraction(found.get(group)) for group in groups)] for name, found in learned.items()]
    return page.Table("Mean weight by source", ["method", *groups], rows)


def formula_table(gains: dict[str, Any]) -> page.Table:
    """The exact meta-gradient against the published formula."""
    pairs = [(name, found[f"{name}_identity"]) for name, found in gains.items() if f"{name}_identity" in found]
    rows = [[TITLES[name], points(gain)] for name, gain in pairs]
    return page.Table("Exact meta-gradient over the published formula", ["method", "gain in best-of-N, points"], rows)


# Plots.


def plots_of(results: dict[str, Any], workdirs: Workdirs) -> list[page.Plot]:
    """All plots of a comparison."""
    if results["sweep"] in AXES:
        return [sweep_plot(results)]
    ((name, comparison),) = results["settings"].items()
    parts = workdirs[name]
    values = {TITLES[method]: Interval(**found) for method, found in comparison["intervals"].items()}
    levels = {rule: stat["mean"] for rule, stat in comparison["references"].items() if rule != "pass_at_1"}
    levels = {"cold start": comparison["methods"][COLD_START]["prm"]["mean"], **levels}
    ylabel = f"best of {results['num_candidates']}"
    shown = [
        _plot(
            "best_of_n",
            f"{ylabel.capitalize()} by method, with 95% intervals.",
            plots.means_beside(values, levels, ylabel),
        ),
        _learning_plot(parts),
        _score_plot(parts),
    ]
    panels = {
        TITLES[method]: source_curves(parts[method])
        for method, figures in comparison["methods"].items()
        if "auroc" in figures and method in ("table", "net")
    }
    if panels:
        figure = plots.curve_panels(panels, "step", "mean weight")
        shown.insert(1, _plot("weights_by_source", "Weights by source over the training, mean of the seeds.", figure))
    return shown


def source_curves(workdirs: Sequence[Path]) -> dict[str, plots.Curve]:
    """Mean weights by source over the training, over the seeds."""
    of_seeds = []
    for workdir in workdirs:
        lines = read_json_lines(workdir / "instance_weights.jsonl")
        groups = {line["example_id"]: group_name(line["dataset"], line["corrupted"]) for line in lines}
        of_seeds.append(plots.weight_curves(read_metrics(workdir), groups))
    shared = [name for name in of_seeds[0] if all(name in curves for curves in of_seeds)]
    return {name: plots.mean_curve([curves[name] for curves in of_seeds]) for name in shared}


def _learning_plot(parts: Mapping[str, Sequence[Path]]) -> page.Plot:
    panels: dict[str, dict[str, plots.Curve]] = {"training loss, unweighted": {}, "meta loss": {}}
    for method, folders in parts.items():
        metrics = [read_metrics(folder) for folder in folders]
        for panel, name in zip(panels.values(), ("inner_loss", "meta_loss"), strict=True):
            if method != COLD_START and name in metrics[0][0]:
                panel[TITLES[method]] = plots.mean_curve([plots.loss_curve(rows, name) for rows in metrics])
    panels = {title: curves for title, curves in panels.items() if curves}
    figure = plots.curve_panels(panels, "training rows drawn", "loss")
    return _plot("learning_curves", "Training and meta loss over the training, mean of the seeds.", figure)


def _score_plot(parts: Mapping[str, Sequence[Path]]) -> page.Plot:
    groups = {}
    for method, folders in parts.items():
        lines = [line for folder in folders for line in read_json_lines(folder / "test_scores.jsonl")]
        groups[TITLES[method]] = right_and_wrong(lines)
    return _plot("scores", "Scores of right and of wrong test chains, all seeds.", plots.score_histograms(groups))


def sweep_plot(results: dict[str, Any]) -> page.Plot:
    """Best-of-N and the gain over uniform against the setting."""
    settings = list(results["settings"].values())
    methods = [name for name in settings[0]["methods"] if name != COLD_START]
    best = {
        TITLES[name]: [Interval(**found["intervals"][name]) for found in settings] for name in [COLD_START, *methods]
    }
    gains = {
        TITLES[name]: [
            Interval(*(100 * level for level in found["gains"][name]["uniform"].values())) for found in settings
        ]
        for name in methods
        if "uniform" in settings[0]["gains"][name]
    }
    panels = {f"best of {results['num_candidates']}": best, "gain over uniform (points)": gains}
    panels = {ylabel: lines for ylabel, lines in panels.items() if lines}
    axis = AXES[results["sweep"]]
    figure = plots.sweep_lines([found["value"] for found in settings], panels, axis)
    return _plot("sweep", f"Best-of-N and its gain over uniform training by {axis}, with 95% intervals.", figure)


def _plot(name: str, caption: str, figure: Any) -> page.Plot:
    return page.Plot(name, caption, page.png_of(figure))
