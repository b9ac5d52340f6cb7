"""The embedded benchmark: rendered boards, chains of look-ups, sources of different quality. numpy + tokenizers.

The picture is a board of four rooms (NW NE SW SE). Every room shows a small map of the board whose filled quarter
is the room that its door leads to, one of the three others, drawn independently. A question names the room to start
in and asks for the two rooms that one comes through: 9 possible answers. (With doors back into their own room
a wrong "NW>NW" would be followed by the true "NW>SE": a contradiction that needs no picture.)

    "enter:NW"      NW>SE / SE>SW      answer "SE SW"

A wrong step claims another room, each alike, so the text alone says nothing about right or wrong. A chain that has
gone wrong stays wrong: all its later steps are false as well. (Were they true look-ups from the wrong place, then
behind an all-"+" history they would look right, while the outcome asks for "-": flipped labels would serve the meta
loss.) A step is labelled "+" while the solution is right up to and including it, as in VisualPRM.

Training sources: `clean` has true labels; in `flipped` a share of the chains has the opposite verdict (a right chain
is given a first error at a random step, a wrong one is all "+"); `always_plus` says "+" to everything; `trivial`
repeats the question and is rightly all "+". Meta and test chains have the true answer's correctness only; the labels
in their turns are all "+", the history that a selector sees.

`pretrain` is the declared stand-in for what the real system starts from, a pretrained vision-language model: dialogues
about boards of their own that ask for a door ("NW>" -> "SE") or whether one is so ("NW>SE" -> "yes"), without
a single "+" or "-". A claim is one word of the vocabulary: with room, relation and value as words of their own a
model of this size did not learn to check in minutes.
"""

import struct
import zlib
from typing import NamedTuple

import numpy as np
import tokenizers

from dreamprm_jax.data.conversation import (
    END_OF_TEXT,
    HEADERS,
    IMAGE_CONTEXT,
    IMAGE_END,
    IMAGE_MARKER,
    IMAGE_START,
    SEPARATOR,
    TURN_END,
    TURN_START,
)
from dreamprm_jax.data.example import GPT, HUMAN, MINUS, PLUS, Example, Turn
from dreamprm_jax.errors import InputError

ROOMS = ("NW", "NE", "SW", "SE")
YES, NO = "yes", "no"
SOURCES = ("clean", "flipped", "always_plus", "trivial")

ROOM_SIZE = 14  # px
IMAGE_SIZE = 2 * ROOM_SIZE  # px
QUARTER = 5  # px: side of a quarter of a room's map
PAPER, INK = (240, 240, 232), (24, 24, 40)  # red, green, blue

NUM_STEPS = 2  # S, doors that a chain goes through

# The longest match wins, so a turn's header is one token here where the real tokenizer needs three: shorter rows.
SPECIAL_TOKENS = (
    *(END_OF_TEXT, TURN_START, TURN_END, SEPARATOR, *HEADERS.values()),
    *(IMAGE_START, IMAGE_END, IMAGE_CONTEXT),
)


class Sizes(NamedTuple):
    """Sizes and corruption rates. Changing one split leaves the others as they are, byte for byte.

    A rate is a probability per chain. `right_rate` is the share of right chains in the training sources and the cold
    start, `meta_right_rate` in the meta set; test candidates get theirs from each question's difficulty (see
    `_difficulty`). Half of the meta chains are right by default: where most are wrong, lowering every score lowers
    the meta loss, and the weights learn which label a row has instead of whether it is true (docs/bilevel.md).
    """

    pretrain: int = 8000  # dialogues of `pretrain_turns` look-ups each
    pretrain_turns: int = 2
    pretrain_check_rate: float = 0.5  # share of the turns that ask whether a door is so, not where it leads
    cold_start: int = 500  # chains with step labels
    cold_start_flip_rate: float = 0.0  # share of cold-start chains with the opposite verdict
    clean: int = 800  # training chains per source
    flipped: int = 900
    always_plus: int = 200
    trivial: int = 100
    flip_rate: float = 0.8  # share of the chains of `flipped` with the opposite verdict
    right_rate: float = 0.42
    early_error_rate: float = 0.8  # a wrong chain's first error is at step 0; else uniform over the later steps
    meta_questions: int = 50
    meta_candidates: int = 4  # chains per meta question
    meta_right_rate: float = 0.5  # share of right chains in the meta set
    test_questions: int = 500
    candidates: int = 8  # chains per test question
    common_error_rate: float = 0.2  # a wrong candidate makes the question's typical mistake


