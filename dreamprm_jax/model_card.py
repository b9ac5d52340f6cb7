"""The README.md of an exported model: what the run's own files say of it, and nothing else.

What a run does not know (a license, data sets' names on the Hub) is given by `config.export` or left out. Of paths the
last part alone is told.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from dreamprm_jax.checkpoint import CHECKPOINTS, saved_progress
from dreamprm_jax.data.prepared import VERSION
from dreamprm_jax.errors import InputError
from dreamprm_jax.models.hub import HUB_ID
from dreamprm_jax.models.presets import InternVLConfig
from dreamprm_jax.types import SUPERVISED
from dreamprm_jax.weight_files import read_weights, weight_figures


class Source(NamedTuple):
    """What is known of the model that is exported. All but `name` is None or empty where it is not a run of ours."""

    name: str  # the last part of a path, or a Hub id
    base_model: str | None  # Hub id that training started from
    config: dict[str, Any] | None  # of the run
    data: dict[str, str]  # sha256 of each file that the config names
    progress: dict[str, Any] | None  # of the newest checkpoint: `step`, `phase`, `next_step`, `averaged`
    summary: dict[str, Any] | None  # of a finished run
    weights: Sequence[dict[str, Any]]  # lines of instance_weights.jsonl


def read_source(checkpoint: str) -> Source:
    """Reads what a workdir says of its run; of a checkpoint or a Hub id there is the name alone.

    Raises:
      InputError: a file of the workdir that cannot be read, or a run without a checkpoint.
    """
    workdir = Path(checkpoint)
    if not (workdir / CHECKPOINTS).is_dir():
        base_model = None if workdir.is_dir() else checkpoint.partition("@")[0]
        return Source(checkpoint if base_model else workdir.resolve().name, base_model, None, {}, None, None, [])
    record = _read(workdir / "config.json")
    config = record.get("config") or {}
    summary = _read(workdir / "summary.json") if (workdir / "summary.json").is_file() else None
    return Source(
        workdir.resolve().name,
        _started_from(config.get("model", {}).get("checkpoint")),
        config,
        record.get("data") or {},
        saved_progress(workdir),
        summary,
        read_weights(workdir),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); restore the file as the run wrote it") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds {type(found).__name__}, not a JSON object; restore it as the run wrote it")
    return found


def _started_from(checkpoint: str | None) -> str | None:
    """The Hub id that a run, or the run that it started from, began with; None where that is not certain.

    `runs/cold_start` reads like a Hub id: only one that was downloaded here counts.
    """
    seen = set()
    while checkpoint is not None and checkpoint not in seen and Path(checkpoint, CHECKPOINTS).is_dir():
        seen.add(checkpoint)
        checkpoint = (_read(Path(checkpoint, "config.json")).get("config") or {}).get("model", {}).get("checkpoint")
    hub_id = HUB_ID.fullmatch(checkpoint or "")
    if hub_id is None or Path(checkpoint).exists():
        return None
    from huggingface_hub import try_to_load_from_cache

    in_cache = try_to_load_from_cache(hub_id["repo"], "config.json", revision=hub_id["revision"])
    return hub_id["repo"] if isinstance(in_cache, str) else None


def model_card(source: Source, options: Any, model: InternVLConfig, max_tiles: int) -> str:
    """README.md of an export.

    Args:
      source: what is known of the model.
      options: the config's `export`.
      model: its sizes.
      max_tiles: of an image, without the thumbnail, as preprocessor_config.json has it.
    """
    from huggingface_hub import ModelCardData

    base_model = options.base_model or source.base_model
    data = ModelCardData(
        license=options.license,
        base_model=base_model,
        datasets=options.datasets.split(",") if options.datasets else None,
        library_name="transformers" if options.layout == "hf" else "dreamprm_jax",
        pipeline_tag="image-text-to-text",
        tags=["process-reward-model", "internvl"],
    )
    parts = [
        f"---\n{data.to_yaml().strip()}\n---",
        f"# {source.name}",
        _what(source, options, base_model),
        *_training(source),
        *_scores(source.summary),
        *_weights(source.weights),
        _usage(source, options, model, max_tiles),
        _limits(source, options),
    ]
    return "\n\n".join(parts) + "\n"


def _what(source: Source, options: Any, base_model: str | None) -> str:
    origin = f", {'trained ' if source.config else ''}from `{base_model}`" if base_model else ""
    layout = "transformers' InternVL" if options.layout == "hf" else "OpenGVLab's InternVLChatModel"
    return (
        f"A multimodal process reward model{origin}: the probability of `+` after each step of a solution says how "
        f"likely the step is right. Exported by dreamprm_jax in the layout of {layout}, tensors in {options.dtype}."
    )


def _table(rows: dict[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines])


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _find(config: dict[str, Any], field: str) -> Any:
    """A dotted field; None where the run's version had no such field."""
    value: Any = config
    for part in field.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _joined(config: dict[str, Any], group: str, *fields: str) -> str:
    """Several fields of a group in one cell, by name."""
    found = {field: _find(config, f"{group}.{field}") for field in fields}
    return ", ".join(f"{field} {value}" for field, value in found.items() if value is not None)


