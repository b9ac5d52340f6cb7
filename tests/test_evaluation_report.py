"""results.md and report.html of an evaluation: both have the numbers of results.json, the browser what was computed."""

import html
import io
import json
import re
from html.parser import HTMLParser

import browsing
import numpy as np
import pytest
from PIL import Image

from dreamprm_jax import evaluate, evaluation, evaluation_report, page
from dreamprm_jax.data import noisy_steps
from dreamprm_jax.data.candidates import Candidate, Contest, noisy_contests
from dreamprm_jax.data.example import GPT, HUMAN, PLUS, SYSTEM, Example, Question, Turn
from dreamprm_jax.data.formats.visualprm import conversation
from dreamprm_jax.evaluation import Scores, Settings

SETTINGS = Settings(aggregate="min", step_score="two_token", num_samples=5, threshold=0.5)
SIZES = noisy_steps.Sizes(
    pretrain=1, cold_start=1, clean=1, flipped=0, always_plus=0, trivial=0, shifted=0, test_questions=6
)


def random_scores(contests):
    """To one decimal, so that there are ties."""
    rng = np.random.default_rng(0)
    chains = [candidate.example for contest in contests for candidate in contest.candidates]
    return Scores([rng.random(chain.num_steps).round(1) for chain in chains], [chain.num_steps + 5 for chain in chains])


def found_in(contests, scores, settings=SETTINGS):
    judged = evaluation.judged_candidates(contests)
    return evaluate.evaluated(settings, contests, scores, judged, scores)


@pytest.fixture(scope="module")
def found():
    """Six questions of the embedded benchmark with random scores."""
    contests = noisy_contests(noisy_steps.make(0, SIZES).test)
    facets = [{"subject": ("Art", "Physics")[number % 2], "difficulty": "Hard"} for number in range(6)]
    contests = [c._replace(question=c.question._replace(**f)) for c, f in zip(contests, facets, strict=True)]
    return found_in(contests, random_scores(contests))


def written(folder, found, questions_shown=10, image_side=100):
    evaluation_report.write_reports(folder, found, "config", questions_shown=questions_shown, image_side=image_side)
    return (folder / "results.md").read_text(), (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def files(found, tmp_path_factory):
    return written(tmp_path_factory.mktemp("report"), found)


class Tables(HTMLParser):
    """Titles (h2), and the rows of the table behind each."""

    def __init__(self, text):
        super().__init__()
        self.tables, self._inside, self._title = {}, None, ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._inside = tag if tag in ("h2", "td", "th") else self._inside
        if tag == "h2":
            self._title = ""
        if tag == "table":
            self.tables[self._title] = []
        if tag == "tr":
            self.tables[self._title].append([])
        if tag in ("td", "th"):
            self.tables[self._title][-1].append("")

    def handle_endtag(self, tag):
        self._inside = None if tag == self._inside else self._inside

    def handle_data(self, data):
        if self._inside == "h2":
            self._title += data
        elif self._inside in ("td", "th"):
            self.tables[self._title][-1][-1] += data


def tables_in_markdown(text):
    parts = [part.split("\n") for part in text.split("\n## ")[1:]]
    rows = {part[0]: [line.strip("| ").split(" | ") for line in part[2:] if line.startswith("|")] for part in parts}
    return {title: [lines[0], *lines[2:]] for title, lines in rows.items() if lines}


def data_of(text):
    return json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.DOTALL)[1])


def test_both_files_have_the_same_tables_in_the_same_order(files):
    markdown, text = files
    tables = Tables(text).tables
    assert list(tables.items()) == list(tables_in_markdown(markdown).items())
    titles = list(tables)
    assert titles[:3] == ["Best of 8", "PRM by aggregation of its step scores", "Steps"]  # what was asked comes first
    assert titles[-1].startswith("For reference") and len(titles) == 11
    assert text.index("<table>") < text.index(page.NOTES_TITLE) < text.index("<figure>") < text.index('class="browser"')


