"""Chains that begin alike are found, and packed so that nothing of them is lost."""

import itertools
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dreamprm_jax.data import sharing
from dreamprm_jax.data.example import GPT, HUMAN, Turn
from dreamprm_jax.data.images import count_tiles, image_size
from dreamprm_jax.data.records import FileRules, parse_example
from dreamprm_jax.data.sharing import Outline, find_groups
from dreamprm_jax.data.tokens import encode_many, load_tokenizer
from tests.test_batches import ROWS, encode, png, text_only
from tests.test_dataset import OnDisk


def chain(row, text, images=b"a", num_tiles=1, first_step=None):
    """A chain of one letter a token; its first step is scored at the last one, if not said."""
    tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    return Outline(row, tokens, images, num_tiles, len(text) - 1 if first_step is None else first_step)


def grouped(*chains):
    return {tuple(sorted(member.row for member in members)): prefix for members, prefix in find_groups(chains)}


def test_candidates_of_a_question_are_found_wherever_they_stand():
    chains = [chain(0, "asked1x"), chain(1, "other9y", b"b"), chain(2, "asked2y"), chain(3, "other8x", b"b")]
    assert grouped(*chains) == {(0, 2): 5, (1, 3): 5}


def test_what_is_scored_is_not_shared():
    assert grouped(chain(0, "same", first_step=2), chain(1, "same", first_step=2)) == {(0, 1): 2}
    assert grouped(chain(0, "same and more", first_step=4), chain(1, "same")) == {(0, 1): 3}


def test_other_images_are_never_shared():
    assert grouped(chain(0, "same text"), chain(1, "same text", b"b")) == {(0,): 8, (1,): 8}


def test_without_images_a_question_is_worth_more_than_a_prompt():
    prompt, texts = "p" * 20, ("a" * 30, "b" * 30)
    rows = [
        chain(4 * question + n, f"{prompt}{text}{n}.", b"", 0) for question, text in enumerate(texts) for n in range(4)
    ]
    assert grouped(*rows) == {(0, 1, 2, 3): 50, (4, 5, 6, 7): 50}
    single = [chain(n, f"{prompt}{n}{'abc'[n] * 30}.", b"", 0) for n in range(3)]
    assert grouped(*single) == {(0, 1, 2): 20}  # of questions with one chain each the prompt is all there is to share


def cuts(items):
    """All ways to cut a list into pieces."""
    if not items:
        yield []
    for count in range(1, len(items) + 1):
        yield from ([items[:count], *rest] for rest in cuts(items[count:]))


def saved(groups):
    total = 0
    for members in groups:
        prefix = min((sharing._common(a, b) for a, b in itertools.combinations(members, 2)), default=0)
        total += (len(members) - 1) * prefix
    return total


def test_no_other_cut_saves_more():
    rng = np.random.default_rng(0)
    for _ in range(100):
        chains = [chain(row, "".join(rng.choice(list("ab"), 6)) + ".", b"", 0) for row in range(5)]
        found = find_groups(chains)
        assert saved([members for members, _ in found]) == max(
            map(saved, cuts(sorted(chains, key=lambda chain: chain.tokens.tolist())))
        )
        for members, prefix in found:
            assert len({tuple(member.tokens[:prefix]) for member in members}) == 1
            assert prefix <= min(member.first_step for member in members)


def chains_of_a_question(count):
    """Chains of one and two steps after a common question turn, with one image."""
    row = ROWS.train[0]
    question, *_ = row.turns
    steps = ["4>3", "3>1", "4>2", "2>1", "1>2", "1>3"]
    rows = []
    for number in range(count):
        turns = (question, Turn(HUMAN, steps[number % 6]), Turn(GPT, "+"))
        if number % 2:
            turns += (Turn(HUMAN, steps[(number + 1) % 6]), Turn(GPT, "+"))
        rows.append(row._replace(row=number, turns=turns))
    return rows