DEFAULT_SIZES = Sizes()

_NEVER_ALL_ZERO = (
    ("pretrain", "cold_start"), ("clean", "flipped", "always_plus", "trivial"),
    ("meta_questions",), ("meta_candidates",), ("test_questions",), ("candidates",),
)  # fmt: skip


class Question(NamedTuple):
    """A test question with its C candidates; `step_labels` is the truth, never seen by a model."""

    examples: tuple[Example, ...]  # [C]
    answers: tuple[str, ...]  # [C] final answers, for votes
    correct: tuple[bool, ...]  # [C]
    step_labels: tuple[tuple[str, ...], ...]  # [C][S] "+" | "-"


class Splits(NamedTuple):
    """Everything that one seed makes. `Example.row` counts from 0 in each split (test: over all candidates)."""

    pretrain: list[Example]
    cold_start: list[Example]
    train: list[Example]
    meta: list[Example]
    test: list[Question]


class _Board(NamedTuple):
    doors: dict[str, str]  # room -> the room behind its door
    png: bytes


class _Task(NamedTuple):
    board: _Board
    start: str

    @property
    def question(self) -> str:
        return f"enter:{self.start}"


class _Chain(NamedTuple):
    steps: tuple[str, ...]  # [S]
    labels: tuple[str, ...]  # [S] the truth
    answer: str


def make(seed: int, sizes: Sizes = DEFAULT_SIZES) -> Splits:
    """Make all splits from `seed`, the same bytes on every machine.

    Raises InputError where `sizes` cannot be used.
    """
    _check(sizes)
    rngs = [np.random.default_rng([seed, stream]) for stream in range(5)]
    return Splits(
        _pretrain(rngs[0], sizes),
        _cold_start(rngs[1], sizes),
        _train(rngs[2], sizes),
        _meta(rngs[3], sizes),
        _test(rngs[4], sizes),
    )


def tokenizer() -> tokenizers.Tokenizer:
    """A word-level tokenizer of the benchmark's own words; the template's markers are single tokens.

    An unknown word is an error of the caller, not a token: encoding it raises.
    """
    questions = [text for room in ROOMS for text in (f"enter:{room}", f"{room}>")]
    claims = [f"{room}>{target}" for room in ROOMS for target in ROOMS if target != room]
    words = [PLUS, MINUS, YES, NO, *ROOMS, *questions, *claims]
    vocab = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *words])}
    result = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unknown>"))
    result.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    result.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    return result


def _check(sizes: Sizes) -> None:
    for name, value in sizes._asdict().items():
        if name.endswith("_rate") and not 0.0 <= value <= 1.0:
            raise InputError(f"noisy_steps: {name} = {value!r} must lie in [0, 1]")
        if not name.endswith("_rate") and (not isinstance(value, int) or value < 0):
            raise InputError(f"noisy_steps: {name} = {value!r} must be a whole number >= 0")
    for names in _NEVER_ALL_ZERO:
        if not any(getattr(sizes, name) for name in names):
            raise InputError(f"noisy_steps: {' + '.join(names)} = 0 leaves a data set without rows: give at least 1")
    if not 1 <= sizes.pretrain_turns <= len(ROOMS):
        raise InputError(
            f"noisy_steps: pretrain_turns = {sizes.pretrain_turns} must lie in [1, {len(ROOMS)}]: one a room"
        )


# The splits.


def _pretrain(rng: np.random.Generator, sizes: Sizes) -> list[Example]:
    return [_dialogue(rng, row, sizes) for row in range(sizes.pretrain)]