def test_best_of_n_and_aggregations_are_those_of_the_results(found, files):
    tables, results = tables_in_markdown(files[0]), found.results["selection"]
    titles = {"pass_at_1": "a random candidate (pass@1)", "majority": "majority vote", "prm/min": "PRM (min)",
              "weighted_vote/min": "weighted vote (min)", "oracle": "oracle (any right)"}  # fmt: skip
    rows = dict(tables["Best of 8"][1:])
    assert set(rows) == set(titles.values())
    for rule, title in titles.items():
        numbers = [float(number) for number in re.findall(r"[\d.]+", rows[title])]
        assert numbers == [round(100 * results["accuracy"][rule][name], 2) for name in ("mean", "low", "high")]
    rows = {row[0]: row[1:] for row in tables["PRM by aggregation of its step scores"][1:]}
    assert any(ties["first"] != ties["expected"] for ties in results["ties"].values())
    assert set(rows) == set(results["gains"])
    for name, (accuracy, over_random, over_majority, vote, ties, equals) in rows.items():
        assert float(accuracy.split()[0]) == round(100 * results["accuracy"][f"prm/{name}"]["mean"], 2)
        for cell, baseline in ((over_random, "pass_at_1"), (over_majority, "majority")):
            gains = results["gains"][name][baseline]
            sign, *numbers = re.findall(r"[-+]?[\d.]+", cell)
            assert sign[0] == ("+" if gains["mean"] >= 0 else "-")
            assert [float(sign), *map(float, numbers)] == pytest.approx(
                [100 * gains["mean"], 100 * gains["low"], 100 * gains["high"], gains["p_value"]], abs=0.005
            )
        assert float(vote) == round(100 * results["accuracy"][f"weighted_vote/{name}"]["mean"], 2)
        assert ties == f"{results['ties'][name]['num_shared']} ({results['ties'][name]['num_deciding']})"
        assert [float(x) for x in equals.split(" / ")] == [
            round(100 * results["ties"][name][kind], 2) for kind in ("first", "last")
        ]


def test_curves_runs_groups_and_lengths_are_those_of_the_results(found, files):
    tables, results = tables_in_markdown(files[0]), found.results["selection"]
    curves = next(rows for title, rows in tables.items() if title.startswith("Accuracy by the number"))
    assert curves[0] == ["choice", *(f"N = {size}" for size in (1, 2, 4, 8))]
    (row,) = [row for row in curves if row[0] == "PRM (min)"]
    means, stds = (results["curves"][kind]["prm/min"] for kind in ("mean", "std"))
    assert row[1:4] == [f"{100 * mean:.2f} ± {100 * std:.2f}" for mean, std in zip(means, stds, strict=True)][:3]
    assert row[4] == f"{100 * means[3]:.2f}"  # all candidates: no sub-samples to deviate
    runs = next(rows for title, rows in tables.items() if "(runs)" in title)
    assert runs[1:] == [[str(number), f"{100 * run:.2f}"] for number, run in enumerate(results["runs"], 1)]
    head, *rows = tables["By subject"]
    assert head[:2] == ["subject", "questions"] and head[-1] == "oracle (any right)"
    for label, count, *_, oracle in rows:
        group = results["groups"]["subject"][label]
        assert (int(count), float(oracle)) == (group["num_questions"], round(100 * group["oracle"], 2))
    assert [row[0] for row in rows] == ["Art", "Physics"] and [row[0] for row in tables["By difficulty"]][1:] == [
        "Hard"
    ]
    lengths = tables["Does the score follow the length?"]
    assert [row[0] for row in lengths[1:]] == ["steps", "tokens"]
    assert [float(row[3]) for row in lengths[1:]] == [2, 7]


def test_steps_are_those_of_the_results(found, files):
    tables, results = tables_in_markdown(files[0]), found.results["steps"]
    head, *rows = tables["Steps"]
    by_name = {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}
    assert list(by_name) == ["all sources", "test", "mean of the sources", "saying right to every step"]
    for name, figures in (("all sources", results["pooled"]), ("saying right to every step", results["all_right"])):
        assert float(by_name[name]["macro-F1"]) == round(figures["macro_f1"], 4)
        assert float(by_name[name]["first error found"]) == round(figures["first_error_error_accuracy"], 4)
        assert int(by_name[name]["wrong steps"]) == figures["num_wrong"]
        assert int(by_name[name]["chains with an error"]) == figures["first_error_num_with_error"]
    _, *told = tables["Do the scores tell right from wrong?"]
    both = {"responses": found.results["selection"]["responses"], "steps": results}
    assert [row[0] for row in told] == list(both)
    for name, *row in told:
        assert row == [f"{both[name][figure]:.4f}" for figure in ("auroc", "calibration_error", "brier")]


def test_the_papers_figures_are_marked_as_the_papers(files):
    (title,) = [title for title in tables_in_markdown(files[0]) if "84.6" in str(tables_in_markdown(files[0])[title])]
    assert "the paper's own figures" in title and "not measured here" in title and "GPT-5-mini" in title
    head, *rows = tables_in_markdown(files[0])[title]
    assert "2509.05542" in head[0]
    assert dict(rows)["DreamPRM-1.5, instance net"] == "83.6"