def unpacked(batch):
    """{row: tokens} of a batch, prefix and continuation put together again; checks what must hold of every token."""
    found = {}
    for part, rows in zip(batch.parts, batch.rows, strict=True):
        for slot, chains in enumerate(rows):
            length = batch.prefix.length[slot]
            for number, row in enumerate(chains):
                own = np.flatnonzero(part.chain[slot] == number)
                assert np.array_equal(part.positions[slot, own], length + np.arange(len(own)))
                found[row] = np.concatenate([batch.prefix.tokens[slot, :length], part.tokens[slot, own]])
    return found


@pytest.mark.parametrize(("max_chains", "part_tokens"), [(8, 4096), (4, 4096), (3, 4096), (8, 15), (1, 4096)])
def test_every_chain_comes_once_with_all_its_tokens(monkeypatch, max_chains, part_tokens):
    """Also lists longer than a part, chains alone, and rows without images."""
    monkeypatch.setattr(sharing, "PART_TOKENS", part_tokens)
    rows = [*chains_of_a_question(7), *ROWS.train[1:6], text_only(ROWS.train[0])]
    dataset = encode([row._replace(row=number) for number, row in enumerate(rows)], max_shapes=4)
    (window,) = sharing.plan(dataset, max_chains, 4)
    assert window.copies == {6: 0}  # the first chain again
    found = {}
    for plan in window.batches:
        batch = sharing.collate(dataset, plan)
        assert batch.prefix.tokens.shape == (plan.size, plan.prefix.tokens)
        assert all(len(chains) <= max_chains for rows in batch.rows for chains in rows)
        assert sum(len(rows[0]) for rows in batch.rows) == len(plan.groups[0].rows)
        part = unpacked(batch)
        assert not set(part) & set(found)
        found |= part
    assert sorted({*found, *window.copies}) == list(range(len(rows)))
    for row, tokens in found.items():
        np.testing.assert_array_equal(tokens, dataset.encoded[row].tokens)


def test_step_positions_and_image_features_are_those_of_the_chain_alone():
    dataset = encode(chains_of_a_question(5), max_shapes=4)
    (window,) = sharing.plan(dataset, 8, 4)
    (batch,) = [sharing.collate(dataset, plan) for plan in window.batches]
    (part,), (rows,), (num_steps,) = batch.parts, batch.rows, batch.num_steps
    assert sorted(rows[0]) == [0, 1, 2, 3, 4]
    positions = iter(part.step_positions[0])
    for number, (row, count) in enumerate(zip(rows[0], num_steps[0], strict=True)):
        encoded = dataset.encoded[row]
        assert count == len(encoded.labels)
        at = np.array([next(positions) for _ in range(count)])
        np.testing.assert_array_equal(part.positions[0, at], encoded.step_positions)
        assert (part.chain[0, at] == number).all()
    index = batch.prefix.image_index[0]
    assert index[index >= 0].tolist() == list(range(4 * dataset.num_tiles[0]))  # every feature once, in order
    np.testing.assert_array_equal(batch.prefix.tiles[0, :1], dataset.load_tiles(0))


def test_rows_on_disk_are_grouped_alike(monkeypatch):
    rows = [*chains_of_a_question(5), ROWS.train[3]]
    rows = [row._replace(row=number) for number, row in enumerate(rows)]
    in_memory, on_disk = encode(rows, max_shapes=4), encode(OnDisk(rows), max_shapes=4)
    assert sharing.plan(on_disk, 4, 2) == sharing.plan(in_memory, 4, 2)


def test_windows_follow_the_rows(monkeypatch):
    monkeypatch.setattr(sharing, "WINDOW", 4)
    dataset = encode(chains_of_a_question(10))
    windows = sharing.plan(dataset, 8, 1)
    rows = [sorted(row for plan in window.batches for group in plan.groups for row in group.rows) for window in windows]
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [window.copies for window in windows] == [{}] * 3  # what another window holds is done again


