"""`task=evaluate`: from candidates, judged chains and a model (or its scores) to a table, plots and a page."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dreamprm_jax import build, evaluation, evaluation_report, sharding
from dreamprm_jax.data import noisy_steps, raw
from dreamprm_jax.data.candidates import Contest, disagreements, noisy_contests, read_contests, settled
from dreamprm_jax.data.example import Example
from dreamprm_jax.data.fields import shown
from dreamprm_jax.data.formats import visualprocessbench
from dreamprm_jax.data.formats.rules import rules_for
from dreamprm_jax.data.prepared import PreparedExamples, is_prepared, refuse_parent
from dreamprm_jax.errors import InputError
from dreamprm_jax.evaluation import Judged, Scores, Settings
from dreamprm_jax.evaluation_report import Evaluated
from dreamprm_jax.loading import Model, load_model
from dreamprm_jax.metrics import METRICS_FILE, to_json, write_json_lines, write_text
from dreamprm_jax.scoring import write_scores
from dreamprm_jax.workdir import claim_workdir, files_of_process

RESULTS_FILE, OUTCOMES_FILE, DISAGREEMENTS_FILE = "results.json", "outcomes.jsonl", "disagreements.jsonl"
STEP_SCORE_FIELDS = {"full": "step_scores", "two_token": "step_scores_two_token"}
SCORES_FILES = {"candidates": "scores.jsonl", "benchmark": "step_scores.jsonl"}


def run_evaluation(cfg: Any, workdir: Path) -> dict[str, Any]:
    """Reads everything, scores what has no scores yet, and writes the figures.

    The workdir gets config.json, scores.jsonl and step_scores.jsonl (from a model), results.json, results.md,
    report.html, plots/, outcomes.jsonl (question by question), and disagreements.jsonl where record and rules differ.
    The same command goes on after a kill; of a finished run it gives the summary.

    Raises:
      InputError: before anything is compiled, a row, image or score that cannot be used, or a workdir of another run.
    """
    with files_of_process(workdir, first=sharding.is_first()) as (own, _):
        sharding.meet("files")  # before the first process changes what the others copy
        return _run_evaluation(cfg, own)


def _run_evaluation(cfg: Any, workdir: Path) -> dict[str, Any]:
    check_sources(cfg)
    settings = settings_of(cfg)
    if (workdir / RESULTS_FILE).is_file() and (workdir / "config.json").is_file():
        claim_workdir(workdir, build.record(cfg))
        return summary_of(json.loads((workdir / RESULTS_FILE).read_text(encoding="utf-8")), settings, workdir)
    contests, judged = read_contests_of(cfg), read_judged_of(cfg)
    if judged is not None:
        evaluation.check_judged(judged, settings)
    model = _model(cfg, contests, judged)
    candidates = [candidate.example for contest in contests for candidate in contest.candidates]
    score_candidates = _scorer(cfg, model, workdir, "candidates", candidates) if contests else None
    score_judged = _scorer(cfg, model, workdir, "benchmark", judged.chains) if judged is not None else None
    if judged is None and score_candidates is not None:
        judged = evaluation.judged_candidates(contests)
        if judged is not None:
            evaluation.check_judged(judged, settings)
            score_judged = score_candidates
    claim_workdir(workdir, build.record(cfg))
    scores = None if score_candidates is None else score_candidates()
    step_scores = scores if score_judged is score_candidates else score_judged and score_judged()
    found = evaluated(settings, contests, scores, judged, step_scores)
    write_all(cfg, workdir, found)
    return summary_of(found.results, settings, workdir)


def settings_of(cfg: Any) -> Settings:
    """How the config has scores read."""
    of_evaluation = {name: cfg.evaluate[name] for name in Settings._fields if name in cfg.evaluate}
    return Settings(aggregate=cfg.aggregate, seed=cfg.seed, **of_evaluation)


def check_sources(cfg: Any) -> None:
    """What is given for a source that there is not, and a benchmark that nothing scores.

    Raises:
      InputError: either of them.
    """
    for name in ("candidates", "benchmark"):
        source = cfg[name]
        embedded = name == "candidates" and cfg.benchmark.path is None  # the embedded benchmark's may be scored before
        unused = [field for field in ("images", "scores") if source[field] is not None]
        unused = [field for field in unused if not (embedded and field == "scores")]
        if source.path is None and unused:
            raise InputError(
                f"--config.{name}.{unused[0]}={source[unused[0]]}: belongs to --config.{name}.path, which is not "
                "given; give both or neither"
            )
    if cfg.benchmark.path is not None and cfg.benchmark.scores is None and cfg.model.checkpoint is None:
        raise InputError(
            f"--config.benchmark.path={cfg.benchmark.path}: needs a --config.model.checkpoint, or its "
            "--config.benchmark.scores"
        )


def evaluated(
    settings: Settings,
    contests: Sequence[Contest],
    scores: Scores | None,
    judged: Judged | None,
    step_scores: Scores | None,
) -> Evaluated:
    """All figures of questions with candidates (where there are any), and of chains whose steps were judged."""
    results: dict[str, Any] = {"settings": settings._asdict()}
    ballot = steps = None
    if contests:
        ballot = evaluation.ballot_of(contests, scores, settings)
        results["selection"] = {
            **evaluation.selection_results(contests, scores, ballot, settings),
            "num_disagreements": len(disagreements(contests)),
        }
    if judged is not None and step_scores is not None:
        chosen, steps = evaluation.choose_threshold(evaluation.judged_steps(judged, step_scores), settings)
        figures = evaluation.step_results(steps, chosen["threshold"])
        if chosen["chosen_on"] is not None:
            missing = sum(not evaluation.has_pictures(chain) for chain in judged.chains)
            chosen["chosen_on"]["num_without_pictures"] = missing
        results["steps"] = {**chosen, **figures, "num_unscored": len(step_scores.unscored)}
    return Evaluated(settings, contests, scores, ballot, steps, evaluation.finite(to_json(results)))


def write_all(cfg: Any, workdir: Path, found: Evaluated) -> None:
    """Every file of the workdir but the scores; results.json comes last, and says that the run is finished."""
    lines = disagreements(found.contests)
    if lines:
        write_json_lines(workdir / DISAGREEMENTS_FILE, lines)
    if found.ballot is not None:
        write_json_lines(
            workdir / OUTCOMES_FILE, evaluation.outcome_lines(found.contests, found.ballot, found.settings)
        )
    evaluation_report.write_reports(
        workdir,
        found,
        cfg.to_json_best_effort(indent=2),
        questions_shown=cfg.evaluate.questions_shown,
        image_side=cfg.evaluate.image_side,
        origin=origin_of(cfg),
    )
    summary = summary_of(found.results, found.settings, workdir)
    write_json_lines(workdir / METRICS_FILE, [{"step": 0, "phase": "evaluate", **summary}])
    write_text(workdir / RESULTS_FILE, json.dumps(found.results, indent=2, allow_nan=False) + "\n")


def origin_of(cfg: Any) -> str:
    """Where candidates and judged chains are from, and what scored them, in words."""
    parts = []
    for name in ("candidates", "benchmark"):
        path, scores = cfg[name].path, cfg[name].scores
        if path is None and name == "candidates" and cfg.benchmark.path is None:
            path = f"the embedded benchmark's test set (seed {cfg.seed})"
        if path is not None:
            model = "not scored" if cfg.model.checkpoint is None else f"scored by {cfg.model.checkpoint}"
            scored = model if scores is None else f"scores of {scores}"
            parts.append(f"{name.capitalize()}: {path}, {scored}.")
    return " ".join(parts)


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
        summary["num_disagreements"] = found["num_disagreements"]
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
        return read_contests(
            cfg.candidates.path,
            cfg.candidates.images,
            need_images=_is_for_model(cfg, cfg.candidates) or cfg.candidates.images is not None,
            splitter=cfg.evaluate.splitter,
            judge=cfg.evaluate.judge,
        )
    if cfg.benchmark.path is not None:
        return []
    return noisy_contests(noisy_steps.make(cfg.seed, noisy_steps.Sizes(**cfg.noisy_steps)).test)


def read_judged_of(cfg: Any) -> Judged | None:
    """The chains of the config's step benchmark, VisualProcessBench's rows or a prepared set of them.

    Images need not be there where there are scores.

    Raises:
      InputError: a row that cannot be used, or without the truth of its steps.
    """
    path = cfg.benchmark.path
    if path is None:
        return None
    refuse_parent(path)
    rules = rules_for(cfg.benchmark.images or raw.folder(path))
    if not _is_for_model(cfg, cfg.benchmark):
        find_image = rules.find_image
        rules = rules._replace(find_image=lambda name: find_image(name) or Path(name))
    found = settled(lambda parse: parse(), ((parse,) for parse in _chain_parsers(path, rules)))
    if not found:
        raise InputError(f"{path}: no rows; give chains with the truth of their steps")
    return evaluation.judged_chains([example._replace(row=row) for row, example in enumerate(found)])


def _is_for_model(cfg: Any, source: Any) -> bool:
    return cfg.model.checkpoint is not None and source.scores is None


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


def _model(cfg: Any, contests: Sequence[Contest], judged: Judged | None) -> Model | None:
    """The config's model where something has no scores yet."""
    asked = [cfg.candidates] * bool(contests) + [cfg.benchmark] * (judged is not None)
    if not any(_is_for_model(cfg, source) for source in asked):
        return None
    return load_model(cfg.model, cfg.seed, mesh=sharding.make_mesh(cfg.mesh))