def _dialogue(rng: np.random.Generator, row: int, sizes: Sizes) -> Example:
    board = _board(rng)
    turns = []
    for index in rng.permutation(len(ROOMS))[: sizes.pretrain_turns]:
        room, target = ROOMS[index], board.doors[ROOMS[index]]
        if rng.random() < sizes.pretrain_check_rate:
            right = rng.random() < 0.5
            claim = target if right else _other(rng, room, target)
            turns += [Turn(HUMAN, f"{room}>{claim}"), Turn(GPT, YES if right else NO)]
        else:
            turns += [Turn(HUMAN, f"{room}>"), Turn(GPT, target)]
    turns[0] = Turn(HUMAN, f"{IMAGE_MARKER}{turns[0].text}")
    return Example(row, f"pretrain_{row}", tuple(turns), (board.png,), dataset="pretrain", place=f"pretrain row {row}")


def _cold_start(rng: np.random.Generator, sizes: Sizes) -> list[Example]:
    makers = {"cold_start": lambda: _labelled(rng, sizes, sizes.cold_start_flip_rate)}
    return _numbered("cold_start", makers, ["cold_start"] * sizes.cold_start)


def _train(rng: np.random.Generator, sizes: Sizes) -> list[Example]:
    makers = {
        "clean": lambda: _labelled(rng, sizes, 0.0),
        "flipped": lambda: _labelled(rng, sizes, sizes.flip_rate),
        "always_plus": lambda: _always_plus(rng, sizes),
        "trivial": lambda: _trivial(rng),
    }
    counts = (sizes.clean, sizes.flipped, sizes.always_plus, sizes.trivial)
    sources = [source for source, count in zip(SOURCES, counts, strict=True) for _ in range(count)]
    return _numbered("train", makers, [sources[index] for index in rng.permutation(len(sources))])


def _numbered(split: str, makers: dict, sources: list[str]) -> list[Example]:
    rows = []
    for row, source in enumerate(sources):
        task, chain, labels = makers[source]()
        example = _example(split, row, task, chain, labels)
        rows.append(example._replace(dataset=source, corrupted=labels != chain.labels))
    return rows


def _meta(rng: np.random.Generator, sizes: Sizes) -> list[Example]:
    questions = [_question(rng, sizes, "meta", number, sizes.meta_candidates) for number in range(sizes.meta_questions)]
    return [example for question in questions for example in question.examples]


def _test(rng: np.random.Generator, sizes: Sizes) -> list[Question]:
    return [_question(rng, sizes, "test", number, sizes.candidates) for number in range(sizes.test_questions)]


# Chains.


def _task(rng: np.random.Generator) -> _Task:
    return _Task(_board(rng), _choice(rng, ROOMS))


def _solve(task: _Task) -> _Chain:
    """Go through the doors as the picture shows them."""
    targets, here = [], task.start
    for _ in range(NUM_STEPS):
        here = task.board.doors[here]
        targets.append(here)
    return _chain(task, targets, NUM_STEPS)


def _err(rng: np.random.Generator, task: _Task, num_right: int) -> _Chain:
    """`num_right` right steps, then wrong ones: any door that is not so, all alike."""
    targets, here = [], task.start
    for step in range(NUM_STEPS):
        door = task.board.doors[here]
        here = door if step < num_right else _other(rng, here, door)
        targets.append(here)
    return _chain(task, targets, num_right)


def _chain(task: _Task, targets: list[str], num_right: int) -> _Chain:
    rooms = [task.start, *targets[:-1]]
    steps = tuple(f"{room}>{target}" for room, target in zip(rooms, targets, strict=True))
    return _Chain(steps, _verdict(num_right), " ".join(targets))


def _verdict(num_right: int) -> tuple[str, ...]:
    return (PLUS,) * num_right + (MINUS,) * (NUM_STEPS - num_right)


def _error_step(rng: np.random.Generator, early_rate: float) -> int:
    """Where a chain goes wrong: mostly at the first door."""
    return 0 if rng.random() < early_rate else 1 + int(rng.integers(NUM_STEPS - 1))


def _other(rng: np.random.Generator, room: str, target: str) -> str:
    """A room that the door of `room` could lead to and does not, all alike."""
    return _choice(rng, tuple(other for other in ROOMS if other not in (room, target)))


