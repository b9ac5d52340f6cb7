"""The embedded benchmark: pictured numbers, chains of look-ups, sources of different quality. numpy + tokenizers.

A picture has four cells, 1 2 / 3 4. Each shows a number in the picture's notation (`pictures`: filled quarters, dice,
bars, clocks, shapes, table rows), one of the three other cells, drawn independently. A question names the notation
and a cell to start in, "dice:4", and asks for the two cells that the numbers lead to in turn: 9 possible answers.
(Could a number name its own cell, a wrong "4>4" would be followed by the true "4>2": a contradiction that needs no
picture.)

    "dice:4"      4>3 / 3>1      answer "3 1"

A wrong step claims another number, each alike, so the text alone says nothing about right or wrong. A chain that has
gone wrong stays wrong: all its later steps are false as well. (Were they true look-ups from the wrong place, then
behind an all-"+" history they would look right, while the outcome asks for "-": flipped labels would serve the meta
loss.) A step is labelled "+" while the solution is right up to and including it, as in VisualPRM.

Training sources: `clean` has true labels; in `flipped` a share of the chains has the opposite verdict (a right chain
is given a first error where wrong chains have theirs, a wrong one is all "+"); `always_plus` says "+" to everything;
`trivial` repeats the question and is rightly all "+"; `shifted` has true labels on pictures of another style, light on
dark.
Meta and test chains have the true answer's correctness only; the labels in their turns are all "+", the history that
a selector sees.

`pretrain` is the declared stand-in for what the real system starts from, a pretrained vision-language model: dialogues
about pictures of their own that ask for a cell's number ("3>" -> "1") or whether one is so ("3>1" -> "yes"),
without a single "+" or "-". A claim is one word of the vocabulary: with cell, relation and value as words of their own
a model of this size did not learn to check in minutes.
"""

from typing import NamedTuple

import numpy as np
import tokenizers

from dreamprm_jax.data import pictures
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

CELLS = ("1", "2", "3", "4")
YES, NO = "yes", "no"
SOURCES = ("clean", "flipped", "always_plus", "trivial", "shifted")

NUM_STEPS = 2  # S, look-ups in a chain

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
    pretrain_check_rate: float = 0.5  # share of the turns that ask whether a number is so, not which it is
    pretrain_dark_rate: float = 0.25  # share of the pictures that are light on dark
    cold_start: int = 2000  # chains with step labels; the dialogues are seen along with them
    cold_start_flip_rate: float = 0.34  # share of cold-start chains with the opposite verdict
    clean: int = 1180  # training chains per source
    flipped: int = 1220
    always_plus: int = 120
    trivial: int = 60
    shifted: int = 150
    drop_corrupted: bool = False  # leave out what a perfect selection would: the upper reference
    flip_rate: float = 0.8  # share of the chains of `flipped` with the opposite verdict
    right_rate: float = 0.4
    early_error_rate: float = 0.8  # a wrong chain's first error is at step 0; else uniform over the later steps
    meta_questions: int = 200
    meta_candidates: int = 2  # chains per meta question
    meta_right_rate: float = 0.5  # share of right chains in the meta set
    test_questions: int = 500
    candidates: int = 8  # chains per test question
    common_error_rate: float = 0.2  # a wrong candidate makes the question's typical mistake


DEFAULT_SIZES = Sizes()

_NEVER_ALL_ZERO = (
    ("pretrain", "cold_start"), SOURCES,
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
    notation: str
    numbers: dict[str, str]  # cell -> the number in it, which names the next cell
    png: bytes


class _Task(NamedTuple):
    board: _Board
    start: str

    @property
    def question(self) -> str:
        return f"{self.board.notation}:{self.start}"


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
    questions = [f"{notation}:{cell}" for notation in pictures.NOTATIONS for cell in CELLS]
    look_ups = [f"{cell}>" for cell in CELLS]
    claims = [f"{cell}>{target}" for cell in CELLS for target in CELLS if target != cell]
    words = [PLUS, MINUS, YES, NO, *CELLS, *pictures.NOTATIONS, *questions, *look_ups, *claims]
    vocab = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *words])}
    result = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unknown>"))
    result.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    result.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    return result