def _scorer(
    cfg: Any, model: Model | None, workdir: Path, name: str, chains: Sequence[Example]
) -> Callable[[], Scores] | None:
    """What gives the chains' scores, everything checked; None where there is neither a file of them nor a model.

    `name`: of the config's part that says where the chains are, "candidates" or "benchmark".
    """
    if cfg[name].scores is not None:
        path = Path(cfg[name].scores)
        if not path.is_file():
            raise InputError(f"--config.{name}.scores={path}: no such file; give scores.jsonl of a run, or a model")
        scores = read_scores(path, chains, cfg.evaluate.step_score)
        return lambda: scores
    if model is None:
        return None
    dataset, output = build.encoder(cfg, model)(list(chains)), workdir / SCORES_FILES[name]

    def score() -> Scores:
        write_scores(cfg, model, dataset, output, step_score=cfg.evaluate.step_score)
        found = read_scores(output, [chains[row] for row in dataset.rows], cfg.evaluate.step_score)
        by_row = dict(zip(dataset.rows.tolist(), found.steps, strict=True))
        steps = [by_row.get(row, np.zeros(example.num_steps)) for row, example in enumerate(chains)]
        unscored = tuple(row for row in range(len(chains)) if row not in by_row)
        return Scores(steps, dataset.num_tokens.tolist(), unscored)

    return score


