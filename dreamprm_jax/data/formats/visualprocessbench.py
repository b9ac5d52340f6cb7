"""VisualProcessBench: chains whose steps people judged -> Example with the truth of each step.

    {"image": [...], "question", "response": {"steps": [str, ...], "process_correctness": [1 | -1 | 0, ...]},
     "data_source"}

Other fields (answer, policy_model) are left alone. `<image1>` in its questions is plain text: only `<image>` stands for
an image, and its rows have none, so that the images come first.
"""

from typing import Any

from dreamprm_jax.data.conversation import check_image_markers
from dreamprm_jax.data.example import PLUS, Example
from dreamprm_jax.data.fields import check_row, check_turn_text, field_error, optional_text, required, shown
from dreamprm_jax.data.formats.rules import Rules
from dreamprm_jax.data.formats.visualprm import conversation, images_and_question


def parse(row: Any, index: int, place: str, rules: Rules) -> Example:
    """A row as the conversation that VisualPRM-400K would make of it, every label "+", as when a chain is scored.

    Args:
      row: the parsed JSON.
      index: its 0-based position, `Example.row` and, as rows have none, its id.
      place: begins messages ("test.jsonl row 17").
      rules: where the images lie.

    Returns:
      Example with `step_truth` [S] (1 right, -1 wrong, 0 neutral) and the data source as `dataset`.

    Raises:
      InputError: a row that is not as it must be.
    """
    row = check_row(row, place, '"image", "question", "response"')
    images, question = images_and_question(row, place, rules)
    steps, truth = _judged_steps(required(row, "response", place), place)
    turns = conversation(question, steps, [PLUS] * len(steps))
    check_image_markers(turns, len(images), place)
    return Example(
        row=index,
        id=index,
        turns=turns,
        images=images,
        dataset=optional_text(row, "data_source", place) or rules.dataset,
        step_truth=truth,
        place=place,
    )


def _judged_steps(value: Any, place: str) -> tuple[list[str], tuple[int, ...]]:
    if not isinstance(value, dict):
        problem = f'is {shown(value)}; it must be an object with "steps" and "process_correctness"'
        raise field_error(place, "response", problem)
    steps, truth = value.get("steps"), value.get("process_correctness")
    if not isinstance(steps, list) or not steps:
        raise field_error(place, "response.steps", f"is {shown(steps)}; it must be a list of steps, and not empty")
    steps = [check_turn_text(step, place, f"response.steps[{number}]") for number, step in enumerate(steps)]
    field = "response.process_correctness"
    if not isinstance(truth, list) or len(truth) != len(steps):
        raise field_error(
            place, field, f"is {shown(truth)}; it must be a list of {len(steps)} numbers, one for each step"
        )
    for number, mark in enumerate(truth):
        if type(mark) is not int or mark not in (1, -1, 0):
            raise field_error(place, f"{field}[{number}]", f"is {shown(mark)}; it must be 1, -1 or 0 (neutral)")
    return steps, tuple(truth)
