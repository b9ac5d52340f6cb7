"""The plots of an evaluation: their figures against ones made by hand, and what is drawn of them."""

import numpy as np
import pytest
from matplotlib.legend import Legend
from sklearn.metrics import roc_auc_score

from dreamprm_jax import page, plots

PNG = b"\x89PNG\r\n\x1a\n"


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_scores_that_mean_what_they_say_lie_on_the_diagonal():
    rng = np.random.default_rng(0)
    scores = rng.uniform(size=100_000)
    right = rng.uniform(size=scores.size) < scores
    above, below = plots.calibration_curves({"sure": (scores, right)}).axes
    diagonal, curve = above.get_lines()
    np.testing.assert_array_equal(diagonal.get_xydata(), [[0, 0], [1, 1]])
    np.testing.assert_allclose(curve.get_ydata(), curve.get_xdata(), atol=0.02)
    assert sum(bar.get_height() for bar in below.patches) == scores.size


def test_accuracy_is_drawn_over_powers_of_two_with_bands():
    rules = {"PRM": plots.Band([0.4, 0.5, 0.6], [0.1, 0.05, 0.0])}
    figure = plots.accuracy_by_candidates([1, 2, 4], rules, {"oracle": [0.4, 0.7, 0.9], "pass@1": 0.4})
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "2", "4"]
    assert legend(axes) == ["PRM", "oracle", "pass@1"]
    assert [list(line.get_ydata()) for line in axes.get_lines()] == [[0.4, 0.5, 0.6], [0.4, 0.7, 0.9], [0.4] * 3]
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    assert {(1.0, 0.3), (1.0, 0.5), (2.0, 0.45), (4.0, 0.6)} <= {tuple(np.round(corner, 9)) for corner in corners}


def test_roc_curves_name_their_area():
    scores, right = [0.1, 0.4, 0.35, 0.8], [False, False, True, True]
    (axes,) = plots.roc_curves({"responses": (scores, right), "steps": ([0.5, 0.6], [True, True])}).axes
    area = roc_auc_score(right, scores)
    assert area == 0.75
    assert legend(axes) == ["responses (AUROC 0.750)", "steps (all of one kind)", "by chance (0.500)"]
    x, y = axes.get_lines()[0].get_data()
    assert np.trapezoid(y, x) == pytest.approx(area)


def test_score_by_steps_draws_the_means_of_right_and_wrong():
    steps = np.repeat([1, 2, 3], 4)
    right = np.tile([True, True, False, False], 3)
    scores = np.where(right, 0.5 + 0.1 * steps, 0.3)
    (axes,) = plots.score_by_steps(steps, scores, right).axes
    assert legend(axes) == ["right, mean (6)", "wrong, mean (6)"]
    above, below = (container.lines[0] for container in axes.containers)
    np.testing.assert_allclose(above.get_xydata(), [[1, 0.6], [2, 0.7], [3, 0.8]])
    np.testing.assert_allclose(below.get_ydata(), 0.3)
    plots.score_by_steps(steps, scores, np.ones(12, bool))  # none is wrong


def test_the_few_longest_share_a_mean():
    steps = np.array([*range(1, 10)] * 10 + [50, 90])
    (axes,) = plots.score_by_steps(steps, np.full(92, 0.5), np.ones(92, bool)).axes
    means = axes.containers[0].lines[0].get_xdata()
    np.testing.assert_allclose(means, [*range(1, 9), (10 * 9 + 50 + 90) / 12])


FIGURES = {
    "accuracy": lambda: plots.accuracy_by_candidates([1, 2], {"PRM": plots.Band([0.4, 0.5], [0, 0])}, {"oracle": 0.9}),
    "calibration": lambda: plots.calibration_curves({"a": ([0.2, 0.8], [False, True])}),
    "roc": lambda: plots.roc_curves({"a": ([0.2, 0.8], [False, True])}),
    "steps": lambda: plots.score_by_steps([1, 2], [0.2, 0.8], [False, True]),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_plot_is_labelled_and_its_legend_lies_outside(name):
    figure = FIGURES[name]()
    figure.draw_without_rendering()
    assert figure.axes[0].get_title()
    assert all(axes.get_ylabel() for axes in figure.axes)
    assert figure.axes[-1].get_xlabel()
    box, area = figure.axes[0].get_legend().get_window_extent(), figure.axes[0].get_window_extent()
    assert box.x0 >= area.x1 - 1
    assert page.png_of(figure).startswith(PNG)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.weight_histogram({"a": [1.0, 2.0], "b": [0.5] * 3}),
        lambda: plots.score_histograms({name: ([0.8, 0.9], [0.1]) for name in "abcd"}),
    ],
)
def test_a_histogram_searches_no_place_for_its_legend(draw, monkeypatch):
    # "best" asks every bar, and warns after a second: a plot must not depend on how fast the machine is.
    monkeypatch.setattr(Legend, "_find_best_position", lambda *_: pytest.fail("a legend's place was searched for"))
    figure = draw()
    figure.draw_without_rendering()
    (shown,) = filter(None, (*figure.legends, *(axes.get_legend() for axes in figure.axes)))
    assert shown.get_window_extent().x0 >= max(axes.get_window_extent().x1 for axes in figure.axes) - 1
    assert page.png_of(figure).startswith(PNG)


def test_plots_are_written_whole(tmp_path):
    folder = tmp_path / "run" / "plots"
    for content in (b"old", b"new"):
        plots.write_plots(folder, [page.Plot("roc", "caption", content), page.Plot("steps", "caption", content)])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"roc.png": b"new", "steps.png": b"new"}


def test_chains_of_one_length_have_one_tick():
    (axes,) = plots.score_by_steps(np.full(20, 2), np.linspace(0, 1, 20), np.arange(20) % 2 == 0).axes
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [2]
