"""report.html: one self-contained page with a run's curves and weights."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from dreamprm_jax.metrics import read_metrics, write_text

matplotlib.use("Agg")

_PAGE = jinja2.Environment(autoescape=True).from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
img { max-width: 100%; height: auto; } table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } figure { margin: 2rem 0; }
figcaption { color: #555; } .scroll { overflow-x: auto; } code { background: #f4f4f4; padding: 0 .3em; }
</style></head><body>
<h1>{{ title }}</h1>
{% for table in tables %}<h2>{{ table.title }}</h2><div class="scroll"><table>
<tr>{% for name in table.head %}<th scope="col">{{ name }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}
<td{% if cell is number %} class="number"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>{% endfor %}
{% for figure in figures %}<figure><img alt="{{ figure.caption }}" src="data:image/png;base64,{{ figure.png }}">
<figcaption>{{ figure.caption }}</figcaption></figure>{% endfor %}
<h2>Config</h2><pre>{{ config }}</pre>
</body></html>
""")


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return base64.b64encode(buffer.getvalue()).decode()


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    """Trailing mean over up to `window` values: [n] -> [n]."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def curves(rows: Sequence[dict]) -> Figure:
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
    axes.legend(named.values(), named.keys(), loc="upper right")
    return figure


def weight_histogram(groups: dict[str, list[float]]) -> Figure:
    """How the learned weights are distributed in each group of rows."""
    figure = Figure(figsize=(9, 3.5))
    axes = figure.subplots()
    every = [weight for weights in groups.values() for weight in weights]
    edges = np.linspace(min(every) - 1e-3, max(every) + 1e-3, 41)
    for name, weights in sorted(groups.items()):
        axes.hist(weights, bins=edges, alpha=0.5, label=f"{name} ({len(weights)})")
    axes.set(xlabel="instance weight", ylabel="rows")
    axes.legend()
    return figure


def weight_groups(weights: Sequence[dict[str, Any]], domains: Sequence[str | None]) -> dict[str, list[float]]:
    """The weights by source, told apart by corruption where that is known; rows that were never drawn are left out."""
    groups = defaultdict(list)
    for row, domain in zip(weights, domains, strict=True):
        if not row["visits"] or row["weight"] is None:
            continue
        truth = ", corrupted" if row.get("corrupted") else ""
        groups[f"{domain or 'all rows'}{truth}"].append(row["weight"])
    return dict(groups)


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    rounded = [[round(cell, 4) if isinstance(cell, float) else cell for cell in row] for row in rows]
    return {"title": title, "head": head, "rows": rounded}


def write_report(
    workdir: Path,
    summary: dict[str, Any],
    weights: Sequence[dict[str, Any]],
    domains: Sequence[str | None],
    config: str,
) -> None:
    """Writes `workdir/report.html`.

    Args:
      workdir: of a finished run, with its metrics.
      summary: nested numbers, as in summary.json.
      weights: the lines of instance_weights.jsonl; may be empty.
      domains: each line's source.
      config: shown as it stands.
    """
    plain = [(name, value) for name, value in summary.items() if not isinstance(value, dict)]
    tables = [_table("Summary", ("figure", "value"), plain)]
    for name, value in summary.items():
        if isinstance(value, dict):
            tables.append(_table(name.replace("_", " "), ("figure", "value"), list(value.items())))
    figures = [
        {
            "caption": "Losses by step (faint: each step; strong: trailing mean).",
            "png": _png(curves(read_metrics(workdir))),
        }
    ]
    groups = weight_groups(weights, domains) if weights else {}
    if groups:
        rows = [(name, len(v), float(np.mean(v)), float(np.std(v))) for name, v in sorted(groups.items())]
        tables.append(_table("Learned weights", ("rows", "number", "mean", "standard deviation"), rows))
        figures.append({"caption": "Learned instance weights.", "png": _png(weight_histogram(groups))})
    title = f"DreamPRM-1.5 in JAX: {summary['weighting']}, recipe {summary['recipe']}"
    write_text(workdir / "report.html", _PAGE.render(title=title, tables=tables, figures=figures, config=config))
