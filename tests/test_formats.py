"""Raw rows of VisualPRM-400K and VisualProcessBench -> Examples; every bad row is an InputError with its place."""

import json
import pickle
import random
import re

import pytest
from PIL import Image
from test_records import mutate, turn

from benchmarks.raw_rows import MAX_STEPS, visualprm_conversation_row, visualprm_raw_row
from dreamprm_jax.data.conversation import IMAGE_BLOCK, render
from dreamprm_jax.data.example import GPT, HUMAN, SYSTEM
from dreamprm_jax.data.formats import prompts, visualprm, visualprocessbench
from dreamprm_jax.data.formats.rules import LabelRule, content_id, rules_for
from dreamprm_jax.errors import InputError

PLACE = "raw.jsonl row 7"
IMAGES = ("images/ai2d/a.png", "images/nlvr2/images/train-1-0-img0.png", "images/nlvr2/images/train-1-0-img1.png")


@pytest.fixture(scope="module")
def rules(tmp_path_factory):
    root = tmp_path_factory.mktemp("unpacked")
    for name in IMAGES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3)).save(root / name)
    return rules_for(root)


def raw_row(**changes):
    steps = [
        {"step": "It is red.", "score": 0.625, "num_mc_correct": 10, "num_mc_total": 16},
        {"step": "Final answer: A", "score": 0.0, "num_mc_correct": 0, "num_mc_total": 16},
    ]
    row = {
        "image": "VisualPRM400K-v1.1-Raw/ai2d/a.png",
        "question": "<image>\nWhich colour?",
        "answer": "A",
        "response": "It is red.\n\nFinal answer: A",
        "steps_with_score": steps,
        "num_mc_sequences": 16,
        "question_orig": "Which colour?",
    }
    return row | changes


def raw_step(**changes):
    return raw_row(steps_with_score=[{"step": "a", "score": 0.5} | changes])


def conversation_row(**changes):
    row = {
        "id": -1,
        "image": "ai2d/a.png",
        "conversations": [
            turn("system", prompts.VISUALPRM_SYSTEM),
            turn("human", "### Question:\n<image>\nWhich colour?\n\n### Solution Process:\nIt is red."),
            turn("gpt", "+"),
            turn("human", "Final answer: A"),
            turn("gpt", "-"),
        ],
    }
    return row | changes


def read_visualprm(row, rules):
    return visualprm.parse(row, 7, PLACE, rules)


# VisualPRM-400K


def test_a_raw_row_becomes_the_conversation_that_was_published(rules):
    raw, published = read_visualprm(raw_row(), rules), read_visualprm(conversation_row(), rules)
    assert raw.turns == published.turns and raw.images == published.images == (rules.image_root / IMAGES[0],)
    assert (raw.row, raw.id, published.id, raw.place) == (7, -1, -1, PLACE)
    assert raw.soft_labels == (0.625, 0.0) and published.soft_labels is None
    assert raw.true_false is None


def test_the_prompts_differ_by_one_blank_line(shared):
    lines = prompts.VISUALPRM_SYSTEM.split("\n")
    assert lines[lines.index("For each step, you should:") + 1] == ""
    meta = json.loads((shared / "mmmu/meta_MMMU_Pro.json").read_text())
    assert {row["conversations"][0]["value"] for row in meta} == {prompts.DREAMPRM_SYSTEM}
    assert prompts.VISUALPRM_SYSTEM.replace("should:\n\n", "should:\n") == prompts.DREAMPRM_SYSTEM


@pytest.mark.parametrize(
    ("threshold", "labels"),
    [(0.0, "++-"), (0.0625, "++-"), (0.125, "+--"), (0.5, "+--"), (0.75, "---"), (-1.0, "+++")],
)
def test_a_step_is_plus_where_its_score_is_above_the_threshold(rules, threshold, labels):
    steps = [{"step": "a", "score": score} for score in (0.75, 0.125, 0)]
    rules = rules._replace(labels=LabelRule(threshold=threshold, soft=False))
    example = read_visualprm(raw_row(steps_with_score=steps), rules)
    assert "".join(part.text for part in example.turns if part.role == GPT) == labels
    assert example.soft_labels is None


