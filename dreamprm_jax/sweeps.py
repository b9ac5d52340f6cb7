"""What a comparison varies: settings of the embedded benchmark, each by the sizes in which it differs."""

from __future__ import annotations

from typing import Any, NamedTuple

from dreamprm_jax.data.noisy_steps import SOURCES, Sizes
from dreamprm_jax.errors import InputError

SHARES = (0.0, 0.15, 0.3, 0.45, 0.6)
"""Of the training rows that are corrupted, expected."""
META_QUESTIONS = (25, 50, 100, 200, 400)


class Setting(NamedTuple):
    """One point of a sweep."""

    name: str  # also its folder
    value: float  # its place on the plot's axis
    changes: dict[str, Any]  # fields of Sizes


AXES = {"corruption": "corrupted training rows (expected share)", "meta_size": "meta questions"}


def settings(sweep: str, sizes: Sizes) -> list[Setting]:
    """The settings of "corruption", "meta_size", or of "none": a single one as `sizes` stands.

    Both leave cold start and test set as they are, byte for byte, so that one cold start serves all settings of a seed.

    Raises:
      InputError: `sizes` has no room for a setting.
    """
    if sweep == "corruption":
        return [Setting(f"{share:.0%}", share, with_share(sizes, share)) for share in SHARES]
    if sweep == "meta_size":
        return [Setting(str(count), count, {"meta_questions": count}) for count in META_QUESTIONS]
    return [Setting("default", 0.0, {})]


def expected_share(sizes: Sizes) -> float:
    """Of the training rows that are corrupted: each flipped chain is, and each wrong chain of `always_plus`."""
    corrupted = sizes.flipped * sizes.flip_rate + sizes.always_plus * (1 - sizes.right_rate)
    return corrupted / _num_rows(sizes)


def with_share(sizes: Sizes, share: float) -> dict[str, int]:
    """Sizes of `clean`, `flipped` and `always_plus` with an expected share of corrupted training rows.

    Their sum stays, and so do the other sources. The proportion of `flipped` to `always_plus` stays as long as there
    are clean rows to replace; a higher share than that takes rows of the one that has fewer corrupted ones.

    Raises:
      InputError: the share cannot be reached, or no row is corrupted in the first place.
    """
    noisy, total = sizes.flipped + sizes.always_plus, sizes.clean + sizes.flipped + sizes.always_plus
    if not expected_share(sizes):
        raise InputError("compare.sweep=corruption: no training row is corrupted; give noisy_steps.flipped rows")
    wanted = round(noisy * share / expected_share(sizes))
    if wanted <= total:
        flipped = round(wanted * sizes.flipped / noisy)
        return {"clean": total - wanted, "flipped": flipped, "always_plus": wanted - flipped}
    plus_rate = 1 - sizes.right_rate
    # flipped * flip_rate + (total - flipped) * plus_rate rows are corrupted: solved for flipped.
    missing, step = share * _num_rows(sizes) - total * plus_rate, sizes.flip_rate - plus_rate
    flipped = round(missing / step) if step else -1
    if not 0 <= flipped <= total:
        raise InputError(
            f"compare.sweep=corruption: {share:.0%} corrupted rows cannot be reached: clean, flipped and always_plus "
            f"together have {total} of {_num_rows(sizes)} training rows; raise noisy_steps.flip_rate, or lower "
            "noisy_steps.trivial and noisy_steps.shifted"
        )
    return {"clean": 0, "flipped": flipped, "always_plus": total - flipped}


def _num_rows(sizes: Sizes) -> int:
    return sum(getattr(sizes, source) for source in SOURCES)
