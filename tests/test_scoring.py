"""Scores of chains that share what they begin with are those of every chain alone."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from dreamprm_jax import losses, scoring
from dreamprm_jax.data import batches, sharing
from dreamprm_jax.data.dataset import encode_all
from dreamprm_jax.data.example import GPT, HUMAN, Turn
from dreamprm_jax.errors import InputError
from dreamprm_jax.loading import Model
from dreamprm_jax.models import internvl, presets
from tests.test_batches import ROWS, SPEC, TOKENIZER, encode, png, text_only
from tests.test_sharing import chains_of_a_question

CONFIG = presets.InternVLConfig(
    vision=presets.VisionConfig(
        width=16, num_layers=2, num_heads=2, mlp_width=24, patch_size=7, image_size=28, layer_scale_init=0.5
    ),
    language=presets.LanguageConfig(
        vocab_size=TOKENIZER.vocab_size, width=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=40
    ),
)


@pytest.fixture(scope="module")
def model():
    params = internvl.init(CONFIG, jax.random.key(0))
    head = params["language"]["lm_head"]
    return Model(CONFIG, params | {"language": params["language"] | {"lm_head": 3 * head}}, TOKENIZER)


def late_image(row):
    """The image in the second step's turn, after the first score."""
    turns = [turn._replace(text=turn.text.replace("<image>", "")) for turn in row.turns]
    last = [number for number, turn in enumerate(turns) if turn.role == HUMAN][-1]
    turns[last] = turns[last]._replace(text="<image>" + turns[last].text)
    return row._replace(turns=tuple(turns))


def mixed_rows():
    """A question's chains, other questions, chains without image, of two images, with an image in a later turn."""
    first, second = ROWS.train[0], ROWS.train[1]
    two = first._replace(images=(*first.images, png(56, 28, 9)))
    two = two._replace(turns=(two.turns[0]._replace(text="<image>" + two.turns[0].text), *two.turns[1:]))
    rows = [*chains_of_a_question(7), second, text_only(first), text_only(second), two, late_image(first)]
    return [row._replace(row=number) for number, row in enumerate(rows)]


def alone(model, dataset, row):
    """P("+") by the forward pass that training takes, one chain in its own shape."""
    batch = batches.collate(dataset, [row])
    logits = internvl.apply(model.config, model.params, batch)
    plus, minus = TOKENIZER.plus_id, TOKENIZER.minus_id
    real = batch.step_mask[0]
    full, two_token = losses.step_scores(logits, plus), losses.step_scores_two_token(logits, plus, minus)
    return np.asarray(full)[0][real], np.asarray(two_token)[0][real]


@pytest.mark.parametrize(("batch_size", "part_tokens"), [(8, 4096), (3, 4096), (1, 4096), (8, 15)])
def test_scores_are_those_of_each_chain_alone(monkeypatch, model, batch_size, part_tokens):
    monkeypatch.setattr(sharing, "PART_TOKENS", part_tokens)
    dataset = encode(mixed_rows(), max_shapes=6)
    found = scoring.score_dataset(model, dataset, batch_size=batch_size, aggregate="min")
    assert len(found) == len(dataset) == 12
    seen = set()
    for row, scores in enumerate(found):
        full, two_token = alone(model, dataset, row)
        np.testing.assert_allclose(scores.full, full, rtol=1e-5)
        np.testing.assert_allclose(scores.two_token, two_token, rtol=1e-5)
        assert scores.response == pytest.approx(full.min(), rel=1e-5)
        seen |= set(np.round(full, 6).tolist())
    assert len(seen) > 12  # or there was nothing to tell apart


def test_a_question_runs_once(model, monkeypatch):
    """The vision tower and the prompt, whatever the number of candidates."""
    begun, parts = [], []
    begin, score_part = scoring.begin, scoring.score_part

    def noted_begin(config, params, prefix):
        begun.append(prefix.tiles.shape[:2])
        return begin(config, params, prefix)

    def noted_part(*arguments):
        parts.append(int(arguments[-1].chain.max()) + 1)
        return score_part(*arguments)

    monkeypatch.setattr(scoring, "begin", noted_begin)
    monkeypatch.setattr(scoring, "score_part", noted_part)
    dataset = encode(chains_of_a_question(20))
    found = scoring.score_dataset(model, dataset, batch_size=4, aggregate="mean")
    assert begun == [(1, 1)]
    assert parts == [4, 2]  # six chains, the others are copies
    assert len(found) == 20
    for row, scores in enumerate(found):
        assert scores.full.tolist() == found[row % 6].full.tolist()


def test_a_change_in_one_chain_reaches_no_other(model):
    rows = chains_of_a_question(6)
    turns = rows[2].turns
    changed = rows[2]._replace(turns=(turns[0], turns[1]._replace(text="1>4"), *turns[2:]))
    before, after = (
        scoring.score_dataset(model, encode(each), batch_size=8, aggregate="mean")
        for each in (rows, [*rows[:2], changed, *rows[3:]])
    )
    for number, (one, other) in enumerate(zip(before, after, strict=True)):
        if number == 2:
            assert abs(one.full[0] - other.full[0]) > 1e-4
        else:
            np.testing.assert_allclose(one.full, other.full, rtol=1e-5)


