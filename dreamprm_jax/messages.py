"""A question as a chat message: a prompt around it, its images where `<image n>` stands."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple

from PIL import Image

from dreamprm_jax.data.example import ImageSource, Question
from dreamprm_jax.data.images import image_format, image_size, open_image
from dreamprm_jax.errors import InputError

_FORM = """\
{question}

Solve the problem step by step. Write your response in exactly this form, with a blank line between steps:

[Reasoning]
1. (first step)

2. (next step)

Answer: X

"""

CHOICE_PROMPT = _FORM.replace("{question}", "{question}\n\nOptions:\n{options}") + (
    "with as many steps as the problem needs, each a sentence or a few that can be judged by themselves, and with the "
    "letter of the right option alone in place of X."
)
"""For questions with options."""

OPEN_PROMPT = _FORM + (
    "with as many steps as the problem needs, each a sentence or a few that can be judged by themselves, and with the "
    "final answer alone in place of X: a word, a name, or a number with its unit."
)
"""For open questions."""

_PLACEHOLDER = re.compile(r"\{(question|options)\}")
_IMAGE = re.compile(r"<image\s*(\d{1,3})>")
_SENT_AS_STORED = {"PNG": "image/png", "JPEG": "image/jpeg", "GIF": "image/gif", "WEBP": "image/webp"}


class Prompts(NamedTuple):
    """Templates with `{question}` and, for choices, `{options}`."""

    choice: str = CHOICE_PROMPT
    open: str = OPEN_PROMPT


def load_prompts(choice: str | None, open_question: str | None) -> Prompts:
    """The templates of `generate.prompt` and `generate.prompt_open`: text, a text file's path, or None for our own.

    Raises:
      InputError: a file that cannot be read, or a placeholder that is missing, given twice or out of place.
    """
    given = (
        ("prompt", choice, CHOICE_PROMPT, {"question", "options"}),
        ("prompt_open", open_question, OPEN_PROMPT, {"question"}),
    )
    return Prompts(*(_template(f"--config.generate.{name}", *rest) for name, *rest in given))


def _template(flag: str, value: str | None, default: str, wanted: set[str]) -> str:
    if value is None:
        return default
    text, name = value, flag
    if "{question}" not in value:
        name = f"{flag}={value}"
        try:
            text = Path(value).read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{name}: no text with {{question}} in it, and no readable file ({reason})") from error
    found = _PLACEHOLDER.findall(text)
    if sorted(found) != sorted(wanted):
        needed = " and ".join(f"{{{field}}}" for field in sorted(wanted, reverse=True))
        shown = ", ".join(f"{{{field}}}" for field in found) or "none"
        raise InputError(f"{name}: has {shown}; a prompt of this kind has {needed}, each once")
    return text


def prompt_parts(question: Question, prompts: Prompts) -> list[str | int]:
    """The prompt as text and image numbers (from 0), in order.

    An image stands where it is first mentioned; later mentions stay as text, and an image that nobody mentions goes
    before the text.
    """
    template = prompts.choice if question.options else prompts.open
    options = "\n".join(f"({letter}) {text}" for letter, text in zip(ascii_uppercase, question.options, strict=False))
    values = {"question": question.text.strip(), "options": options}
    text = _PLACEHOLDER.sub(lambda match: values[match[1]], template)  # in one pass: no second look at what came in
    parts: list[str | int] = []
    position, shown = 0, set()
    for match in _IMAGE.finditer(text):
        number = int(match[1]) - 1
        if number in shown or not 0 <= number < len(question.images):
            continue
        parts += [text[position : match.start()], number]
        position = match.end()
        shown.add(number)
    silent = [number for number in range(len(question.images)) if number not in shown]
    return [*silent, *(part for part in [*parts, text[position:]] if part != "")]


def chat_messages(question: Question, prompts: Prompts, max_side: int | None) -> list[dict[str, Any]]:
    """One user message. `max_side`: longer side of an image as sent, in pixels; None: as stored.

    Raises:
      InputError: an image that cannot be read.
    """
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": _data_url(question.images[part], max_side, question.place)}}
        for part in prompt_parts(question, prompts)
    ]
    return [{"role": "user", "content": content}]


def fingerprint(question: Question, prompts: Prompts, settings: dict[str, Any]) -> str:
    """16 hex digits over all that decides what is asked: prompt, content of the images, `settings` of the request."""
    parts = [
        part if isinstance(part, str) else hashlib.sha256(image_bytes(question.images[part])).hexdigest()
        for part in prompt_parts(question, prompts)
    ]
    return hashlib.sha256(json.dumps([parts, settings], sort_keys=True).encode()).hexdigest()[:16]


def check_images(question: Question) -> None:
    """Looks at every image's header.

    Raises:
      InputError: the first that is no image, or too large.
    """
    for source in question.images:
        image_size(source, question.place)


def image_bytes(source: ImageSource) -> bytes:
    """An image as stored."""
    return source if isinstance(source, bytes) else source.read_bytes()


def _data_url(source: ImageSource, max_side: int | None, place: str) -> str:
    """The stored bytes; PNG of the pixels where they are too large, or of a format that servers do not take."""
    content = image_bytes(source)
    width, height = image_size(content, place)
    kind = _SENT_AS_STORED.get(image_format(content, place))
    if kind is None or (max_side is not None and max(width, height) > max_side):
        kind, content = "image/png", _as_png(content, max_side, place)
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _as_png(content: bytes, max_side: int | None, place: str) -> bytes:
    image = open_image(content, place)
    if max_side is not None:
        image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
