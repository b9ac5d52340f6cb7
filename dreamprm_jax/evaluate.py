"""`task=evaluate`: from candidates, judged chains and a model (or its scores) to a table, plots and a page."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dreamprm_jax import build, evaluation, evaluation_report
from dreamprm_jax.checkpoint import Model, load_model
from dreamprm_jax.data import noisy_steps, raw
from dreamprm_jax.data.bad_rows import RAISE, settle
from dreamprm_jax.data.candidates import Contest, disagreements, noisy_contests, read_contests
from dreamprm_jax.data.example import Example
from dreamprm_jax.data.formats import visualprocessbench
from dreamprm_jax.data.formats.rules import rules_for
from dreamprm_jax.data.prepared import PreparedExamples, is_prepared, refuse_parent
from dreamprm_jax.errors import InputError
from dreamprm_jax.evaluation import Scores, Settings
from dreamprm_jax.evaluation_report import Evaluated
from dreamprm_jax.metrics import METRICS_FILE, to_json, write_json_lines, write_text
from dreamprm_jax.scoring import write_scores
from dreamprm_jax.workdir import claim_workdir

RESULTS_FILE, DISAGREEMENTS_FILE = "results.json", "disagreements.jsonl"
SCORES_FILE, STEP_SCORES_FILE = "scores.jsonl", "step_scores.jsonl"


def run_evaluation(cfg: Any, workdir: Path) -> dict[str, Any]:
    """Reads everything, scores what has no scores yet, and writes the figures.

    The workdir gets config.json, scores.jsonl and step_scores.jsonl (from a model), results.json, results.md,
    report.html, plots/, and disagreements.jsonl where record and rules differ. The same command goes on after a kill;
    of a finished run it gives the summary.

    Raises:
      InputError: before anything is compiled, a row, image or score that cannot be used, or a workdir of another run.
    """
    settings = Settings(
        aggregate=cfg.aggregate,
        seed=cfg.seed,
        **{name: cfg.evaluate[name] for name in ("step_score", "ties", "num_samples", "threshold", "held_out")},
    )
    contests, chains = read_contests_of(cfg), read_chains_of(cfg)
    model = load_model(cfg.model, cfg.seed) if cfg.model.checkpoint is not None else None
    candidates = [candidate.example for contest in contests for candidate in contest.candidates]
    ours = _scorer(cfg, model, workdir, cfg.candidates, candidates, SCORES_FILE) if contests else None
    theirs = _scorer(cfg, model, workdir, cfg.benchmark, chains, STEP_SCORES_FILE) if chains else None
    if chains and theirs is None:
        raise InputError(
            f"--config.benchmark.path={cfg.benchmark.path}: needs a --config.model.checkpoint, or its "
            "--config.benchmark.scores"
        )
    claim_workdir(workdir, build.record(cfg))
    if (workdir / RESULTS_FILE).is_file():
        return summary_of(json.loads((workdir / RESULTS_FILE).read_text(encoding="utf-8")), settings, workdir)
    scores, step_scores = ours and ours(), theirs and theirs()
    if not chains and scores is not None and candidates[0].step_truth is not None:
        chains, step_scores = candidates, scores
    found = evaluated(settings, contests, scores, chains, step_scores)
    lines = disagreements(contests)
    if lines:
        write_json_lines(workdir / DISAGREEMENTS_FILE, lines)
        found.results["selection"]["num_disagreements"] = len(lines)
    evaluation_report.write_reports(
        workdir,
        found,
        cfg.to_json_best_effort(indent=2),
        questions_shown=cfg.evaluate.questions_shown,
        image_side=cfg.evaluate.image_side,
    )
    summary = summary_of(found.results, settings, workdir)
    write_json_lines(workdir / METRICS_FILE, [{"step": 0, "phase": "evaluate", **summary}])
    write_text(workdir / RESULTS_FILE, json.dumps(found.results, indent=2) + "\n")  # the last: it says "finished"
    return summary


def evaluated(
    settings: Settings,
    contests: Sequence[Contest],
    scores: Scores | None,
    chains: Sequence[Example],
    step_scores: Scores | None,
) -> Evaluated:
    """All figures of questions with candidates (where there are any), and of chains whose steps were judged."""
    results: dict[str, Any] = {"settings": settings._asdict()}
    ballot = steps = None
    if contests:
        ballot = evaluation.ballot_of(contests, scores, settings)
        results["selection"] = evaluation.selection_results(contests, scores, ballot, settings)
    if step_scores is not None:
        steps = evaluation.judged_steps(chains, step_scores)
        results["steps"] = evaluation.step_results(steps, settings)
    return Evaluated(settings, contests, scores, ballot, steps, evaluation.finite(to_json(results)))


def summary_of(results: dict[str, Any], settings: Settings, workdir: Path) -> dict[str, Any]:
    """What a person wants to know first."""
    summary: dict[str, Any] = {"report": str(workdir / "report.html")}
    if "selection" in results:
        found = results["selection"]
        rules = {name: name for name in ("pass_at_1", "majority", "oracle")}
        if "gains" in found:
            rules |= {rule.partition("/")[0]: rule for rule in evaluation.model_rules(settings).values()}
            summary["aggregate"] = settings.aggregate
        summary |= {name: found[name] for name in ("num_questions", "num_candidates")}
        summary["best_of_n"] = {name: found["accuracy"][rule]["mean"] for name, rule in rules.items()}
        summary |= {name: found[name] for name in ("num_disagreements",) if name in found}
    if "steps" in results:
        found = results["steps"]
        summary["steps"] = {name: found["pooled"][name] for name in ("f1_plus", "f1_minus", "macro_f1")}
        summary["steps"] |= {name: found[name] for name in ("threshold", "auroc")}
    return summary


# --- Reading.


def read_contests_of(cfg: Any) -> list[Contest]:
    """The questions that the config names; the embedded benchmark's test set where it names neither them nor chains.

    Raises:
      InputError: a row that cannot be used.
    """
    if cfg.candidates.path is not None:
        needed = cfg.model.checkpoint is not None and cfg.candidates.scores is None
        return read_contests(
            cfg.candidates.path,
            cfg.candidates.images,
            need_images=needed or cfg.candidates.images is not None,
            splitter=cfg.evaluate.splitter,
            judge=cfg.evaluate.judge,
        )
    if cfg.benchmark.path is not None:
        return []
    return noisy_contests(noisy_steps.make(cfg.seed, noisy_steps.Sizes(**cfg.noisy_steps)).test)


def read_chains_of(cfg: Any) -> list[Example]:
    """The chains of the config's step benchmark, VisualProcessBench's rows or a prepared set of them; [] for none.

    Raises:
      InputError: a row that cannot be used, or without the truth of its steps.
    """
    path = cfg.benchmark.path
    if path is None:
        return []
    refuse_parent(path)
    rules = rules_for(cfg.benchmark.images or raw.folder(path))
    errors: dict[int, InputError] = {}
    found: list[Example] = []
    for number, parse in enumerate(_chain_parsers(path, rules)):
        try:
            found.append(parse())
        except InputError as error:
            errors[number] = error
    settle(errors, len(found) + len(errors), RAISE)
    if not found:
        raise InputError(f"{path}: no rows; give chains with the truth of their steps")
    return [example._replace(row=row) for row, example in enumerate(found)]


def _chain_parsers(path: str, rules: Any) -> list[Callable[[], Example]]:
    if is_prepared(path):
        prepared = PreparedExamples(path)
        return [partial(_with_truth, prepared, row) for row in range(len(prepared))]
    rows = [row for name, file in raw.find_files(path).items() for row in raw.file_rows(name, file)]
    return [partial(visualprocessbench.parse, *row, rules) for row in rows]


def _with_truth(prepared: PreparedExamples, row: int) -> Example:
    example = prepared[row]
    if example.step_truth is None:
        raise InputError(f"{example.place}: has no truth of its steps; prepare the set with :visualprocessbench")
    return example


# --- Scores.


def _scorer(
    cfg: Any, model: Model | None, workdir: Path, source: Any, chains: Sequence[Example], name: str
) -> Callable[[], Scores] | None:
    """What gives the chains' scores, everything checked; None where there is neither a file of them nor a model."""
    if source.scores is not None:
        scores = read_scores(Path(source.scores), chains, cfg.evaluate.step_score)
        return lambda: scores
    if model is None:
        return None
    dataset = build.encoder(cfg, model)(list(chains))

    def score() -> Scores:
        write_scores(cfg, model, dataset, workdir / name)
        found = read_scores(workdir / name, [chains[row] for row in dataset.rows], cfg.evaluate.step_score)
        by_row = dict(zip(dataset.rows.tolist(), found.steps, strict=True))
        steps = [by_row.get(row, np.zeros(example.num_steps)) for row, example in enumerate(chains)]
        return Scores(steps, dataset.num_tokens.tolist(), len(chains) - len(by_row))

    return score


