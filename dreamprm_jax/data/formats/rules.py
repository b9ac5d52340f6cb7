"""What the rows of one raw file are read by, and what names a row whatever the order of the files."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dreamprm_jax.data.example import HUMAN, Example, ImageSource
from dreamprm_jax.data.records import find_image


class LabelRule(NamedTuple):
    """How the score of a step, the share of rollouts from it that end right, becomes its label."""

    threshold: float = 0.0  # "+" where the score is above it; 0: published, one right rollout is enough
    soft: bool = True  # also keep the score itself, as Example.soft_labels


class Rules(NamedTuple):
    """What the rows of one file are read by. `rules_for` makes them."""

    find_image: Callable[[str], Path | None]  # the image that a row's path means
    image_root: str | Path | None = None  # for messages
    labels: LabelRule = LabelRule()
    splitter: str = "whole_numbers"  # splitting.split_steps' rule, for whole responses
    dataset: str | None = None  # the domain of rows that name none: visualprm.domain(file)
    images_needed: bool = True  # False: paths are taken as they are written, and rows of questions may have none


def rules_for(image_root: str | Path | None, **fields) -> Rules:
    """Rules for images under a directory (`records.find_image`); `fields` are the others of Rules. Can be pickled."""
    if not fields.get("images_needed", True):
        return Rules(Path, image_root or ".", **fields)
    return Rules(functools.partial(find_image, image_root=image_root), image_root, **fields)


def content_id(example: Example, image_root: str | Path | None = None) -> str:
    """A name for what a row says, 16 hex digits: the same wherever the row stands and whatever its own id.

    It covers the text of the human turns (question and steps) and the images: by name where they are files, relative
    to `image_root` where they lie under it, else by content. Labels and prompts are left out: the raw and the
    conversation form of a row have one name, whatever the threshold.
    """
    steps = [turn.text for turn in example.turns if turn.role == HUMAN]
    content = json.dumps([steps, [_image_name(source, image_root) for source in example.images]])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _image_name(source: ImageSource, image_root: str | Path | None) -> str:
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    if image_root is not None and source.is_relative_to(image_root):
        source = source.relative_to(image_root)
    return source.as_posix()