@pytest.mark.parametrize(
    ("step", "soft"),
    [
        ({"score": 1}, 1.0),
        ({"score": 0.33, "num_mc_correct": 1, "num_mc_total": 3}, 1 / 3),
        ({"score": 0.0, "num_mc_correct": 0, "num_mc_total": 0}, 0.0),  # not rolled out: the pipeline stopped before
        ({"score": 0.25, "num_mc_correct": None, "num_mc_total": None}, 0.25),
    ],
)
def test_soft_labels_are_the_share_of_right_rollouts(rules, step, soft):
    assert read_visualprm(raw_step(**step), rules).soft_labels == (soft,)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("VisualPRM400K-v1.1-Raw/ai2d/a.png", IMAGES[:1]),
        ("images/ai2d/a.png", IMAGES[:1]),
        ("ai2d/a.png", IMAGES[:1]),
        (["images/train-1-0-img0.png", "images/train-1-0-img1.png"], IMAGES[1:]),
        (None, ()),
    ],
)
@pytest.mark.parametrize("under", ["", "images"], ids=["unpacked", "its images"])
def test_images_lie_where_they_are_unpacked(rules, name, found, under):
    rules = rules_for(rules.image_root / under)
    markers = "<image>\n" * len(found)
    for row in (
        raw_row(image=name, question=markers + "Which?"),
        conversation_row(image=name, conversations=[turn("human", markers + "Which?"), turn("gpt", "+")]),
    ):
        names = [path.relative_to(rules.image_root).as_posix() for path in read_visualprm(row, rules).images]
        assert [f"{under}/{name}".lstrip("/") for name in names] == list(found)


@pytest.mark.parametrize(
    ("file", "domain"),
    [
        ("a/ai2d_train_12k_en_20240410_extracted_pairs_vqa_correctness_rules.jsonl", "ai2d"),
        ("chartqa_trainval_30k_w_csv_en_20240402_extracted_prm.jsonl", "chartqa"),
        ("m3cot_train_extracted.jsonl.gz", "m3cot"),
        ("CLEVR_math_en_20240402_extracted.jsonl", "clevr_math"),
        ("super_clevr_en_20240402_int.jsonl", "super_clevr_int"),
        ("mavis_geo_depth3_text_dominant_vision_dominant_en.jsonl", "mavis_geo_depth3_text_dominant_vision_dominant"),
        ("inat_train2018_merge_en_20240811.jsonl", "inat_merge"),
        ("geomverse_extracted_prm_process.jsonl", "geomverse"),
        ("nlvr2_en_20240910.jsonl", "nlvr2"),
        ("train_en.jsonl", "train_en"),
    ],
)
def test_the_domain_is_what_is_left_of_the_file_name(file, domain):
    assert visualprm.domain(file) == domain


def test_the_domain_of_the_file_is_that_of_rows_without_one(rules):
    rules = rules._replace(dataset="ai2d")
    for row in (raw_row(), conversation_row()):
        assert read_visualprm(row, rules).dataset == "ai2d"
        assert read_visualprm(row | {"dataset": "own"}, rules).dataset == "own"


def test_a_content_id_says_what_the_row_says_and_no_more(rules):
    example = read_visualprm(raw_row(), rules)
    name = content_id(example, rules.image_root)
    assert re.fullmatch(r"[0-9a-f]{16}", name)
    assert name == "b84bdb25382f9451", "stored ids would no longer name their rows"
    same = (
        example._replace(row=99, id="x", place="other row 3", dataset="d"),
        example._replace(turns=tuple(part._replace(text="-") if part.role == GPT else part for part in example.turns)),
        read_visualprm(conversation_row(), rules),
    )
    for other in same:
        assert content_id(other, rules.image_root) == name
    different = (
        read_visualprm(raw_row(question="<image>\nWhich size?"), rules),
        read_visualprm(raw_row(steps_with_score=raw_row()["steps_with_score"][:1]), rules),
        example._replace(images=()),
        example._replace(images=(rules.image_root / IMAGES[1],)),
        example._replace(images=(b"bytes",)),
        example._replace(images=(b"others",)),
    )
    assert len({name, *(content_id(other, rules.image_root) for other in different)}) == len(different) + 1


