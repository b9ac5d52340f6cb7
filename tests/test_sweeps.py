"""What a comparison varies: sizes of the benchmark that give the share or the meta set asked for, and nothing else."""

import numpy as np
import pytest

from dreamprm_jax.data import noisy_steps
from dreamprm_jax.errors import InputError
from dreamprm_jax.sweeps import expected_share, settings, with_share

SMALL = {
    "pretrain": 16, "cold_start": 16, "clean": 8, "flipped": 8, "always_plus": 4, "trivial": 2, "shifted": 1,
    "meta_questions": 4, "test_questions": 6,
}  # fmt: skip


def num_rows(sizes):
    return sum(getattr(sizes, source) for source in noisy_steps.SOURCES)


def test_corruption_varies_the_share_alone():
    sizes = noisy_steps.Sizes()
    points = settings("corruption", sizes)
    assert [(point.name, point.value) for point in points] == list(
        zip(["0%", "15%", "30%", "45%", "60%"], [0.0, 0.15, 0.3, 0.45, 0.6], strict=True)
    )
    for point in points:
        changed = sizes._replace(**point.changes)
        assert set(point.changes) == {"clean", "flipped", "always_plus"}
        assert num_rows(changed) == num_rows(sizes)
        assert expected_share(changed) == pytest.approx(point.value, abs=1 / num_rows(sizes))


def test_the_mix_of_the_noisy_sources_stays_while_there_are_clean_rows():
    sizes = noisy_steps.Sizes(clean=1000, flipped=600, always_plus=300, trivial=50, shifted=50, right_rate=0.5)
    low, high = with_share(sizes, 0.3), with_share(sizes, 0.7)
    # 480 + 150 of the 900 noisy rows are corrupted, so 600 are of 857, two of three of them flipped.
    assert low == {"clean": 1043, "flipped": 571, "always_plus": 286}
    assert high == {"clean": 0, "flipped": 1500, "always_plus": 400}  # 1200 + 200 corrupted


def test_the_expected_share_is_what_the_generator_makes():
    sizes = noisy_steps.Sizes(pretrain=1, cold_start=1, meta_questions=1, test_questions=1)
    for share in (0.0, 0.3, 0.6):
        rows = noisy_steps.make(5, sizes._replace(**with_share(sizes, share))).train
        assert np.mean([row.corrupted for row in rows]) == pytest.approx(share, abs=0.03)  # 3 standard deviations


def test_a_share_that_the_sizes_have_no_room_for_is_refused():
    for sizes in (noisy_steps.Sizes(flip_rate=0.3), noisy_steps.Sizes(flip_rate=0.5, right_rate=0.5)):
        with pytest.raises(InputError, match="% corrupted rows cannot be reached: .* raise noisy_steps.flip_rate"):
            settings("corruption", sizes)
    with pytest.raises(InputError, match="no training row is corrupted"):
        settings("corruption", noisy_steps.Sizes(flipped=0, always_plus=0))


@pytest.mark.parametrize("sweep", ["corruption", "meta_size"])
def test_settings_leave_cold_start_and_test_as_they_are(sweep):
    sizes = noisy_steps.Sizes(**SMALL)
    made = [noisy_steps.make(2, sizes._replace(**point.changes)) for point in settings(sweep, sizes)]
    assert len(made) == 5
    for splits in made[1:]:
        assert (splits.pretrain, splits.cold_start, splits.test) == (
            made[0].pretrain, made[0].cold_start, made[0].test,
        )  # fmt: skip
    assert len({len(splits.meta) for splits in made}) == (5 if sweep == "meta_size" else 1)