def test_a_question_alone_has_no_padding_rows(monkeypatch):
    (((alone,), _),) = sharing.plan(encode(chains_of_a_question(1)), 8, 1)
    assert alone.size == 1
    (((one, *_), _),) = sharing.plan(encode(chains_of_a_question(3)), 8, 1)
    assert (one.size, len(one.groups)) == (1, 1)
    monkeypatch.setattr(sharing, "WINDOW", 3)  # windows of three questions and of one: the same program for both
    rows = [row._replace(row=number) for number, row in enumerate(ROWS.train[:4])]
    windows = sharing.plan(encode(rows), 8, 1)
    assert [[(len(plan.groups), plan.size) for plan in window.batches] for window in windows] == [[(3, 4)], [(1, 4)]]


def test_a_path_that_is_no_text_is_an_image_too():
    encoded = encode(chains_of_a_question(1)).encoded[0]
    one, other = (sharing.outline(encoded, [Path(os.fsdecode(name))], 0) for name in (b"\xff.png", b"\xfe.png"))
    assert one.images != other.images


def test_a_repeated_chain_is_run_once():
    rows = chains_of_a_question(3)
    rows = [*rows, rows[1], rows[1]._replace(images=(png(28, 28, 5),)), rows[1]]
    dataset = encode([row._replace(row=number) for number, row in enumerate(rows)])
    (window,) = sharing.plan(dataset, 8, 1)
    assert window.copies == {3: 1, 5: 1}
    assert sorted(row for plan in window.batches for group in plan.groups for row in group.rows) == [0, 1, 2, 4]


def test_an_image_of_another_content_is_another_image():
    one = sharing.outline(encode(chains_of_a_question(1)).encoded[0], [png(28, 28, 1)], 0)
    other = sharing.outline(encode(chains_of_a_question(1)).encoded[0], [png(28, 28, 2)], 1)
    assert find_groups([one, other])[0][0] != [one, other]
    assert sharing.outline(encode(chains_of_a_question(1)).encoded[0], [b"ab", b"c"], 0).images != (
        sharing.outline(encode(chains_of_a_question(1)).encoded[0], [b"a", b"bc"], 0).images
    )


def meta_chains(shared):
    """The published meta set's chains as a data set without pictures: of 30 real images, one by each question's id."""
    rows = json.loads((shared / "mmmu/meta_MMMU_Pro.json").read_text())
    tokenizer = load_tokenizer(shared / "tokenizer")
    sizes = [image_size(path, path.name) for path in sorted((shared / "mmmu/images").glob("*_*.png"))[:30]]
    find = FileRules(lambda name: Path(name), "images")
    chains = [parse_example({**row, "image": row["id"]}, n, "meta", find) for n, row in enumerate(rows)]
    tiles = [[count_tiles(*sizes[sum(row["id"].encode()) % len(sizes)], max_tiles=6)] for row in rows]
    encoded = encode_many(tokenizer, chains, tiles, 256)
    return SimpleNamespace(
        rows=np.arange(len(rows)),
        load_tokens=lambda row: (encoded[row], chains[row].images),
        num_labels=np.array([len(each.labels) for each in encoded]),
        questions=[row["id"] for row in rows],
    )


def test_the_published_meta_set(shared):
    """Its 414 questions of four are found, and docs/evaluation.md says how many programs 11 shapes make of them."""
    dataset = meta_chains(shared)
    outlines = [sharing.outline(*dataset.load_tokens(row), row) for row in dataset.rows.tolist()]
    groups = find_groups(outlines)
    assert [len(members) for members, _ in groups] == [4] * 414
    assert all(len({dataset.questions[chain.row] for chain in members}) == 1 for members, _ in groups)
    batches = [batch for window in sharing.plan(dataset, 8, 5) for batch in window.batches]
    prefixes = {(batch.prefix, batch.size) for batch in batches}
    parts = {(batch.prefix, batch.size, tokens) for batch in batches for tokens in batch.part_tokens}
    assert (len(prefixes), len(parts)) == (15, 32)