def _check(sizes: Sizes) -> None:
    for name, value in sizes._asdict().items():
        if isinstance(value, bool):
            continue
        if name.endswith("_rate") and not 0.0 <= value <= 1.0:
            raise InputError(f"noisy_steps: {name} = {value!r} must lie in [0, 1]")
        if not name.endswith("_rate") and (not isinstance(value, int) or value < 0):
            raise InputError(f"noisy_steps: {name} = {value!r} must be a whole number >= 0")
    for names in _NEVER_ALL_ZERO:
        if not any(getattr(sizes, name) for name in names):
            raise InputError(f"noisy_steps: {' + '.join(names)} = 0 leaves a data set without rows: give at least 1")
    if not 1 <= sizes.pretrain_turns <= len(CELLS):
        raise InputError(
            f"noisy_steps: pretrain_turns = {sizes.pretrain_turns} must lie in [1, {len(CELLS)}]: one a cell"
        )


# The splits.


def _pretrain(rng: np.random.Generator, sizes: Sizes) -> list[Example]:
    return [_dialogue(rng, row, sizes) for row in range(sizes.pretrain)]


def _dialogue(rng: np.random.Generator, row: int, sizes: Sizes) -> Example:
    board = _board(rng, dark=rng.random() < sizes.pretrain_dark_rate)
    turns = []
    for index in rng.permutation(len(CELLS))[: sizes.pretrain_turns]:
        cell, target = CELLS[index], board.numbers[CELLS[index]]
        if rng.random() < sizes.pretrain_check_rate:
            right = rng.random() < 0.5
            claim = target if right else _other(rng, cell, target)
            turns += [Turn(HUMAN, f"{cell}>{claim}"), Turn(GPT, YES if right else NO)]
        else:
            turns += [Turn(HUMAN, f"{cell}>"), Turn(GPT, target)]
    turns[0] = Turn(HUMAN, f"{IMAGE_MARKER}{board.notation} {turns[0].text}")
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
        "shifted": lambda: _labelled(rng, sizes, 0.0, dark=True),
    }
    sources = [source for source in SOURCES for _ in range(getattr(sizes, source))]
    rows = _numbered("train", makers, [sources[index] for index in rng.permutation(len(sources))])
    if sizes.drop_corrupted:
        rows = [row for row in rows if not row.corrupted]
    return [example._replace(row=row) for row, example in enumerate(rows)]


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


def _task(rng: np.random.Generator, *, dark: bool = False) -> _Task:
    return _Task(_board(rng, dark=dark), _choice(rng, CELLS))


def _solve(task: _Task) -> _Chain:
    """Follow the numbers as the picture shows them."""
    targets, here = [], task.start
    for _ in range(NUM_STEPS):
        here = task.board.numbers[here]
        targets.append(here)
    return _chain(task, targets, NUM_STEPS)


def _err(rng: np.random.Generator, task: _Task, num_right: int) -> _Chain:
    """`num_right` right steps, then wrong ones: any number that is not so, all alike."""
    targets, here = [], task.start
    for step in range(NUM_STEPS):
        number = task.board.numbers[here]
        here = number if step < num_right else _other(rng, here, number)
        targets.append(here)
    return _chain(task, targets, num_right)


def _chain(task: _Task, targets: list[str], num_right: int) -> _Chain:
    cells = [task.start, *targets[:-1]]
    steps = tuple(f"{cell}>{target}" for cell, target in zip(cells, targets, strict=True))
    return _Chain(steps, _verdict(num_right), " ".join(targets))


def _verdict(num_right: int) -> tuple[str, ...]:
    return (PLUS,) * num_right + (MINUS,) * (NUM_STEPS - num_right)


def _error_step(rng: np.random.Generator, early_rate: float) -> int:
    """Where a chain goes wrong: mostly at the first number."""
    return 0 if rng.random() < early_rate else 1 + int(rng.integers(NUM_STEPS - 1))


def _other(rng: np.random.Generator, cell: str, target: str) -> str:
    """A number that `cell` could show and does not, all alike."""
    return _choice(rng, tuple(other for other in CELLS if other not in (cell, target)))


def _labelled(rng: np.random.Generator, sizes: Sizes, flip_rate: float, *, dark: bool = False) -> tuple:
    task = _task(rng, dark=dark)
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


def _board(rng: np.random.Generator, *, dark: bool = False) -> _Board:
    notation = _choice(rng, tuple(pictures.NOTATIONS))
    values = (np.arange(len(CELLS)) + rng.integers(1, len(CELLS), size=len(CELLS))) % len(CELLS)
    png = pictures.encode_png(pictures.draw(rng, notation, values, dark=dark))
    return _Board(notation, {cell: CELLS[value] for cell, value in zip(CELLS, values, strict=True)}, png)
