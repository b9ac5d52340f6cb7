"""What the pages are made of: escaped text, tables, curves, and which rows are pictured."""

import numpy as np

from dreamprm_jax import comparison_report, page, plots, report


def test_text_is_escaped_in_every_place():
    evil = '<script>alert(1)</script> & "x"'
    card = page.Card(evil, b"png", [page.Step(evil, evil, 0.5)])
    html = page.render(
        evil, [page.Table(evil, [evil], [[evil]])], [page.Plot("p", evil, b"png")], evil,
        galleries=[page.Gallery(evil, evil, [card])], intro=evil,
    )  # fmt: skip
    assert "<script>" not in html
    assert html.count("&lt;script&gt;") == 16
    assert 'alt="&lt;script&gt;alert(1)&lt;/script&gt; &amp; &#34;x&#34;"' in html


def test_markdown_keeps_its_columns():
    text = page.markdown(page.Table("t", ["a", "b"], [["x|y", 1]]))
    assert text == "## t\n\n| a | b |\n| --- | --- |\n| x\\|y | 1 |"


def test_cells():
    assert comparison_report.percent({"mean": 0.9284, "standard_error": 0.0041}) == "92.8 ± 0.4"
    assert comparison_report.fraction({"mean": 0.9284, "standard_error": None}) == "0.928"
    assert comparison_report.points({"mean": 0.046, "low": -0.0012, "high": 0.07}) == "+4.6 [-0.1, +7.0]"
    assert comparison_report.fraction(None) == comparison_report.points(None) == "–"  # noqa: RUF001


def test_extremes_are_of_the_rows_that_were_drawn():
    weights = [
        {"example_id": row, "weight": weight, "visits": visits}
        for row, (weight, visits) in enumerate([(0.5, 1), (9.0, 0), (2.0, 3), (None, 0), (0.1, 1), (1.0, 2), (0.7, 1)])
    ]
    assert report.extremes(weights) == ([2, 5], [4, 0])  # two and a half rows each: none is in both
    assert report.extremes(weights, count=1) == ([2], [4])
    assert report.extremes([{**row, "weight": 1.0} for row in weights]) == ([], [])


def test_weight_curves_are_means_over_the_rows_drawn():
    rows = [{"step": 0, "phase": "cold_start", "example_ids": [0]}] + [
        {"step": step, "example_ids": ids, "instance_weights": weights}
        for step, ids, weights in ((1, [0, 1], [1.0, 3.0]), (2, [0, 0], [2.0, 4.0]), (3, [2, 1], [5.0, 7.0]))
    ]
    found = plots.weight_curves(rows, dict(enumerate("abbc")))
    np.testing.assert_array_equal(found["a"].x, [1, 2, 3])
    np.testing.assert_array_equal(found["a"].y, [1.0, 3.0, np.nan])
    np.testing.assert_array_equal(found["b"].y, [3.0, np.nan, 6.0])
    mean = plots.mean_curve([found["a"], found["b"]])
    np.testing.assert_array_equal(mean.y, [2.0, 3.0, 6.0])


def test_a_long_curve_is_taken_in_stretches():
    rows = [{"example_ids": [0] * 5, "inner_loss": float(step)} for step in range(200)]
    found = plots.loss_curve(rows, "inner_loss")
    assert found.x.shape == found.y.shape == (40,)
    assert (found.y[0], found.y[-1]) == (2.0, 197.0)  # means of five steps
    assert (found.x[0], found.x[-1]) == (15.0, 990.0)