def test_an_accelerators_attention_gives_the_same(model, monkeypatch):
    """Its mask is one array; on a CPU it is looked at in blocks."""
    dataset = encode(mixed_rows(), max_shapes=6)
    (window,) = sharing.plan(dataset, 8, 3)
    batch = sharing.collate(dataset, window.batches[0])

    def logits():
        past = internvl.begin(CONFIG, model.params, batch.prefix)
        return internvl.go_on(CONFIG, model.params, past, batch.parts[0])[0]

    expected = jax.jit(logits)()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_allclose(jax.jit(lambda: logits())(), expected, atol=2e-5)


def test_fused_attention_takes_the_mask(model, monkeypatch):
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91_200)
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    config = dataclasses.replace(CONFIG, attention="cudnn", compute_dtype="bfloat16")
    dataset = encode(chains_of_a_question(5))
    (window,) = sharing.plan(dataset, 8, 1)
    batch = sharing.collate(dataset, window.batches[0])

    def logits(params, batch):
        return internvl.go_on(config, params, internvl.begin(config, params, batch.prefix), batch.parts[0])[0]

    program = str(jax.make_jaxpr(logits)(model.params, batch._replace(rows=(), num_steps=())))
    assert program.count("dot_product_attention_fwd_wrapper[") == 3  # the vision tower, the prefix, the continuations


def chains_of_many_lengths():
    """Two long questions, then two short ones, four chains each."""
    rng, steps = np.random.default_rng(0), ["4>3", "3>1", "4>2", "2>1", "1>2", "1>3"]
    rows = []
    for number in range(16):
        base = ROWS.train[number // 4]
        num_steps = int(rng.integers(1, 60 if number < 8 else 12))
        pairs = [(Turn(HUMAN, str(step)), Turn(GPT, "+")) for step in rng.choice(steps, num_steps)]
        rows.append(base._replace(row=number, turns=(base.turns[0], *itertools.chain(*pairs))))
    return rows


def test_what_is_left_is_scored_as_with_all_the_others(monkeypatch, model):
    """To the last bit: padding, which rounds differently, is chosen from all rows."""
    monkeypatch.setattr(sharing, "WINDOW", 8)
    dataset = encode_all(chains_of_many_lengths(), TOKENIZER, SPEC, context=1000, max_shapes=8)
    options = {"batch_size": 4, "aggregate": "mean"}
    whole = list(scoring.score_windows(model, dataset, **options))
    (left,) = scoring.score_windows(model, dataset, num_done=8, **options)
    assert [row for row, _ in left] == list(range(8, 16))
    for (row, scores), (other, expected) in zip(left, whole[1], strict=True):
        assert row == other
        np.testing.assert_array_equal(scores.full, expected.full)
    (last,) = sharing.plan(dataset, 4, 4)[1:]
    shapes_of_all = {shape for batch in last.batches for shape in batch.part_tokens}
    alone = encode_all(dataset.examples[8:], TOKENIZER, SPEC, context=1000, max_shapes=8)
    assert shapes_of_all != {shape for batch in sharing.plan(alone, 4, 4)[0].batches for shape in batch.part_tokens}
    assert not list(scoring.score_windows(model, dataset, num_done=16, **options))


def test_scores_alone_keep_no_keys_and_values(model):
    """They are many times larger, and nothing goes on from them."""
    (window,) = sharing.plan(encode(chains_of_a_question(5)), 8, 1)
    batch = sharing.collate(encode(chains_of_a_question(5)), window.batches[0])
    past = internvl.begin(CONFIG, model.params, batch.prefix)
    ids = TOKENIZER.plus_id, TOKENIZER.minus_id
    sizes = [
        program.lower(CONFIG, *ids, model.params, past, batch.parts[0]).compile().memory_analysis().output_size_in_bytes
        for program in (scoring.score_part, scoring.go_on)
    ]
    assert sizes[0] < 1000 < sizes[1]


def test_response_scores_by_hand():
    chains = [np.float32([0.5, 0.25]), np.float32([0.8])]
    expected = {
        "mean": (0.375, 0.8),
        "min": (0.25, 0.8),
        "last": (0.25, 0.8),
        "product": (0.125, 0.8),
        "sum_logprob": (np.log(0.125), np.log(0.8)),
        "sum_logit": (np.log(1 / 3), np.log(4)),
        "mean_odd": (2 / 3, 4),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(scoring.response_scores(chains, name), values, rtol=1e-5, err_msg=name)


def test_labels_in_the_text_are_all_plus_when_a_chain_is_judged():
    row = ROWS.train[0]
    mixed = row._replace(turns=tuple(turn._replace(text="-") if turn.role == GPT else turn for turn in row.turns))
    assert {turn.text for turn in scoring.with_plus_history(mixed).turns if turn.role == GPT} == {"+"}


def test_the_embedded_spec_is_what_these_tests_take_it_for():
    assert SPEC.tokens_per_tile == CONFIG.image_tokens_per_tile and SPEC.tile_size == CONFIG.vision.image_size


def test_too_little_device_memory_names_the_prompt_and_what_takes_less(model, monkeypatch):
    def begin(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 85.45GiB")

    monkeypatch.setattr(scoring, "begin", begin)
    told = r"scoring \d+ prompts of \d+ tokens and \d tiles, .*--config.images.max_tiles.* The same command goes on"
    with pytest.raises(InputError, match=told):
        scoring.score_dataset(model, encode(mixed_rows(), max_shapes=6), batch_size=4, aggregate="mean")
