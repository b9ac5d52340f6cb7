"""A process reward model for those who embed it: scores of whole chains, and step-wise search.

>>> from dreamprm_jax import prm
>>> from dreamprm_jax.data import noisy_steps
>>> picture = noisy_steps.make(0).test[0].examples[0].images[0]
>>> scorer = prm.load(None, system=None, question_form="{question}")  # a fresh tiny model, in place of a checkpoint
>>> chain = scorer.score("dice:4", [picture], ["4>3", "3>1"])
>>> chain.full.shape  # P("+") after each step
(2,)

In a search, a question and its images are run once; every step goes on from there, and from the steps before it:

>>> question = scorer.start("dice:4", [picture])
>>> first, other = scorer.extend_many([(question, "4>3"), (question, "4>2")])  # two branches, one pass
>>> second = scorer.extend(first, "3>1")
>>> bool(abs(second.score - chain.full[1]) < 1e-5)  # of its last step
True
>>> len(second.step_scores)
2
"""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dreamprm_jax import losses, scoring
from dreamprm_jax.data import sharing
from dreamprm_jax.data.conversation import IMAGE_MARKER
from dreamprm_jax.data.dataset import ImageSpec, encode_all, read_tiles, tiles_of_images
from dreamprm_jax.data.example import GPT, HUMAN, PLUS, SYSTEM, Encoded, Example, ImageSource, Turn
from dreamprm_jax.data.fields import check_turn_text, field_error
from dreamprm_jax.data.formats.prompts import DREAMPRM_SYSTEM, QUESTION_HEADING
from dreamprm_jax.data.images import open_image
from dreamprm_jax.data.tokens import check_length, encode
from dreamprm_jax.errors import InputError
from dreamprm_jax.loading import Model, load_model
from dreamprm_jax.models.internvl import KeysValues, Past
from dreamprm_jax.scoring import ChainScores
from dreamprm_jax.types import Prefix

QUESTION_FORM = QUESTION_HEADING + "{question}"
"""The turn that the published code asks a question with."""

_ROOM = 512  # positions of a past are a multiple: each is a program to compile

Picture = str | Path | bytes | Image.Image
"""A file, the bytes of one, or a decoded image."""


class State(NamedTuple):
    """A question and the steps taken so far; it is never changed, so any number of branches may begin at it.

    It goes on with the model that made it alone, and holds the keys and values of all its tokens: for 2,500 tokens of
    InternVL3-1B 60 MiB in float32, half of it in bfloat16. A search does well to drop the states it has left behind.
    """

    example: Example
    tokens: np.ndarray  # int32 [T]: those that were run; the label of the last step is not yet
    past: Past  # of those tokens, B = 1
    step_scores: tuple[float, ...]  # P("+") over the full vocabulary, of each step
    step_scores_two_token: tuple[float, ...]  # P("+") over {"+", "-"}
    model: Model  # whose weights made it

    @property
    def score(self) -> float:
        """P("+") after the last step, over the full vocabulary.

        Raises:
          IndexError: there is no step yet.
        """
        return self.step_scores[-1]