def read_scores(path: Path, chains: Sequence[Example], step_score: str) -> Scores:
    """Scores of chains from JSON lines, such as `task=score` and `task=evaluate` write.

    Args:
      path: lines with "step_scores", P("+") of each step, or for `two_token` "step_scores_two_token"; "num_tokens"
        where it is known, and "row", `Example.row`; without it they are in the order of the rows.
      chains: whose they are.
      step_score: "full" or "two_token".

    Raises:
      InputError: not a line for each chain, another chain's by its "id" (where it has one), or scores that are no
        probabilities, one for each of its steps.
    """
    field = STEP_SCORE_FIELDS[step_score]
    lines = _by_row(path, chains)
    for example in chains:
        _check_id(*lines[example.row], example)
    steps = [_step_scores(*lines[example.row], field, example) for example in chains]
    num_tokens = [_num_tokens(*lines[example.row]) for example in chains]
    return Scores(steps, None if None in num_tokens else num_tokens)


def _by_row(path: Path, chains: Sequence[Example]) -> dict[int, tuple[Any, str]]:
    """Each chain's line and its place, by `Example.row`."""
    lines = [(row, place) for row, _, place in raw.file_rows(path.name, path)]
    if len(lines) != len(chains):
        raise InputError(f"{path}: has {len(lines)} lines for {len(chains)} chains; it must have one each")
    wanted = {example.row for example in chains}
    found: dict[int, tuple[Any, str]] = {}
    for row, (line, place) in zip(sorted(wanted), lines, strict=True):
        own = line.get("row", row) if isinstance(line, dict) else row
        if type(own) is not int or own in found:
            raise InputError(f'{place}: "row" is {shown(own)}; it must be the chain\'s number, each once, or left out')
        found[own] = line, place
    for row, (_, place) in found.items():
        if row not in wanted:
            raise InputError(f'{place}: "row" is {row}, but no chain has that number; score the same file')
    return found


def _check_id(row: Any, place: str, example: Example) -> None:
    own = row.get("id") if isinstance(row, dict) else None
    if own is not None and str(own) != str(example.id):
        raise InputError(
            f'{place}: "id" is {shown(own)}, but {example.place} is of {shown(example.id)}; score that file, in its '
            "order"
        )


def _num_tokens(row: dict, place: str) -> int | None:
    value = row.get("num_tokens")
    if value is not None and (type(value) is not int or value < 0):
        raise InputError(f'{place}: "num_tokens" is {shown(value)}; it must be a whole number, or left out')
    return value


def _step_scores(row: Any, place: str, field: str, example: Example) -> np.ndarray:
    if isinstance(row, InputError):
        raise row
    values = row.get(field) if isinstance(row, dict) else None
    other = next((kind for kind, name in STEP_SCORE_FIELDS.items() if isinstance(row, dict) and name in row), None)
    if values is None and other is not None:
        raise InputError(
            f'{place}: "{field}" is missing; --config.evaluate.step_score={other} takes "{STEP_SCORE_FIELDS[other]}"'
        )
    usable = isinstance(values, list) and all(type(value) in (int, float) and 0 <= value <= 1 for value in values)
    if not usable or len(values) != example.num_steps:
        raise InputError(
            f'{place}: "{field}" must be a list of {example.num_steps} probabilities, one for each step of '
            f"{example.place}; score that file again"
        )
    return np.array(values)