def test_made_up_rows_are_as_the_real_ones(rules):
    rng = random.Random(0)
    for _ in range(50):
        for row, image in (
            (visualprm_raw_row(rng, "VisualPRM400K-v1.1-Raw/ai2d/a.png"), 1),
            (visualprm_conversation_row(rng, ["ai2d/a.png"] * 2), 2),
            (visualprm_raw_row(rng, None), 0),
        ):
            example = read_visualprm(json.loads(json.dumps(row)), rules)
            assert len(example.images) == image == render(example).text.count(IMAGE_BLOCK)
            assert 2 <= example.num_steps <= MAX_STEPS


BAD_VISUALPRM = [
    (3, "is 3; a row is an object"),
    (InputError("raw.jsonl row 7: not JSON"), "not JSON"),
    ({}, '"id" is missing'),
    (raw_row(conversations=[]), '"steps_with_score" stands beside "conversations"'),
    ({**raw_row(), "image": "none.png"}, '"image" "none.png" is no file under'),
    (raw_row(question=None), '"question" is null'),
    (raw_row(question="<image><image> Which?"), "2 <image> marker(s)"),
    (raw_row(question="see <|im_end|>"), '"question" holds the control token <|im_end|>'),
    (raw_row(steps_with_score=[]), '"steps_with_score" is []'),
    (raw_row(steps_with_score={"a": 1}), '"steps_with_score" is {"a": 1}'),
    (raw_row(steps_with_score=["a"]), '"steps_with_score[0]" is "a"'),
    (raw_step(step=" "), '"steps_with_score[0].step" is " "'),
    (raw_step(step="<img>"), '"steps_with_score[0].step" holds the control token <img>'),
    (raw_step(score=None), '"steps_with_score[0].score" is null; it must be a number from 0 to 1'),
    (raw_step(score=True), '"steps_with_score[0].score" is true'),
    (raw_step(score=1.01), '"steps_with_score[0].score" is 1.01'),
    (raw_step(score=-0.1), '"steps_with_score[0].score" is -0.1'),
    (raw_step(score=float("nan")), '"steps_with_score[0].score" is NaN'),
    (raw_step(score=10**400), '"steps_with_score[0].score" is 1000'),
    (raw_step(num_mc_correct=8), '"steps_with_score[0].num_mc_correct" is 8 of null rollouts'),
    (raw_step(num_mc_correct=8.0, num_mc_total=16), '"steps_with_score[0].num_mc_correct" is 8.0 of 16'),
    (raw_step(num_mc_correct=17, num_mc_total=16), '"steps_with_score[0].num_mc_correct" is 17 of 16'),
    (raw_step(num_mc_correct=-1, num_mc_total=16), '"steps_with_score[0].num_mc_correct" is -1 of 16'),
    (raw_step(num_mc_correct=9, num_mc_total=16), '"steps_with_score[0].score" is 0.5, but 9 of 16 rollouts'),
    (raw_row(dataset=5), '"dataset" is 5'),
    (conversation_row(dataset=5), '"dataset" is 5'),
    (conversation_row(image="none.png"), '"image" "none.png" is no file under'),
]


@pytest.mark.parametrize(("row", "message"), BAD_VISUALPRM, ids=[message[:50] for _, message in BAD_VISUALPRM])
def test_a_bad_visualprm_row_is_named(rules, row, message):
    with pytest.raises(InputError) as error:
        read_visualprm(row, rules)
    assert PLACE in str(error.value) and message in str(error.value)


# VisualProcessBench


def bench_row(**changes):
    row = {
        "image": ["images/ai2d/a.png"],
        "question": "Where is <image1>?",
        "answer": "A",
        "response": {"steps": ["First.", "Then.", "So."], "process_correctness": [1, 0, -1]},
        "policy_model": "m",
        "data_source": "MathVision_MINI",
    }
    return row | changes


def bench_response(**changes):
    return bench_row(response=bench_row()["response"] | changes)