def load(
    checkpoint: str | Path | None,
    *,
    tokenizer: str | Path | None = None,
    compute_dtype: str = "float32",
    param_dtype: str = "float32",
    max_tiles: int = 12,
    tile_budget: int | None = None,
    aggregate: str = "mean",
    batch_size: int = 8,
    system: str | None = DREAMPRM_SYSTEM,
    question_form: str = QUESTION_FORM,
) -> PRM:
    """Loads a process reward model from wherever it lies.

    Args:
      checkpoint: a directory in either InternVL layout, a Hub id, a workdir of ours, or None for a fresh tiny model.
      tokenizer: directory with tokenizer.json, or a Hub id, where it is not beside the weights.
      compute_dtype, param_dtype: "float32" or "bfloat16".
      max_tiles: of an image, without the thumbnail; 12 at test time in the published code.
      tile_budget: of a question, thumbnails included; None: no limit but the model's context.
      aggregate: step scores -> response score, one of `losses.AGGREGATIONS`.
      batch_size: chains at a time.
      system: the system turn; None for none.
      question_form: the question's turn, with `{question}` in it.

    Raises:
      InputError: names what is missing or does not fit.
    """
    _check_settings(aggregate, batch_size, max_tiles, question_form)
    if system is not None:
        check_turn_text(system, "prm.load", "system")
    settings = SimpleNamespace(
        checkpoint=None if checkpoint is None else str(checkpoint),
        tokenizer=tokenizer,
        compute_dtype=compute_dtype,
        param_dtype=param_dtype,
        attention="auto",
        remat="none",
        scan_unroll=None,
        trained="all",
    )
    model = load_model(settings, seed=0)
    vision = model.config.vision
    images = ImageSpec(max_tiles, vision.image_size, model.config.image_tokens_per_tile, tile_budget)
    return PRM(model, images, aggregate, batch_size, system, question_form)


