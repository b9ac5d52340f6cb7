"""What the finished parts of a comparison say together: figures of each method over the seeds, and paired intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dreamprm_jax.losses import AGGREGATIONS
from dreamprm_jax.metrics import read_json_lines
from dreamprm_jax.report import weight_groups
from dreamprm_jax.results import corruption_auroc, field_of_lines, step_figures
from dreamprm_jax.selection import REFERENCES, Interval, of_score, outcomes, packed, paired_bootstrap

COLD_START = "cold_start"


class Part(NamedTuple):
    """What one finished part says, of one seed."""

    figures: dict[str, Any]  # numbers, nested
    outcomes: dict[str, np.ndarray]  # by selection rule, [Q]: see `selection.of_score`


def read_part(workdir: Path, aggregate: str) -> Part:
    """The figures of a finished part, from its files.

    Args:
      workdir: the part's.
      aggregate: of the step scores in the headline figures, the same for every method whatever it was trained with.
    """
    scored = read_json_lines(workdir / "test_scores.jsonl")
    weights = read_json_lines(workdir / "instance_weights.jsonl")
    summary = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
    field = field_of_lines(scored)
    scores = response_scores([line["step_scores"] for line in scored])
    every = outcomes(field, {name: packed(field, values) for name, values in scores.items()})
    chosen = of_score(every, aggregate)
    figures = {
        **{rule: float(np.mean(values)) for rule, values in chosen.items()},
        "aggregations": {name: float(np.mean(every[f"prm/{name}"])) for name in scores},
        **step_figures(scored),
        **weight_figures(weights, learned=summary["hypergradient"] is not None),
        "corrupted_share": float(np.mean([line["corrupted"] for line in weights])),
        "seconds": summary["seconds"],
    }
    return Part(figures, chosen)


def response_scores(step_scores: Sequence[Sequence[float]]) -> dict[str, np.ndarray]:
    """Chains' response scores by every aggregation: [S] step scores of each of C chains -> {name: [C]}."""
    mask = np.arange(max(map(len, step_scores))) < np.array([[len(scores)] for scores in step_scores])  # [C, S]
    padded = np.zeros(mask.shape, np.float32)
    padded[mask] = np.concatenate(step_scores)
    return {name: np.asarray(combine(jnp.asarray(padded), jnp.asarray(mask))) for name, combine in AGGREGATIONS.items()}


def weight_figures(lines: Sequence[dict[str, Any]], *, learned: bool) -> dict[str, Any]:
    """How the lines of instance_weights.jsonl tell corrupted rows from others: by loss, and by weight where learned."""
    found: dict[str, Any] = {"loss_auroc": corruption_auroc(lines, "loss")}
    if learned:
        sources = sorted({line["dataset"] for line in lines})
        of_source = {name: [line for line in lines if line["dataset"] == name] for name in sources}
        found["auroc"] = corruption_auroc(lines)
        found["auroc_by_source"] = _known({name: corruption_auroc(rows) for name, rows in of_source.items()})
        groups = weight_groups(lines, [line["dataset"] for line in lines])
        found["weight_by_source"] = {name: float(np.mean(weights)) for name, weights in sorted(groups.items())}
    return _known(found)


def _known(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if value is not None}


def over_seeds(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The seeds' nested numbers as one nest of `statistic`s; what some seed lacks is left out."""
    found = {}
    for name, first in figures[0].items():
        if all(name in of_seed for of_seed in figures):
            values = [of_seed[name] for of_seed in figures]
            found[name] = over_seeds(values) if isinstance(first, dict) else statistic(values)
    return found


def statistic(values: Sequence[float]) -> dict[str, Any]:
    """Mean over the seeds, its standard error (None of a single seed), and each seed's own value."""
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "standard_error": error, "values": list(values)}


def compare(parts: Mapping[str, Sequence[Part]]) -> dict[str, Any]:
    """The comparison of methods under one setting, as it stands in results.json.

    Args:
      parts: by method, COLD_START among them, one part for each seed, in the same order.
    """
    methods = {name: over_seeds([part.figures for part in of_seeds]) for name, of_seeds in parts.items()}
    references = {rule: methods[COLD_START][rule] for rule in REFERENCES}  # the same for all: of the test set alone
    for figures in methods.values():
        for rule in REFERENCES:
            del figures[rule]
    return {
        "references": references,
        "methods": methods,
        "intervals": {name: _interval(of_seeds, None)._asdict() for name, of_seeds in parts.items()},
        "gains": {name: gains(name, parts) for name in parts},
    }


def gains(method: str, parts: Mapping[str, Sequence[Part]]) -> dict[str, dict[str, float]]:
    """The method's gain in best-of-N over each thing it is compared with, with paired intervals.

    That is uniform training, the cold start, the majority vote, and the same method by the published formula.
    """
    rivals = [name for name in ("uniform", COLD_START, f"{method}_identity") if name in parts and name != method]
    found = {rival: _interval(parts[method], [part.outcomes["prm"] for part in parts[rival]]) for rival in rivals}
    found["majority"] = _interval(parts[method], [part.outcomes["majority"] for part in parts[method]])
    return {rival: interval._asdict() for rival, interval in found.items()}


def _interval(ours: Sequence[Part], theirs: Sequence[np.ndarray] | None) -> Interval:
    """Of the gain in best-of-N over `theirs`; of the figure itself where that is None."""
    found = [part.outcomes["prm"] for part in ours]
    return paired_bootstrap(found, [np.zeros_like(values) for values in found] if theirs is None else theirs)