def _training(source: Source) -> list[str]:
    """The recipe, and the data by name and fingerprint."""
    config = source.config
    if not config:
        return []
    is_weighted = _find(config, "weighting.name") != "uniform"
    rows = {
        "recipe": _find(config, "recipe"),
        "state": "finished" if source.summary else "not finished",
        "exported at": f"{source.progress['phase']}, step {source.progress['next_step']}",
        **{f"{phase} steps": _find(config, f"{phase}.num_steps") or None for phase in SUPERVISED},
        "weighted steps" if is_weighted else "steps": _find(config, "num_steps") or None,
        "parameters trained": _find(config, "model.trained"),
        "parameters exported": "their moving average" if source.progress.get("averaged") else None,
        "seed": _find(config, "seed"),
    }
    if _find(config, "num_steps"):
        rows |= {
            "batch size": _find(config, "batch_size"),
            "inner level": _joined(config, "inner", "optimizer", "lr", "schedule"),
        }
    if _find(config, "num_steps") and is_weighted:
        rows |= {
            "weighting": _joined(config, "weighting", "name", "activation"),
            "meta-gradient": (source.summary or {}).get("hypergradient") or _find(config, "hypergradient"),
            "inner steps": _find(config, "num_inner_steps"),
            "meta batch size": _find(config, "meta_batch_size"),
            "meta loss": _find(config, "meta_loss"),
            "meta target": _find(config, "meta_target"),
            "step scores to response score": _find(config, "aggregate"),
            "outer level": _joined(config, "outer", "optimizer", "lr", "schedule"),
        }
    return ["## Training", _table(rows), *_data(source)]


def _data(source: Source) -> list[str]:
    config, rows = source.config, {}
    for level in ("train", "meta"):
        path = _find(config, f"{level}.path")
        if path is not None:
            known = source.data.get(path)
            rows[level] = f"`{_last(path)}`" + (f", sha256 `{known}`" if known else "")
    if rows:
        return ["Data:", _table(rows)]
    return (
        [f"Data: noisy_steps, which dreamprm_jax makes from seed {_find(config, 'seed')}."]
        if _is_embedded(config)
        else []
    )


def _is_embedded(config: dict[str, Any] | None) -> bool:
    return config is not None and _find(config, "data.source") == "embedded" and not _find(config, "train.path")


def _last(path: str) -> str:
    """What tells a file or a prepared set by name (BUILDER/VERSION), without the folders of a machine."""
    pure = PurePath(path)
    return "/".join(pure.parts[-2:]) if pure.name == VERSION else pure.name