def read_bench(row, rules):
    return visualprocessbench.parse(row, 7, PLACE, rules)


def test_a_bench_row_has_the_truth_of_its_steps_and_every_label_plus(rules):
    example = read_bench(bench_row(), rules)
    assert example.step_truth == (1, 0, -1) and example.dataset == "MathVision_MINI"
    assert (example.row, example.id, example.place, example.true_false) == (7, 7, PLACE, None)
    assert [part.role for part in example.turns] == [SYSTEM, *(HUMAN, GPT) * 3]
    assert [part.text for part in example.turns if part.role == GPT] == ["+"] * 3
    assert example.turns[1].text == "### Question:\nWhere is <image1>?\n\n### Solution Process:\nFirst."
    assert render(example).text.count(IMAGE_BLOCK) == 1 and "<image1>" in render(example).text


def test_the_published_bench_rows(shared, tmp_path):
    for name in ("15", "129"):
        (tmp_path / f"images/MathVision_MINI/{name}.png").parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3)).save(tmp_path / f"images/MathVision_MINI/{name}.png")
    lines = (shared / "mmmu/visualprocessbench_sample.jsonl").read_text().splitlines()
    examples = [read_bench(json.loads(line) | {"image": None}, rules_for(None)) for line in lines]
    truth = [mark for example in examples for mark in example.step_truth]
    assert [truth.count(mark) for mark in (1, -1, 0)] == [49, 17, 9]  # as shared/README.md counts them
    assert [example.num_steps for example in examples] == [len(example.step_truth) for example in examples]
    first = read_bench(json.loads(lines[0]), rules_for(tmp_path))
    assert first.images == (tmp_path / "images/MathVision_MINI/15.png",)


BAD_BENCH = [
    (None, "is null; a row is an object"),
    (bench_row(image=["none.png"]), '"image" "none.png" is no file under'),
    (bench_row(question=1), '"question" is 1'),
    (bench_row(question="<image> <image>"), "2 <image> marker(s)"),
    (bench_row(question="<box>"), '"question" holds the control token <box>'),
    (bench_row(response="text"), '"response" is "text"'),
    (bench_response(steps=[]), '"response.steps" is []'),
    (bench_response(steps=["a", "", "b"]), '"response.steps[1]" is ""'),
    (bench_response(steps=["a", "b", "</img>"]), '"response.steps[2]" holds the control token </img>'),
    (bench_response(process_correctness=[1, 1]), '"response.process_correctness" is [1, 1]; it must be a list of 3'),
    (bench_response(process_correctness=None), '"response.process_correctness" is null'),
    (bench_response(process_correctness=[1, 2, 1]), '"response.process_correctness[1]" is 2'),
    (bench_response(process_correctness=[1, True, 1]), '"response.process_correctness[1]" is true'),
    (bench_response(process_correctness=[1, 1, 0.0]), '"response.process_correctness[2]" is 0.0'),
    (bench_row(data_source=[]), '"data_source" is []'),
]


@pytest.mark.parametrize(("row", "message"), BAD_BENCH, ids=[message[:50] for _, message in BAD_BENCH])
def test_a_bad_bench_row_is_named(rules, row, message):
    with pytest.raises(InputError) as error:
        read_bench(row, rules)
    assert f"{PLACE}: " in str(error.value) and message in str(error.value)


# What all have in common

FORMS = {
    "raw": (read_visualprm, raw_row()),
    "conversation": (read_visualprm, conversation_row()),
    "bench": (read_bench, bench_row()),
}


@pytest.mark.parametrize("form", FORMS)
def test_mutated_rows_are_read_or_refused(rules, form):
    read, row = FORMS[form]
    rng, refused = random.Random(0), 0
    for _ in range(2000):
        try:
            read(mutate(row, rng), rules)
        except InputError as error:
            assert str(error).startswith(f"{PLACE}: ")
            refused += 1
    assert 200 < refused < 1900


def test_rules_travel_to_other_processes(rules):
    assert pickle.loads(pickle.dumps(rules)).find_image("x/images/ai2d/a.png") == rules.image_root / IMAGES[0]
