"""The browser of questions as text: its data comes back whole, nothing in it is markup, and nothing is fetched."""

import base64
import hashlib
import html as html_entities
import json
import re
import time
from html.parser import HTMLParser
from itertools import pairwise

import browsing
import pytest

from dreamprm_jax import browser, page

SOURCES = {kind: (page.TEMPLATES / f"browser.{kind}").read_text() for kind in ("css", "js", "html")}


class Reader(HTMLParser):
    """Elements with their attributes, and what is inside each script."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self._inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self._inside = True
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = self._inside and tag != "script"

    def handle_data(self, data):
        if self._inside:
            self.scripts[-1] += data

    def all(self, name):
        return [attributes for tag, attributes in self.elements if tag == name]


def rendered(questions, **fields):
    return page.render("title", [], [], "config", sections=[browser.section(questions, **fields)])


def data_of(text):
    return json.loads(Reader(text).scripts[0])


def test_the_data_comes_back_as_it_was():
    questions = browsing.hostile()
    text = rendered(questions)
    text.encode()  # half a surrogate pair does not keep the page from being written
    for found, hostile in zip(data_of(text)["questions"], browsing.HOSTILE, strict=True):
        (candidate,) = found["candidates"]
        assert found["facets"] == {"subject": hostile}
        assert found["options"] == [hostile, hostile]
        assert {found["id"], found["text"], found["answer"], candidate["answer"]} == {hostile}
        assert candidate["steps"] == [[hostile, 0.5, 0]]
        assert candidate["chosen"] == [hostile, "PRM"]


def test_hostile_text_is_no_markup():
    harmless = Reader(rendered([question._replace(id="x", text="x") for question in browsing.every_outcome()]))
    hostile = Reader(rendered(browsing.hostile(), title=browsing.HOSTILE[0], note=browsing.HOSTILE[2]))
    names = [[tag for tag, _ in reader.elements if tag != "p"] for reader in (harmless, hostile)]
    assert names[0] == names[1]  # the same page but for the note
    assert not any(name.startswith("on") for _, attributes in hostile.elements for name in attributes)
    data = hostile.scripts[0]
    assert data.isascii()
    assert not set(data) & set("<>&")


def test_the_page_is_allowed_its_own_script_and_nothing_else():
    reader = Reader(rendered(browsing.every_outcome()))
    (policy,) = [meta["content"] for meta in reader.all("meta") if "http-equiv" in meta]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    digest = base64.b64encode(hashlib.sha256(reader.scripts[1].encode()).digest()).decode()
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:"
    assert "script-src 'none'" in html_entities.unescape(page.render("t", [], [], ""))


def test_nothing_is_fetched():
    text = rendered(browsing.every_outcome())
    reader = Reader(text)
    links = [attributes.get(name) for _, attributes in reader.elements for name in ("src", "href", "srcset", "action")]
    assert not [link for link in links if link and not link.startswith("data:")]
    assert not reader.all("link") + reader.all("iframe") + reader.all("object")
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest|import\(", text)


def test_the_script_makes_text_nodes_only():
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function", SOURCES["js"])


@pytest.mark.parametrize("kind", SOURCES)
def test_house_rules_hold_for_templates(kind):
    assert SOURCES[kind].count("\n") <= 500, "split the file"
    starts = [number for number, line in enumerate(SOURCES["js"].split("\n")) if line.startswith("  function ")]
    assert all(after - before < 60 for before, after in pairwise(starts))


def test_a_picture_is_in_the_page_once():
    png, jpeg = browsing.picture(), browsing.picture(kind="JPEG")
    questions = [browsing.question(number, "+", 0, 1.0, images=[png, jpeg]) for number in range(3)]
    packed = browser.packed(questions)
    assert [question["images"] for question in packed["questions"]] == [[0, 1]] * 3
    assert packed["images"][1] == "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
    assert packed["images"][0].startswith("data:image/png;base64,iVBOR")
    with pytest.raises(ValueError, match=r"6 bytes that begin with b'GIF89a'.*neither PNG nor JPEG"):
        browser.packed([browsing.question(0, "+", 0, 1.0, images=[b"GIF89a"])])


def test_what_is_missing_is_null():
    steps = [browser.Step("x", float("nan")), browser.Step("y", 1 / 3)]
    odd = browser.Candidate(None, False, steps, float("inf"))
    question = browsing.question(0, "+", None, 1.0, answer=None, facets={"subject": None})
    (found,) = browser.packed([question._replace(candidates=[odd])])["questions"]
    assert (found["answer"], found["prm"], found["facets"]) == (None, None, {})
    (candidate,) = found["candidates"]
    assert (candidate["answer"], candidate["score"], candidate["chosen"]) == (None, None, [])
    assert candidate["steps"] == [["x", None, None], ["y", 0.33333, None]]


def test_small_scores_keep_their_order():
    """Those of products of many steps."""
    right = [browser.Candidate("B", True, [], score) for score in (1.23456e-12, 2e-12)]
    (found,) = browser.packed([browsing.question(0, "+", 0, 1.0)._replace(candidates=right)])["questions"]
    assert [candidate["score"] for candidate in found["candidates"]] == [1.2346e-12, 2e-12]


def test_without_javascript_the_page_says_what_is_missing():
    found = re.search(r"<noscript>(.*?)</noscript>", rendered(browsing.every_outcome()), re.DOTALL)[1]
    assert "7\nquestions with 19 candidates" in found


def luminance(colour):
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    brighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def themes():
    """The colours by name, of the light and of the dark page."""
    text = (page.TEMPLATES / "page.html").read_text() + SOURCES["css"]
    dark = "".join(re.findall(r"prefers-color-scheme: dark\) \{\n  [:.]\w+ \{(.*?)\}", text, re.DOTALL))
    light = "".join(re.findall(r"^(?::root|\.browser) \{(.*?)\}", text, re.DOTALL | re.MULTILINE))
    found = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]+)", part)) for part in (light, dark)]
    return [{name: c if len(c) == 7 else "#" + "".join(2 * x for x in c[1:]) for name, c in t.items()} for t in found]


@pytest.mark.parametrize("theme", themes(), ids=["light", "dark"])
def test_text_has_the_contrast_of_wcag(theme):
    pairs = [("ink", f"band-{band}") for band in range(10)]
    pairs += [("right", "right-surface"), ("wrong", "wrong-surface"), ("tied", "surface"), ("on-accent", "accent")]
    pairs += [(text, ground) for text in ("text", "muted", "right", "wrong") for ground in ("page", "surface")]
    assert {pair: contrast(*map(theme.get, pair)) for pair in pairs if contrast(*map(theme.get, pair)) < 4.5} == {}


@pytest.mark.parametrize("theme", themes(), ids=["light", "dark"])
def test_scores_are_told_apart_by_blue_and_orange(theme):
    warm = [int(theme[f"band-{band}"][1:3], 16) - int(theme[f"band-{band}"][5:7], 16) for band in range(10)]
    assert warm == sorted(warm, reverse=True)  # red less blue: falls with the score, through no red or green
    assert warm[4] > 0 > warm[5]


def test_a_thousand_questions_take_seconds(record_property):
    words = "The population of both empires is declining, which the spread of pathogens explains. " * 2
    steps = [browser.Step(f"{words}{number}", 0.123456, 1) for number in range(6)]
    questions = [
        browsing.question(number, "+-", 0, 0.5)._replace(
            candidates=[browser.Candidate("B", True, steps, 0.5, ["PRM"])] * 8
        )
        for number in range(1000)
    ]
    began = time.perf_counter()
    text = rendered(questions)
    seconds = time.perf_counter() - began
    written = 1000 * 8 * sum(len(step.text) for step in steps)
    record_property("megabytes", len(text) / 1e6)
    assert seconds < 20
    assert len(text) < 1.25 * written + 100_000, "more than a quarter of the page is not text"