def test_the_plots_are_of_the_chains_that_count(found):
    """With a chosen threshold, AUROC and calibration beside the table's are of the same chains."""
    settings = SETTINGS._replace(threshold=None, held_out=0.5)
    split = found_in(found.contests, found.scores, settings)
    counted = split.results["steps"]["num_chains"]
    assert counted < 48
    assert len(split.steps.sources) == counted
    assert len(found.steps.sources) == 48
    names = [plot.name for plot in evaluation_report.plots_of(split)]
    assert names == ["accuracy", "scores", "score_by_steps", "step_scores", "calibration", "roc"]


@pytest.mark.parametrize("aggregate", ["sum_logit", "mean_odd"])
def test_scores_that_are_no_probabilities_have_no_calibration(found, aggregate):
    plots = evaluation_report.plots_of(
        found_in(found.contests, found.scores, SETTINGS._replace(aggregate=aggregate))._replace(steps=None)
    )
    assert [plot.name for plot in plots] == ["accuracy", "score_by_steps"]


def test_what_is_not_asked_for_has_neither_tables_nor_plots(found, tmp_path):
    alone = evaluate.evaluated(SETTINGS, found.contests, None, None, None)
    markdown, text = written(tmp_path, alone)
    assert not {"Steps", "PRM by aggregation of its step scores"} & set(Tables(text).tables)
    assert "PRM" not in markdown.partition("For reference")[0] and "P(" not in markdown
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["accuracy.png"]
    judged = evaluation.judged_candidates(found.contests)
    steps = evaluate.evaluated(SETTINGS, [], None, judged, found.scores)
    markdown, text = written(tmp_path, steps)
    assert list(Tables(text).tables) == ["Steps", "Do the scores tell right from wrong?"]
    assert 'class="browser"' not in text and "threshold given" in markdown


# --- The browser's data.


def test_the_browser_shows_what_was_computed(found, files):
    questions = data_of(files[1])["questions"]
    scores = iter(found.scores.steps)
    assert len(questions) == 6
    for number, (shown, contest) in enumerate(zip(questions, found.contests, strict=True)):
        own = [next(scores) for _ in contest.candidates]
        response = [each.min() for each in own]
        best = int(np.argmax(response))
        assert [n for n, c in enumerate(shown["candidates"]) if "PRM" in c["chosen"]] == [best]
        assert shown["prm"] == contest.candidates[best].correct == found.ballot.outcomes["prm/min"][number]
        answers = [candidate.answer for candidate in contest.candidates]
        most = max(map(answers.count, answers))
        for place, (candidate, drawn) in enumerate(zip(contest.candidates, shown["candidates"], strict=True)):
            assert ("majority" in drawn["chosen"]) == (answers.count(candidate.answer) == most)
            assert (drawn["answer"], drawn["correct"]) == (candidate.answer, candidate.correct)
            assert drawn["score"] == pytest.approx(response[place], abs=1e-5)
            assert [step[0] for step in drawn["steps"]] == candidate.text.split("\n")  # without the question
            assert [step[1] for step in drawn["steps"]] == pytest.approx(own[place].tolist(), abs=1e-5)
            assert [step[2] for step in drawn["steps"]] == list(candidate.example.step_truth)
        assert shown["majority"] == pytest.approx(found.ballot.outcomes["majority"][number], abs=1e-5)
        assert shown["oracle"] == any(candidate.correct for candidate in contest.candidates)
        assert shown["facets"] == {name: value for name, value in evaluation.facets(contest).items() if value}


def test_the_first_questions_alone_are_shown_and_the_page_says_so(found, files, tmp_path):
    _, text = written(tmp_path, found, questions_shown=2)
    assert len(data_of(text)["questions"]) == 2
    assert "The first 2 of 6 questions." in text
    assert "The first" not in files[1]


def test_pictures_are_small_or_left_out(found, tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (300, 120), "teal").save(buffer, "PNG")
    contest = found.contests[0]
    images = (buffer.getvalue(), tmp_path / "gone.png")
    large = found._replace(contests=[contest._replace(question=contest.question._replace(images=images))])
    for side, size in ((60, (60, 24)), (1000, (300, 120))):
        (question,) = evaluation_report.questions_of(large, 5, side)
        (picture,) = question.images
        assert Image.open(io.BytesIO(picture)).size == size
    (question,) = evaluation_report.questions_of(large, 5, 0)
    assert question.images == []