def _scores(summary: dict[str, Any] | None) -> list[str]:
    """What the run measured on its own test set, as summary.json has it."""
    found = (summary or {}).get("best_of_n")
    if not found:
        return []
    names = {
        "prm": "best of N by this model",
        "weighted_vote": "vote weighted by it",
        "majority": "majority vote",
        "pass_at_1": "a random candidate",
        "oracle": "any candidate right",
    }
    rows = {title: f"{found[name]:.4f}" for name, title in names.items() if name in found}
    if "auroc" in summary:
        rows["AUROC of weight against mislabelled rows"] = f"{summary['auroc']:.4f}"
    what = f"{found['num_questions']} questions, {found['num_candidates']} candidates each; the run's own test set."
    return ["## Scores", what, _table(rows)]


def _weights(lines: Sequence[dict[str, Any]]) -> list[str]:
    if not lines:
        return []
    figures = {name: _number(value) for name, value in weight_figures(lines).items()}
    text = (
        "`weights.jsonl`, `weights.csv` and `weights.parquet` have a weight for each training row: `example_id` is the "
        'row\'s number in the training file, from 0, `id_json` its "id" as JSON text.'
    )
    return ["## Instance weights", text, _table(figures)]


def _usage(source: Source, options: Any, model: InternVLConfig, max_tiles: int) -> str:
    """Code that runs as it stands, once `directory`, `question`, `picture` and `steps` are what they should be."""
    prompts = 'system=None, question_form="{question}", ' if _is_embedded(source.config) else ""
    given = (
        'directory, picture = "DIRECTORY", "PICTURE"  # this one, and an image file\n'
        'question, steps = "QUESTION", ["STEP 1", "STEP 2"]\n'
    )
    ours = (
        "With dreamprm_jax:\n\n```python\nfrom dreamprm_jax import prm\n\n"
        f"{given}scorer = prm.load(directory, {prompts}max_tiles={max_tiles})\n"
        "print(scorer.score(question, [picture], steps).full)\n```"
    )
    if options.layout != "hf":
        return f"## Use\n\n{_format()}\n\n{ours}\n\nOther software that loads this layout was not tested."
    return (
        f"## Use\n\n{_format()}\n\n{ours}\n\nWith transformers (5.23.0 was tested), where `question` is the whole "
        f"text of the question's turn:\n\n```python\n{_TRANSFORMERS % (given, model.image_tokens_per_tile)}```\n\n"
        "Serving engines were not tested."
    )


def _format() -> str:
    return (
        "A chain is a dialogue in the form of `chat_template.jinja`: the question in a user turn, right behind its "
        "image, each step in a user turn of its own, and after each an assistant turn that holds `+`. The score of a "
        "step is the probability of `+` as the first token of the assistant turn behind it."
    )


_TRANSFORMERS = """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, InternVLForConditionalGeneration

%stokenizer = AutoTokenizer.from_pretrained(directory)
model = InternVLForConditionalGeneration.from_pretrained(directory, dtype="float32").eval()
tiles = AutoImageProcessor.from_pretrained(directory)(Image.open(picture).convert("RGB"), return_tensors="pt")
image = "<img>" + "<IMG_CONTEXT>" * (%d * len(tiles.pixel_values)) + "</img>"
turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
scores = []
for step in steps:
    turns.append({"role": "user", "content": step})
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text.replace("<IMG_CONTEXT>", image), add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=tiles.pixel_values, logits_to_keep=1).logits[0, -1]
    scores.append(logits.softmax(-1)[tokenizer.convert_tokens_to_ids("+")].item())
    turns.append({"role": "assistant", "content": "+"})
print(scores)
"""


def _limits(source: Source, options: Any) -> str:
    points = ["It scores steps that others wrote; it was not trained to write any."]
    if options.dtype == "bfloat16":
        points.append(
            "The tensors were rounded to bfloat16 once: scores differ a little from those of the parameters that were "
            "trained, if these were float32."
        )
    if _is_embedded(source.config):
        points.append("It knows the pictures and words of noisy_steps alone, and is of no use outside that benchmark.")
    if source.config and not source.summary:
        points.append("The run that made it was not finished.")
    if not (source.summary or {}).get("best_of_n"):
        points.append("How well it scores was not measured by the run that made it.")
    return "## Limits\n\n" + "\n".join(f"- {point}" for point in points)