@dataclasses.dataclass(frozen=True)
class PRM:
    """A loaded model and how it is asked. `load` makes one."""

    model: Model
    images: ImageSpec
    aggregate: str
    batch_size: int
    system: str | None
    question_form: str

    def score(self, question: str, images: Sequence[Picture], steps: Sequence[str]) -> ChainScores:
        """The scores of one chain of S steps; errors as those of `score_many`."""
        return self.score_many([(question, images, steps)])[0]

    def score_many(self, chains: Sequence[tuple[str, Sequence[Picture], Sequence[str]]]) -> list[ChainScores]:
        """The scores of chains (question, images, steps); what chains of a question share runs once.

        Raises:
          InputError: names the chain and what cannot be used: an image, a control token in a text, too long a chain.
        """
        if not chains:
            return []
        sources: dict[int, tuple[Picture, ImageSource]] = {}
        examples = [self._example(n, *chain, sources) for n, chain in enumerate(chains)]
        for example in examples:
            if not example.num_steps:
                raise InputError(f"{example.place}: has no steps; give one at least")
        context = self.model.config.language.max_positions
        dataset = encode_all(examples, self.model.tokenizer, self.images, context, max_shapes=4)
        return scoring.score_dataset(
            self.model, dataset, batch_size=self.batch_size, aggregate=self.aggregate, progress=False
        )

    def start(self, question: str, images: Sequence[Picture]) -> State:
        """Runs a question and its images.

        Raises:
          InputError: an image or text that cannot be used.
        """
        example = self._example(0, question, images, (), {})
        encoded = self._encode(example)
        tiles, count = read_tiles(example, self.images), len(encoded.tokens)
        prefix = Prefix(
            tokens=_padded(encoded.tokens, self.model.tokenizer.pad_id)[None],
            image_index=_padded(sharing.image_index(encoded), -1)[None],
            tiles=tiles[None],
            length=np.array([count], np.int32),
        )
        past = scoring.begin(self.model.config, self.model.params, prefix)
        return State(example, encoded.tokens, past._replace(features=past.features[:, :0]), (), (), self.model)

    def extend(self, state: State, step: str) -> State:
        """The state after one more step, with its `score`; errors as those of `extend_many`."""
        return self.extend_many([(state, step)])[0]

    def extend_many(self, branches: Sequence[tuple[State, str]]) -> list[State]:
        """The states after one more step each, `batch_size` of them in one pass; steps of one state share its past.

        Raises:
          InputError: a step that cannot be used.
          ValueError: a state of another model, whose past would be read with other weights.
        """
        if any(state.model is not self.model for state, _ in branches):
            raise ValueError("a state goes on with the model that made it: start the question with this one")
        longer = [_longer(state.example, step) for state, step in branches]
        steps = [
            _Step(state, new, self._next_tokens(state, new)) for (state, _), new in zip(branches, longer, strict=True)
        ]
        order = list(itertools.chain(*_by_state(steps)))
        extended: dict[int, State] = {}
        for start in range(0, len(order), self.batch_size):
            numbers = order[start : start + self.batch_size]
            extended |= zip(numbers, self._run([steps[number] for number in numbers]), strict=True)
        return [extended[number] for number in range(len(steps))]

    def _run(self, steps: Sequence[_Step]) -> list[State]:
        """The states after these steps, in one pass."""
        members = _by_state(steps)
        states = [steps[own[0]].state for own in members]
        chains = [
            [(steps[n].encoded, len(state.tokens)) for n in own] for state, own in zip(states, members, strict=True)
        ]
        lengths = [sum(len(chain.tokens) - start for chain, start in row) for row in chains]
        size = sharing.power_of_two(len(chains))
        part = sharing.pack(
            chains,
            size,
            max(32, sharing.power_of_two(max(lengths))),
            sharing.power_of_two(max(map(len, chains))),
            self.model.tokenizer.pad_id,
        )
        past = _stacked([state.past for state in states], size)
        ids = self.model.tokenizer.plus_id, self.model.tokenizer.minus_id
        full, two_token, keys_values = scoring.go_on(self.model.config, *ids, self.model.params, past, part)
        full, two_token = jax.device_get((full, two_token))
        extended: list[State | None] = [None] * len(steps)
        for row, (state, own) in enumerate(zip(states, members, strict=True)):
            start = 0
            for place, number in enumerate(own):
                _, example, encoded = steps[number]
                count = len(encoded.tokens) - len(state.tokens)
                extended[number] = State(
                    example=example,
                    tokens=encoded.tokens,
                    past=_appended(state.past, len(state.tokens), keys_values, row, start, count),
                    step_scores=(*state.step_scores, float(full[row, place])),
                    step_scores_two_token=(*state.step_scores_two_token, float(two_token[row, place])),
                    model=self.model,
                )
                start += count
        return extended

    def _example(
        self,
        number: int,
        question: str,
        images: Sequence[Picture],
        steps: Sequence[str],
        sources: dict[int, tuple[Picture, ImageSource]],
    ) -> Example:
        """A chain; `sources` are the pictures so far, by their id: one that many chains show is taken once."""
        place = f"chain {number}"
        turns = [] if self.system is None else [Turn(SYSTEM, self.system)]
        turns.append(Turn(HUMAN, self.question_form.format(question=check_turn_text(question, place, "question"))))
        shown = []
        for image in images:
            if id(image) not in sources:
                source = _source(image)
                open_image(source, place)
                sources[id(image)] = image, source  # the picture too, so that no other gets its id
            shown.append(sources[id(image)][1])
        example = Example(number, number, tuple(turns), tuple(shown), place=place)
        for step in steps:
            example = _longer(example, step)
        return example

    def _encode(self, example: Example) -> Encoded:
        num_tiles = tiles_of_images(example, self.images)
        encoded = encode(self.model.tokenizer, example, num_tiles, self.images.tokens_per_tile)
        check_length(encoded, self.model.config.language.max_positions, example.place)
        return encoded

    def _next_tokens(self, state: State, example: Example) -> Encoded:
        """The whole chain up to the position that its last step is scored at.

        Raises:
          ValueError: the tokenizer reads the steps before otherwise when one follows; no InternVL tokenizer does.
        """
        encoded = self._encode(example)
        last = encoded.step_positions[-1:]
        if not np.array_equal(encoded.tokens[: len(state.tokens)], state.tokens):
            raise ValueError(f"{example.place}: the tokens of a chain change when a step is added; score it whole")
        return encoded._replace(
            tokens=encoded.tokens[: last[0] + 1],
            image_mask=encoded.image_mask[: last[0] + 1],
            step_positions=last,
            labels=encoded.labels[-1:],
        )


