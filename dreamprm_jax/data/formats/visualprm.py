"""VisualPRM-400K: rows of its conversation form and of its raw form (v1.1-Raw) -> Example.

Conversation form, labels decided when it was published:

    {"id": -1, "image", "conversations": [system, human, gpt "+" | "-", human, gpt, ...]}

Raw form, with what the rollouts from each step gave; other fields (answer, response, ...) are left alone:

    {"image", "question", "steps_with_score": [{"step", "score", "num_mc_correct"?, "num_mc_total"?}, ...]}

"image" is a path, a list of paths, or null. A raw row becomes the conversation that the published conversation form
has of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any

from dreamprm_jax.data.conversation import check_image_markers
from dreamprm_jax.data.example import GPT, HUMAN, MINUS, PLUS, SYSTEM, Example, Turn
from dreamprm_jax.data.fields import (
    check_row,
    check_turn_text,
    field_error,
    find_images,
    optional_text,
    required,
    shown,
)
from dreamprm_jax.data.formats.prompts import VISUALPRM_FIRST_STEP, VISUALPRM_SYSTEM
from dreamprm_jax.data.formats.rules import Rules
from dreamprm_jax.data.records import FileRules, parse_example

NO_ID = -1
"""What every published row says its id is."""

SCORE_TOLERANCE = 0.005
"""How far a score may be from num_mc_correct / num_mc_total: rounded to two digits."""

_RAW_FOLDER = "VisualPRM400K-v1.1-Raw/"
_NLVR2 = re.compile(r"images/train-[^/]*\.png")
_DERIVED = re.compile(r"_(extracted|pairs_vqa|prefix_pair|prm)(_.*)?$")
_NO_DOMAIN = re.compile(r"train(val)?\d*|en|zh|w|csv|\d+k|\d{8}")


def parse(row: Any, index: int, place: str, rules: Rules) -> Example:
    """A row of either form; its fields tell which.

    Args:
      row: the parsed JSON.
      index: its 0-based position, `Example.row`.
      place: begins messages ("ai2d.jsonl row 17").
      rules: of its file. `labels` is read for raw rows alone.

    Raises:
      InputError: a row that is not as it must be.
    """
    row = check_row(row, place, '"image" and "conversations" or "steps_with_score"')
    rules = rules._replace(find_image=_mapped(rules.find_image))
    if "steps_with_score" in row:
        return _parse_raw(row, index, place, rules)
    example = parse_example(row, index, place, FileRules(rules.find_image, rules.image_root))
    return example._replace(dataset=example.dataset or rules.dataset)


def domain(path: str) -> str:
    """The domain of an annotation file, from its name in small letters.

    The end that says how the file was derived is dropped (`_extracted`, `_pairs_vqa`, `_prefix_pair`, `_prm` and what
    follows), and so are words that say split, language, size and date:

    >>> domain("annotations/ai2d_train_12k_en_20240410_extracted_prm.jsonl")
    'ai2d'
    >>> domain("CLEVR_math_en_20240402_extracted.jsonl")
    'clevr_math'
    """
    stem = PurePath(path).name.split(".")[0].lower()
    words = _DERIVED.sub("", stem).split("_")
    return "_".join(word for word in words if word and not _NO_DOMAIN.fullmatch(word)) or stem


def image_name(name: str) -> str:
    """Where the image of a row lies in the unpacked data set: the folder `images/` is missing in its rows.

    >>> image_name("VisualPRM400K-v1.1-Raw/Geometry3K/train/1471/img_diagram.png")
    'images/Geometry3K/train/1471/img_diagram.png'
    >>> image_name("images/train-10171-0-img0.png")
    'images/nlvr2/images/train-10171-0-img0.png'
    """
    if name.startswith(_RAW_FOLDER):
        return "images/" + name.removeprefix(_RAW_FOLDER)
    return f"images/nlvr2/{name}" if _NLVR2.fullmatch(name) else name


def _mapped(find_image: Callable[[str], Path | None]) -> Callable[[str], Path | None]:
    return lambda name: find_image(image_name(name)) or find_image(f"images/{name}")


def conversation(question: str, steps: Sequence[str], labels: Sequence[str]) -> tuple[Turn, ...]:
    """The turns of the published conversation form: question and first step in one of them, later steps bare."""
    first = VISUALPRM_FIRST_STEP.format(question=question, step=steps[0])
    turns = [Turn(SYSTEM, VISUALPRM_SYSTEM)]
    for text, label in zip((first, *steps[1:]), labels, strict=True):
        turns += [Turn(HUMAN, text), Turn(GPT, label)]
    return tuple(turns)


def images_and_question(row: dict, place: str, rules: Rules) -> tuple[tuple[Path, ...], str]:
    """What a raw row asks about, and what.

    Raises:
      InputError: a field that is missing or not as it must be.
    """
    value = required(row, "image", place, "; write null for a row without image")
    images = find_images(value, place, rules.find_image, rules.image_root)
    return images, check_turn_text(required(row, "question", place), place, "question")


def _parse_raw(row: dict, index: int, place: str, rules: Rules) -> Example:
    if "conversations" in row:
        raise field_error(place, "steps_with_score", 'stands beside "conversations"; a row has one of them: remove one')
    images, question = images_and_question(row, place, rules)
    items = required(row, "steps_with_score", place)
    if not isinstance(items, list) or not items:
        raise field_error(place, "steps_with_score", f"is {shown(items)}; it must be a list of steps, and not empty")
    steps = [_step(item, place, f"steps_with_score[{number}]") for number, item in enumerate(items)]
    labels = [PLUS if score > rules.labels.threshold else MINUS for _, score in steps]
    turns = conversation(question, [text for text, _ in steps], labels)
    check_image_markers(turns, len(images), place)
    return Example(
        row=index,
        id=NO_ID,
        turns=turns,
        images=images,
        dataset=optional_text(row, "dataset", place) or rules.dataset,
        soft_labels=tuple(score for _, score in steps) if rules.labels.soft else None,
        place=place,
    )


def _step(item: Any, place: str, field: str) -> tuple[str, float]:
    """A step's text and its score, in [0, 1]."""
    if not isinstance(item, dict):
        raise field_error(place, field, f'is {shown(item)}; a step is an object with "step" and "score"')
    text = check_turn_text(item.get("step"), place, f"{field}.step")
    score = item.get("score")
    is_number = isinstance(score, int | float) and not isinstance(score, bool)
    if not is_number or not 0 <= score <= 1:  # no NaN either
        raise field_error(place, f"{field}.score", f"is {shown(score)}; it must be a number from 0 to 1")
    return text, _exact_score(item, float(score), place, field)


def _exact_score(item: dict, score: float, place: str, field: str) -> float:
    """right / all rollouts where they are given: not rounded. No rollouts (0 of 0): the score as it is."""
    right, total = item.get("num_mc_correct"), item.get("num_mc_total")
    if right is None and total is None:
        return score
    if not (type(right) is type(total) is int and 0 <= right <= total):
        problem = f"is {shown(right)} of {shown(total)} rollouts; both must be whole numbers, 0 <= correct <= total"
        raise field_error(place, f"{field}.num_mc_correct", problem)
    if total == 0:
        return score
    if abs(right / total - score) > SCORE_TOLERANCE:
        problem = f"is {shown(score)}, but {right} of {total} rollouts are right; correct one of them"
        raise field_error(place, f"{field}.score", problem)
    return right / total