def _labelled(rng: np.random.Generator, sizes: Sizes, flip_rate: float) -> tuple:
    task = _task(rng)
    error_step = _error_step(rng, sizes.early_error_rate)
    flip, right = rng.random() < flip_rate, rng.random() < sizes.right_rate
    chain = _solve(task) if right else _err(rng, task, error_step)
    if not flip:
        return task, chain, chain.labels
    return task, chain, _verdict(error_step if right else NUM_STEPS)


def _always_plus(rng: np.random.Generator, sizes: Sizes) -> tuple:
    task, chain, labels = _labelled(rng, sizes, 0.0)
    return task, chain, (PLUS,) * len(labels)


def _trivial(rng: np.random.Generator) -> tuple:
    task = _task(rng)
    chain = _Chain((task.question,) * NUM_STEPS, (PLUS,) * NUM_STEPS, "")
    return task, chain, chain.labels


def _question(rng: np.random.Generator, sizes: Sizes, split: str, number: int, num_candidates: int) -> Question:
    task = _task(rng)
    typical = _err(rng, task, _error_step(rng, sizes.early_error_rate))
    wrong_rate = _difficulty(rng) if split == "test" else 1.0 - sizes.meta_right_rate
    chains = []
    for _ in range(num_candidates):
        other = _err(rng, task, _error_step(rng, sizes.early_error_rate))
        wrong = typical if rng.random() < sizes.common_error_rate else other
        chains.append(wrong if rng.random() < wrong_rate else _solve(task))
    examples, correct = [], []
    for index, chain in enumerate(chains):
        row = number * num_candidates + index
        correct.append(MINUS not in chain.labels)
        example = _example(split, row, task, chain, (PLUS,) * len(chain.steps))
        examples.append(example._replace(true_false=correct[-1], dataset=split))
    return Question(
        tuple(examples),
        tuple(chain.answer for chain in chains),
        tuple(correct),
        tuple(chain.labels for chain in chains),
    )


def _difficulty(rng: np.random.Generator) -> float:
    """A question's share of wrong candidates: uniform on [0.45, 0.85], so about one candidate in three is right."""
    return 0.45 + 0.4 * rng.random()


def _example(split: str, row: int, task: _Task, chain: _Chain, labels: tuple[str, ...]) -> Example:
    turns = []
    for step, label in zip(chain.steps, labels, strict=True):
        turns += [Turn(HUMAN, step), Turn(GPT, label)]
    # The question and the first step share a turn, as in VisualPRM-400K.
    turns[0] = Turn(HUMAN, f"{IMAGE_MARKER}{task.question} {chain.steps[0]}")
    return Example(row, f"{split}_{row}", tuple(turns), (task.board.png,), place=f"{split} row {row}")


def _choice(rng: np.random.Generator, values: tuple[str, ...]) -> str:
    return values[int(rng.integers(len(values)))]


# Boards and their pictures.


def _board(rng: np.random.Generator) -> _Board:
    doors = (np.arange(len(ROOMS)) + rng.integers(1, len(ROOMS), size=len(ROOMS))) % len(ROOMS)
    return _Board({room: ROOMS[target] for room, target in zip(ROOMS, doors, strict=True)}, _png(_draw(doors)))


def _draw(doors: np.ndarray) -> np.ndarray:
    """The board as uint8 [IMAGE_SIZE, IMAGE_SIZE, 3]: in each room, the quarter that its door leads to."""
    pixels = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    pixels[:] = PAPER
    for room, target in enumerate(doors):
        top = ROOM_SIZE * (room // 2) + 1 + 7 * (target // 2)
        left = ROOM_SIZE * (room % 2) + 1 + 7 * (target % 2)
        pixels[top : top + QUARTER, left : left + QUARTER] = INK
    return pixels


def _png(pixels: np.ndarray) -> bytes:
    """An RGB PNG of uint8 [height, width, 3] with one stored block: no compressor whose bytes depend on its version."""
    height, width, _ = pixels.shape
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (1, 0))).tobytes()
    size = len(rows)
    stream = b"\x78\x01\x01" + struct.pack("<HH", size, size ^ 0xFFFF) + rows + struct.pack(">I", zlib.adler32(rows))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", stream), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
