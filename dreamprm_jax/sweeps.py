"""What a comparison varies: settings of the embedded benchmark, each by the sizes in which it differs."""

from __future__ import annotations

from typing import Any, NamedTuple

from dreamprm_jax.data.noisy_steps import SOURCES, Sizes
from dreamprm_jax.errors import InputError

SHARES = (0.0, 0.15, 0.3, 0.45, 0.6)
"""Of the training rows that are corrupted, expected."""
META_QUESTIONS = (12, 25, 50, 100, 200)


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
    return corrupted / sum(getattr(sizes, source) for source in SOURCES)


def with_share(sizes: Sizes, share: float) -> dict[str, int]:
    """Sizes of `clean`, `flipped` and `always_plus` with an expected share of corrupted training rows.

    Their sum stays, and so do the proportion of `flipped` to `always_plus` and the other sources.

    Raises:
      InputError: even without a clean row the share is lower, or there is nothing to add.
    """
    noisy, total = sizes.flipped + sizes.always_plus, sizes.clean + sizes.flipped + sizes.always_plus
    if not expected_share(sizes):
        raise InputError("compare.sweep=corruption: no training row is corrupted; give noisy_steps.flipped rows")
    wanted = round(noisy * share / expected_share(sizes))
    if wanted > total:
        raise InputError(
            f"compare.sweep=corruption: {share:.0%} corrupted rows would take {wanted} of the sources flipped and "
            f"always_plus, but with clean they have {total} rows; raise noisy_steps.flip_rate or lower "
            "noisy_steps.trivial and noisy_steps.shifted"
        )
    flipped = round(wanted * sizes.flipped / noisy)
    return {"clean": total - wanted, "flipped": flipped, "always_plus": wanted - flipped}