def _check_settings(aggregate: str, batch_size: int, max_tiles: int, question_form: str) -> None:
    """What would fail, or be passed over, only once chains are scored.

    Raises:
      InputError: a value out of range.
    """
    if aggregate not in losses.AGGREGATIONS:
        raise InputError(f"aggregate={aggregate!r}: must be one of {', '.join(losses.AGGREGATIONS)}")
    for name, value in (("batch_size", batch_size), ("max_tiles", max_tiles)):
        if value < 1:
            raise InputError(f"{name}={value}: must be at least 1")
    try:
        asked = question_form.format(question="\0")
    except (LookupError, ValueError) as error:
        raise InputError(
            f"question_form={question_form!r}: {{question}} must be its one field; write other braces twice"
        ) from error
    if "\0" not in asked:
        raise InputError(f"question_form={question_form!r}: lacks {{question}}")


def _source(image: Picture) -> ImageSource:
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        image.convert("RGB").save(file, "PPM")  # as it is: to pack a photograph as PNG takes half a second
        return file.getvalue()
    return Path(image) if isinstance(image, str) else image


def _longer(example: Example, step: str) -> Example:
    text = check_turn_text(step, example.place, "step")
    if IMAGE_MARKER in text:
        raise field_error(example.place, "step", f"holds {IMAGE_MARKER}; images belong to the question")
    return example._replace(turns=(*example.turns, Turn(HUMAN, text), Turn(GPT, PLUS)))


class _Step(NamedTuple):
    """A step that is to be run."""

    state: State  # before it
    example: Example  # with it
    encoded: Encoded  # of `example`, up to the position that the step is scored at


def _by_state(steps: Sequence[_Step]) -> list[list[int]]:
    """The numbers of the steps of each state, states in the order that they come in."""
    found: dict[int, list[int]] = {}
    for number, step in enumerate(steps):
        found.setdefault(id(step.state), []).append(number)
    return list(found.values())


def _room(count: int) -> int:
    return -(-count // _ROOM) * _ROOM


def _padded(values: np.ndarray, fill: int) -> np.ndarray:
    return np.pad(values, (0, _room(len(values)) - len(values)), constant_values=fill)


def _stacked(pasts: Sequence[Past], size: int) -> Past:
    """Pasts of B = 1 as one of B = `size`, which the first one fills up."""
    pasts = [*pasts, *[pasts[0]] * (size - len(pasts))]
    if size == 1:
        return pasts[0]
    room = max(past.keys_values.keys.shape[2] for past in pasts)
    return Past(
        jax.tree.map(
            lambda *leaves: jnp.concatenate(leaves, axis=1), *[_with_room(past.keys_values, room) for past in pasts]
        ),
        jnp.concatenate([past.length for past in pasts]),
        jnp.concatenate([past.features for past in pasts]),
    )


def _with_room(keys_values: KeysValues, room: int) -> KeysValues:
    """[L, B, T, K, H] with T padded to `room`."""
    more = room - keys_values.keys.shape[2]
    pad = lambda leaf: jnp.pad(leaf, ((0, 0), (0, 0), (0, more), (0, 0), (0, 0)))  # noqa: E731
    return jax.tree.map(pad, keys_values) if more > 0 else keys_values


def _appended(past: Past, length: int, new: KeysValues, row: int, start: int, count: int) -> Past:
    """A past of `length` positions with `count` more: those from `start` on of a row of `new`."""
    kept = _with_room(past.keys_values, _room(length + count))
    keys_values = jax.tree.map(partial(_insert, length=length, row=row, start=start, count=count), kept, new)
    return Past(keys_values, jnp.array([length + count], jnp.int32), past.features)


@jax.jit
def _insert(
    kept: jax.Array, new: jax.Array, length: jax.Array, row: jax.Array, start: jax.Array, count: jax.Array
) -> jax.Array:
    place = jnp.arange(kept.shape[2]) - length  # [T]: of the new positions, where it is not negative
    taken = jnp.take(new, row, axis=1)[:, None]
    taken = jnp.take(taken, jnp.clip(start + place, 0, new.shape[2] - 1), axis=2)
    is_new = ((place >= 0) & (place < count))[None, None, :, None, None]
    return jnp.where(is_new, taken, kept)
