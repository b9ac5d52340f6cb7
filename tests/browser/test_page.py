"""The browser of questions in Chromium, opened from its file without a network, by mouse, keyboard and address."""

import shutil
from itertools import pairwise

import browsing
import pytest

sync_api = pytest.importorskip("playwright.sync_api")

from dreamprm_jax import browser, page  # noqa: E402 (after the skip)

DESKTOP, PHONE = {"width": 1400, "height": 900}, {"width": 360, "height": 740}
MANY = 120  # questions of a list that is shown in parts


def written(folder, name, questions):
    path = folder / f"{name}.html"
    tables = [page.Table("Accuracy", ["rule", "accuracy"], [["PRM", 0.5]])]
    path.write_text(page.render(name, tables, [], "config", sections=[browser.section(questions)]), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Addresses of pages."""
    folder = tmp_path_factory.mktemp("pages")
    return {
        "outcomes": written(folder, "outcomes", browsing.every_outcome()),
        "hostile": written(folder, "hostile", browsing.hostile()),
        "many": written(folder, "many", [browsing.question(n, "+-" * 4, 1, 1.0) for n in range(MANY)]),
        "baselines": written(folder, "baselines", [browsing.question(n, "+-", None, float(n)) for n in range(2)]),
        "none": written(folder, "none", []),
        "twins": written(folder, "twins", [browsing.question(0, "+-", 0, 1.0)] * 2),
    }


@pytest.fixture(scope="module")
def chromium():
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("needs Chromium")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def visit(chromium, pages):
    """(name, hash, viewport, options) -> the page; at the end nothing was fetched, logged, thrown or asked."""
    contexts, troubles = [], []

    def open_page(name, address="", viewport=DESKTOP, **options):
        context = chromium.new_context(viewport=viewport, offline=True, **options)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: troubles.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: troubles.append(str(error)))
        tab.on("dialog", lambda dialog: (troubles.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        tab.on("request", lambda request: request.url.startswith(("file:", "data:")) or troubles.append(request.url))
        tab.goto(pages[name] + address)
        tab.set_default_timeout(5000)
        return tab

    open_page.troubles = troubles
    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []


def heading(tab):
    return tab.locator("#browser-question").inner_text()


def listed(tab):
    return tab.locator(".questions .entry-id").all_inner_texts()


def sideways(tab):
    """Pixels that the page itself can be scrolled to the right."""
    return tab.evaluate("document.documentElement.scrollWidth - innerWidth")


OUTCOMES = {
    "all": [0, 1, 2, 3, 4, 5, 6],
    "PRM wrong, majority right": [0, 5],
    "PRM right, majority wrong": [1, 6],
    "both wrong, a right one exists": [2],
    "all candidates wrong": [3],
    "all candidates right": [4],
}


def test_filters_show_and_count_what_they_say(visit):
    tab = visit("outcomes")
    buttons = tab.get_by_role("group", name="Outcome").get_by_role("button")
    assert buttons.all_inner_texts() == [f"{label} {len(found)}" for label, found in OUTCOMES.items()]
    for label, found in OUTCOMES.items():
        tab.get_by_role("button", name=f"{label} {len(found)}", exact=True).click()
        assert listed(tab) == [f"q{number}" for number in found]
        assert heading(tab) == f"q{found[0]}" if label != "all" else "q4"  # the shown one stays where it passes
        assert tab.locator(".count").inner_text() == f"{len(found)} of 7 questions shown"
        assert tab.locator("[aria-pressed=true]").inner_text() == f"{label} {len(found)}"


def test_facets_and_search_narrow_every_count(visit):
    tab = visit("outcomes")
    assert tab.get_by_label("subject").locator("option").all_inner_texts() == ["any", "History (3)", "Music (4)"]
    tab.get_by_label("subject").select_option("History")
    assert listed(tab) == ["q1", "q3", "q5"]
    assert tab.locator(".chip-count").all_inner_texts() == ["3", "1", "1", "0", "1", "0"]
    tab.get_by_label("difficulty").select_option("Easy")
    assert listed(tab) == ["q1"]
    tab.get_by_role("button", name="Clear filters").click()
    assert len(listed(tab)) == 7
    tab.get_by_label("Search").fill("OF 6 step")  # words of the steps, in any order and case
    sync_api.expect(tab.locator(".questions li")).to_have_count(1)
    assert listed(tab) == ["q6"]
    tab.get_by_label("Search").fill("nowhere")
    sync_api.expect(tab.locator(".questions li")).to_have_count(0)
    assert heading(tab) == "No question passes these filters"
    tab.get_by_label("Search").fill("")
    sync_api.expect(tab.locator(".questions li")).to_have_count(7)
    assert heading(tab) == "q6"  # as before


def test_hostile_text_is_shown_as_text(visit):
    tab = visit("hostile")
    for text in browsing.HOSTILE:
        shown = text.replace("\x00", "\u2400").replace("\x07", "\u2407").replace("\x1b", "\u241b")
        shown = shown.replace("\x7f", "\u2421").replace("\ud83d", "\ufffd")
        for place in (".asked", ".option-text >> nth=1", ".card-answer b", ".step-text", ".right-answer b", "h3 span"):
            # As JSON's escapes: half a surrogate pair does not survive the way here as it is.
            found = tab.locator(place).evaluate("node => JSON.stringify(node.textContent)")
            assert found.replace("\\ud83d", "\ufffd") == tab.evaluate("text => JSON.stringify(text)", shown), place
        assert sideways(tab) <= 0
        tab.keyboard.press("j")
    assert tab.locator("img").count() == 1  # the question's own
    assert tab.evaluate("document.querySelectorAll('script').length") == 2


def test_a_question_shows_what_is_right_and_who_chose_what(visit):
    tab = visit("outcomes", "#q=q0")
    assert tab.locator(".outcome-line").inner_text().split("\n")[:3] == [
        "PRM ✗ wrong", "majority ✓ right", "2 of 3 candidates right",
    ]  # fmt: skip
    right = tab.locator(".options li", has_text="✓ right answer")
    assert right.locator(".option-text").inner_text() == "pear"
    assert "2 candidates" in right.inner_text()
    cards = tab.locator(".candidate")
    heads = cards.locator("header").all_inner_texts()
    assert ["✓ right" in text for text in heads] == [True, True, False]
    assert ["✗ wrong" in text for text in heads] == [False, False, True]
    assert ["★ PRM" in text for text in heads] == [False, False, True]
    assert ["● majority" in text for text in heads] == [True, True, False]
    steps = cards.first.locator(".step")
    assert steps.locator(".step-score").all_text_contents() == ["score 0.05", "score 0.95"]
    low, high = (step.evaluate("node => getComputedStyle(node).backgroundColor") for step in steps.all())
    assert low != high
    assert steps.locator(".mark").all_inner_texts() == ["✓ right step", "✗ wrong step"]
    assert tab.locator(".pictures img").evaluate("image => image.naturalWidth") == 16
    left = [box["x"] for box in (card.bounding_box() for card in cards.all())]
    assert left == sorted(set(left))  # side by side
    tab.get_by_role("combobox", name="Candidates").select_option("by score")
    assert tab.locator(".candidate h4").all_inner_texts() == ["Candidate 3", "Candidate 1", "Candidate 2"]


def test_keys_walk_the_questions(visit):
    tab = visit("outcomes")
    walk = []
    for key in ["j", "ArrowRight", "j", "k", "ArrowLeft", "ArrowLeft", "k"]:
        tab.keyboard.press(key)
        walk.append(heading(tab))
    assert walk == ["q1", "q2", "q3", "q2", "q1", "q0", "q0"]
    tab.keyboard.press("/")
    tab.keyboard.type("jk?")  # in the search they are letters
    assert tab.get_by_label("Search").input_value() == "jk?"
    sync_api.expect(tab.locator(".questions li")).to_have_count(0)
    tab.get_by_label("Search").fill("")
    sync_api.expect(tab.locator(".questions li")).to_have_count(7)
    tab.keyboard.press("Escape")
    tab.keyboard.press("?")
    dialog = tab.get_by_role("dialog", name="Keys")
    assert dialog.is_visible()
    tab.keyboard.press("j")
    assert heading(tab) == "q0"
    dialog.get_by_label("Letters and signs work as keys").uncheck()
    tab.keyboard.press("Escape")
    assert not dialog.is_visible()
    tab.keyboard.press("j")
    assert heading(tab) == "q0"
    tab.keyboard.press("ArrowRight")
    assert heading(tab) == "q1"


def test_arrows_scroll_the_candidates_that_have_the_focus(visit):
    tab = visit("many")
    candidates = tab.get_by_role("region", name="Candidates, side by side")
    candidates.focus()
    tab.keyboard.press("ArrowRight")
    tab.wait_for_function("document.querySelector('.candidates').scrollLeft > 0")
    assert heading(tab) == "q0"


def test_the_next_question_begins_at_its_top(visit):
    tab = visit("many", viewport={"width": 1400, "height": 300})
    tab.locator(".candidates").scroll_into_view_if_needed()
    tab.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    assert tab.locator(".asked").bounding_box()["y"] < 0
    tab.keyboard.press("j")
    assert 0 < tab.locator(".asked").bounding_box()["y"] < 300


def test_the_list_is_walked_by_its_own_keys(visit):
    tab = visit("outcomes")
    tab.locator(".questions a").first.focus()
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowDown")
    assert heading(tab) == "q2"
    assert tab.evaluate("document.activeElement.getAttribute('aria-current')") == "true"
    assert tab.locator("[aria-current]").locator(".entry-id").inner_text() == "q2"


def test_an_address_brings_back_question_and_filters(visit):
    tab = visit("outcomes")
    tab.get_by_role("button", name="PRM right, majority wrong").click()
    tab.get_by_label("subject").select_option("Music")
    tab.get_by_label("Search").fill("step 6")
    sync_api.expect(tab.locator(".questions li")).to_have_count(1)
    tab.wait_for_url("**find=step*")
    again = visit("outcomes", "#" + tab.url.partition("#")[2])
    assert heading(again) == heading(tab) == "q6"
    assert listed(again) == ["q6"]
    assert again.get_by_label("subject").input_value() == "Music"
    assert again.get_by_label("Search").input_value() == "step 6"
    assert again.locator("[aria-pressed=true]").inner_text() == "PRM right, majority wrong 1"
    top = again.locator("#browser").bounding_box()["y"]
    assert -1 < top < 50 or again.evaluate("scrollY + innerHeight >= document.documentElement.scrollHeight - 1")


@pytest.mark.parametrize("address", ["#q=gone", "#show=toString&is.subject=none&q=", "#nothing=of-ours", "#%E0%A4%A"])
def test_an_address_of_something_else_shows_everything(visit, address):
    tab = visit("outcomes", address)
    assert (heading(tab), len(listed(tab))) == ("q0", 7)


def test_back_and_forward(visit):
    tab = visit("outcomes")
    tab.locator(".questions a").nth(3).click()
    tab.keyboard.press("j")
    tab.get_by_role("button", name="PRM wrong, majority right").click()
    seen = [heading(tab)]
    for _ in range(3):
        tab.go_back()
        seen.append(heading(tab))
    assert seen == ["q0", "q4", "q3", "q0"]
    assert len(listed(tab)) == 7
    for _ in range(3):
        tab.go_forward()
    assert (heading(tab), listed(tab)) == ("q0", ["q0", "q5"])


def test_a_long_list_comes_in_parts(visit):
    tab = visit("many")
    assert len(listed(tab)) == 50
    assert tab.locator(".pager span").inner_text() == "1–50 of 120"  # noqa: RUF001
    tab.get_by_role("button", name="Later questions").click()
    assert (listed(tab)[0], heading(tab)) == ("q50", "q50")
    tab.keyboard.press("k")
    assert (listed(tab)[-1], heading(tab)) == ("q49", "q49")
    current = tab.locator("[aria-current]").bounding_box()
    outer = tab.locator(".questions ol").bounding_box()
    assert outer["y"] <= current["y"] and current["y"] + current["height"] <= outer["y"] + outer["height"] + 1
    tab.keyboard.down("j")
    for _ in range(60):
        tab.keyboard.down("j")  # repeats
    tab.keyboard.up("j")
    assert heading(tab) == "q110"
    tab.wait_for_url("**#q=q110")
    tab.go_back()
    assert heading(tab) == "q50"  # one step back to where the key went down


def test_everything_is_reached_by_tab_and_the_focus_is_seen(visit):
    tab = visit("outcomes")
    tab.locator("#browser-question").evaluate("() => document.activeElement.blur()")
    reached, outlines = [], set()
    for _ in range(60):
        tab.keyboard.press("Tab")
        name, outline = tab.evaluate("""() => {
            const node = document.activeElement;
            const label = node.getAttribute("aria-label") || node.closest("label")?.firstChild.textContent;
            const name = (label || node.textContent).trim().split("\\n")[0];
            return [node === document.body ? "" : name, getComputedStyle(node).outlineStyle];
        }""")
        if not name:
            break
        reached.append(name)
        outlines.add(outline)
    assert outlines == {"solid"}
    filters = [f"{label} {len(found)}" for label, found in OUTCOMES.items()]
    order = ["Accuracy", *filters, "subject", "difficulty", "Search", "Candidates", "? Keys", "Skip the list"]
    assert [name for name in reached if name in order] == order
    after = reached[reached.index("Skip the list") + 1 :]
    assert [name[:2] for name in after[:7]] == [f"q{number}" for number in range(7)]
    assert after[7:] == ["Next question", "Candidates, side by side", "Config"]  # there is no previous one


def test_the_list_can_be_skipped(visit):
    tab = visit("many")
    tab.locator(".skip").focus()
    assert tab.locator(".skip").evaluate("node => getComputedStyle(node).opacity") == "1"
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "browser-question"
    assert "#" not in tab.url


def test_roles_and_names(visit):
    tab = visit("outcomes")
    for role, name in [
        ("region", "Questions"), ("search", "Filter the questions"), ("navigation", "Questions"), ("article", "q0"),
        ("list", "Options"), ("region", "Candidates, side by side"), ("article", "Candidate 1"),
        ("list", "Steps of candidate 1"), ("img", "image 1 of 1 of the question"),
    ]:  # fmt: skip
        assert tab.get_by_role(role, name=name, exact=True).count() == 1, (role, name)
    assert tab.get_by_role("status").inner_text() == "Question 1 of 7: PRM ✗ wrong, majority ✓ right"
    tab.keyboard.press("j")
    assert tab.get_by_role("status").inner_text() == "Question 2 of 7: PRM ✓ right, majority ✗ wrong"


@pytest.mark.parametrize("name", ["outcomes", "hostile", "many", "baselines", "none"])
@pytest.mark.parametrize("viewport", [PHONE, DESKTOP, {"width": 840, "height": 600}], ids=lambda size: size["width"])
def test_the_page_does_not_scroll_sideways(visit, name, viewport):
    assert sideways(visit(name, viewport=viewport)) <= 0


def test_on_a_phone_candidates_are_stacked(visit):
    tab = visit("many", viewport=PHONE)
    boxes = [card.bounding_box() for card in tab.locator(".candidate").all()]
    assert len({box["x"] for box in boxes}) == 1
    assert all(below["y"] >= above["y"] + above["height"] for above, below in pairwise(boxes))
    tab.locator(".questions a").nth(2).click()
    assert 0 <= tab.locator("#browser-question").bounding_box()["y"] < PHONE["height"] / 2  # brought into view


def test_the_colours_follow_the_system(visit):
    grounds = {}
    for scheme in ("light", "dark"):
        tab = visit("outcomes", color_scheme=scheme)
        script = "node => getComputedStyle(node).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"
        grounds[scheme] = [max(tab.locator(place).first.evaluate(script)) for place in ("body", ".step")]
    assert min(grounds["light"]) > 200
    assert max(grounds["dark"]) < 160


def test_paper_has_the_question_and_no_controls(visit):
    tab = visit("outcomes")
    tab.emulate_media(media="print")
    assert not tab.locator(".filters").is_visible()
    assert not tab.locator(".questions").is_visible()
    assert not tab.get_by_role("button", name="Next question").is_visible()
    assert tab.locator(".candidate").count() == tab.locator(".candidate:visible").count() == 3
    assert sideways(tab) <= 0


def test_without_scores_there_is_no_colour_and_no_choice_of_the_model(visit):
    tab = visit("baselines")
    assert tab.locator(".outcomes button").all_inner_texts() == [
        "all 2", "majority right 1", "majority wrong, a right one exists 1", "all candidates wrong 0",
        "all candidates right 0",
    ]  # fmt: skip
    assert tab.locator("[data-band], .legend, .card-score").count() == 0
    assert tab.get_by_role("combobox", name="Candidates").count() == 0
    assert "PRM" not in tab.locator(".columns").inner_text()


def test_a_page_without_questions(visit):
    tab = visit("none")
    tab.keyboard.press("j")
    assert heading(tab) == "No question passes these filters"
    assert tab.locator(".count").inner_text() == "0 of 0 questions shown"


def test_questions_of_one_id_have_addresses_of_their_own(visit):
    tab = visit("twins")
    first, second = tab.locator(".questions a").all()
    assert first.get_attribute("href") != second.get_attribute("href")
    assert visit("twins", second.get_attribute("href")).locator(".position").inner_text() == "2 of 2"


def test_without_javascript_the_page_says_so(visit):
    tab = visit("outcomes", java_script_enabled=False)
    assert "7 questions with 19 candidates" in tab.locator(".missing").inner_text()
    assert not tab.locator(".filters").is_visible()


def test_a_script_that_got_in_would_not_run(visit):
    """The policy is in force: an inline script other than ours is refused, and so is the network."""
    tab = visit("outcomes")
    refused = tab.evaluate("""() => new Promise((resolve) => {
        document.addEventListener("securitypolicyviolation", (event) => resolve(event.effectiveDirective));
        const script = document.createElement("script");
        script.textContent = "document.title = 'changed'";
        document.body.append(script);
    })""")
    assert (refused, tab.title()) == ("script-src-elem", "outcomes")
    (said,) = visit.troubles
    assert "Content Security Policy" in said
    visit.troubles.clear()
