"""Made-up rows of the public data sets, as long and as odd as the real ones."""

import random

from dreamprm_jax.data.formats.prompts import VISUALPRM_FIRST_STEP, VISUALPRM_SYSTEM

WORDS = """
    the angle of triangle is equal to diagram shows that and we can see from image a line segment which option side
    total number value of given by chart bar label therefore so using formula area height base compare both figures
""".split()  # noqa: SIM905 - a list would be four times as long

MAX_STEPS = 12
"""Of a published row."""

ROLLOUTS = 16
"""From each step of a published row."""


def sentence(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choices(WORDS, k=num_words)).capitalize() + "."


def question(rng: random.Random, num_images: int) -> str:
    choices = "\n".join(f"{letter}. {sentence(rng, rng.randint(1, 6))}" for letter in "ABCD")
    asked = f"{sentence(rng, rng.randint(8, 40))}\n{choices}\nAnswer the question with the letter of the right choice."
    return "<image>\n" * num_images + asked


def steps(rng: random.Random) -> list[str]:
    """2 to 12 steps of about 45 words, the last one the final answer."""
    middle = []
    for number in range(1, rng.randint(2, MAX_STEPS)):
        title, text = sentence(rng, 4), sentence(rng, rng.randint(5, 60))
        middle.append(f"{number}. **{title}**\n   - {text}\n   - \\( x = {rng.random():.3f} \\)")
    return [*middle, f"Final answer: {rng.choice('ABCD')}"]


def visualprm_raw_row(rng: random.Random, image_name: str | list[str] | None) -> dict:
    """A row of VisualPRM400K-v1.1-Raw: right continuations fall off towards the end, as those of a real chain do."""
    chain, right = steps(rng), rng.randint(0, ROLLOUTS)
    scored = []
    for text in chain:
        right = max(0, min(ROLLOUTS, right + rng.randint(-4, 3)))
        scored.append({"step": text, "score": right / ROLLOUTS, "num_mc_correct": right, "num_mc_total": ROLLOUTS})
    asked = question(rng, _num_images(image_name))
    return {
        "image": image_name,
        "question": asked,
        "answer": rng.choice("ABCD"),
        "response": "\n\n".join(chain),
        "steps_with_score": scored,
        "num_mc_sequences": ROLLOUTS,
        "question_orig": asked.removeprefix("<image>\n"),
    }


def visualprm_conversation_row(rng: random.Random, image_name: str | list[str] | None) -> dict:
    """A row of VisualPRM400K-v1.1."""
    conversations = [{"from": "system", "value": VISUALPRM_SYSTEM}]
    for number, text in enumerate(steps(rng)):
        if number == 0:
            text = VISUALPRM_FIRST_STEP.format(question=question(rng, _num_images(image_name)), step=text)
        conversations += [{"from": "human", "value": text}, {"from": "gpt", "value": rng.choice("+++-")}]
    return {"id": -1, "image": image_name, "conversations": conversations}


def _num_images(image_name: str | list[str] | None) -> int:
    return len(image_name) if isinstance(image_name, list) else int(image_name is not None)