def read_scores(path: Path, chains: Sequence[Example], step_score: str) -> Scores:
    """Scores of chains from JSON lines in their order, such as `task=score` and `task=evaluate` write.

    Args:
      path: lines with "step_scores", P("+") of each step, or for `two_token` "step_scores_two_token"; "num_tokens"
        where it is known.
      chains: whose they are.
      step_score: "full" or "two_token".

    Raises:
      InputError: not a line for each chain, or scores that are no probabilities, one for each of its steps.
    """
    field = {"full": "step_scores", "two_token": "step_scores_two_token"}[step_score]
    rows = list(raw.file_rows(path.name, path))
    if len(rows) != len(chains):
        raise InputError(
            f"{path}: has {len(rows)} lines for {len(chains)} chains; it must have one each, in their order"
        )
    steps = [_step_scores(row, field, example, place) for (row, _, place), example in zip(rows, chains, strict=True)]
    num_tokens = [row.get("num_tokens") for row, _, _ in rows]
    return Scores(steps, None if None in num_tokens else num_tokens)


def _step_scores(row: Any, field: str, example: Example, place: str) -> np.ndarray:
    if isinstance(row, InputError):
        raise row
    values = row.get(field) if isinstance(row, dict) else None
    usable = isinstance(values, list) and all(type(value) in (int, float) and 0 <= value <= 1 for value in values)
    if not usable or len(values) != example.num_steps:
        raise InputError(
            f'{place}: "{field}" must be a list of {example.num_steps} probabilities, one for each step of '
            f"{example.place}; score that file again"
        )
    return np.array(values)