def hostile_contest(number, text):
    turns = (Turn(SYSTEM, "s"), Turn(HUMAN, text), Turn(HUMAN, text), Turn(GPT, PLUS))
    example = Example(number, text, turns, true_false=False, step_truth=(-1,), dataset=text)
    question = Question(number, text, text, text, images=(browsing.picture(),), subject=text, difficulty=text)
    return Contest(question, (Candidate(text, text, False, None, example),))


def test_hostile_text_stays_text(tmp_path):
    """In questions, answers, steps, sources and groups, in both files."""
    hostile = [text for text in browsing.HOSTILE if not re.search("[\ud800-\udfff]", text)]
    texts = [*hostile, "new\nline | and pipe"]
    contests = [hostile_contest(number, text) for number, text in enumerate(texts)]
    markdown, text = written(tmp_path, found_in(contests, random_scores(contests)), questions_shown=20)
    assert [question["text"] for question in data_of(text)["questions"]] == texts
    assert [question["candidates"][0]["steps"][0][0] for question in data_of(text)["questions"]] == texts
    outside = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert "<img src=x" not in outside and "<script>alert" not in outside
    assert html.escape("<img src=x onerror=alert(1)>") in outside
    assert "<img" not in markdown and "<script" not in markdown
    for title, (head, *rows) in tables_in_markdown(markdown).items():
        assert {len(row) for row in rows} == {len(head)}, title


def test_where_the_first_step_stands_behind_the_question_it_is_parted():
    question = Question(0, "q", "Which?", "A")
    chain = Example(0, 0, conversation("<image>Which?", ["Which? Red.", "two"], [PLUS] * 2))
    assert evaluation_report.step_texts(chain, question) == ["Which? Red.", "two"]
    own_turn = Example(0, 0, (Turn(HUMAN, "Which?"), Turn(HUMAN, "Which? Red."), Turn(GPT, PLUS)))
    assert evaluation_report.step_texts(own_turn, question) == ["Which? Red."]
    joined = Example(0, 0, (Turn(HUMAN, "<image>Which? Red."), Turn(GPT, PLUS)))
    assert evaluation_report.step_texts(joined, question) == ["Red."]


# --- Text and cells.


def test_the_introduction_counts(found):
    results = {"selection": {**found.results["selection"]}, "steps": {**found.results["steps"]}}
    text = evaluation_report.intro(results, SETTINGS)
    assert text.startswith("6 questions with 8 candidates each, 48 responses in all.")
    assert 'P("+") over "+" and "-". PRM chooses the response with the highest min of its steps\' scores' in text
    assert "Steps of 48 chains: those scored above 0.5, the threshold given" in text
    assert "could not be scored" not in text and "disagree" not in text
    results["selection"] |= {"fewest_candidates": 3, "num_without_answer": 1, "num_unscored": 2, "num_disagreements": 1}
    chosen_on = {"num_chains": 1234, "share_of_questions": 0.2, "seed": 7, "num_without_pictures": 3}
    results["steps"] |= {"num_unscored": 1, "threshold": 0.9999871, "chosen_on": chosen_on}
    text = evaluation_report.intro(results, SETTINGS._replace(step_score="full", ties="last"))
    for part in (
        "3 to 8 candidates", "1 response without a recognised answer.", "2 responses could not be scored",
        "disagree on 1 response,", "1 chain could not be scored", "on 1,234 others",
        "(20% of the questions, by hash, seed 7)", "above 0.9999871 are", "pictures of 3 chains were not at hand",
        "over the full vocabulary", "of equals the last.",
    ):  # fmt: skip
        assert part in text


def test_cells():
    assert evaluation_report.percent(None) == evaluation_report.fraction(None) == "–"  # noqa: RUF001
    assert evaluation_report.interval({"mean": 0.5, "low": 0.25, "high": 1}) == "50.00 [25.00, 100.00]"
    assert evaluation_report.gain({"mean": -0.01, "low": -0.02, "high": 0.005, "p_value": 0.25}) == (
        "-1.00 [-2.00, +0.50], p = 0.250"
    )
    assert evaluation_report.gain({"mean": 0, "low": 0, "high": 0, "p_value": 0.0002}).endswith("p < .001")


def test_columns_of_numbers_stand_at_the_right():
    rows = [("3 apples", "-1.00 [-2, +3]", 1.5, "–"), ("x", "–", 2, "–")]  # noqa: RUF001
    text = page.render("t", [page.Table("t", ["a", "b", "c", "d"], rows), page.Table("none", ["a"], [])], [], "")
    assert re.findall(r"<t[dh][^>]*class=\"number\">([^<]*)<", text) == [
        "b", "c", "d", "-1.00 [-2, +3]", "1.5", "–", "–", "2", "–",  # noqa: RUF001
    ]  # fmt: skip
