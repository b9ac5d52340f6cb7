"""A question as a chat message: where its images stand, how they go out, and prompts of one's own."""

import base64
import io

import pytest
from chat_server import picture
from PIL import Image

from dreamprm_jax import messages
from dreamprm_jax.data.example import Question
from dreamprm_jax.errors import InputError


def test_an_image_that_nobody_names_goes_first():
    question = Question(0, "q", "What is it?", "5", images=(picture(), picture()))
    assert messages.prompt_parts(question, messages.Prompts(open="{question}!")) == [0, 1, "What is it?!"]


@pytest.mark.parametrize(
    "stored, max_side, size",
    [(picture("BMP"), None, (4, 3)), (picture(size=(40, 20)), 10, (10, 5)), (picture("TIFF"), 100, (4, 3))],
)
def test_images_that_cannot_go_as_stored_go_as_png(stored, max_side, size):
    question = Question(0, "q", "?", "5", images=(stored,))
    (message,) = messages.chat_messages(question, messages.Prompts(), max_side)
    head, _, data = message["content"][0]["image_url"]["url"].partition(",")
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert (head, image.format, image.size) == ("data:image/png;base64", "PNG", size)
        assert image.getpixel((0, 0)) == (9, 8, 7)


def test_an_image_within_the_limit_is_not_touched():
    question = Question(0, "q", "?", "5", images=(picture("JPEG", (10, 20)),))
    (message,) = messages.chat_messages(question, messages.Prompts(), 20)
    assert message["content"][0]["image_url"]["url"].endswith(base64.b64encode(question.images[0]).decode())


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("{question} {option}", r"--config.generate.prompt: has \{question\}; .* has \{question\} and \{options\}"),
        ("{question} {options} {question}", "each once"),
        ("missing.txt", r"prompt=missing.txt: no text with \{question\} in it, and no readable file \(No such file"),
    ],
)
def test_prompts_that_lack_something_are_refused(prompt, message):
    with pytest.raises(InputError, match=message):
        messages.load_prompts(prompt, None)
    with pytest.raises(InputError, match=r"prompt_open: has \{question\}, \{options\}"):
        messages.load_prompts(None, "{question} {options}")
