"""Best-of-N: what selection by the model is worth beside its baselines, question by question, with intervals.

Rules, by the names that `outcomes` and all that follows from them have:

  pass_at_1           a random candidate
  majority            the most frequent answer
  oracle              any candidate right
  prm/NAME            the candidate with the highest of the scores called NAME
  weighted_vote/NAME  each candidate votes for its answer with its score

Votes: a candidate without a recognisable answer casts none, and a question where nobody votes counts as wrong. Answers
tied for the lead share the credit. Candidates of one answer should agree on whether it is right; where they do not, the
answer is as right as they are on average.

Shapes: Q questions of up to C candidates, M sub-samples of them, A different answers to one question.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy.stats import binomtest, permutation_test, rankdata

from dreamprm_jax.errors import InputError

REFERENCES = ("pass_at_1", "majority", "oracle")
"""Rules that no model has a part in."""

LOG_SCORES = frozenset({"sum_logprob", "sum_logit"})
"""Scores that are logarithms, of a probability or of odds: what votes is their exponential."""

Ties = Literal["first", "last"]
"""Which of equal highest scores is chosen. A scan with >= takes the last, as the published evaluation does."""

_TIE = 1e-9  # votes that differ by less, relatively, are equal: adding them up in another order must not break a tie
_LEAST_VOTE = 1e-300  # so that among candidates whose scores have all come down to 0, their number decides
_CELLS = 2_000_000  # numbers of an array at a time: 16 MB


class Field(NamedTuple):
    """The candidates of Q questions, C of them at most; a question's own come first."""

    answers: np.ndarray  # int [Q, C]: equal numbers within a question are equal answers; -1: none
    correct: np.ndarray  # bool [Q, C]
    present: np.ndarray  # bool [Q, C]


def field_of(answers: Sequence[Sequence[Hashable | None]], correct: Sequence[Sequence[bool]]) -> Field:
    """Makes a field of each question's answers (None where none is recognisable) and whether each is right.

    Raises:
      ValueError: no question, a question without candidates, or one with more answers than verdicts or fewer.
    """
    counts = [len(of_question) for of_question in answers]
    if not counts or min(counts) == 0 or counts != [len(of_question) for of_question in correct]:
        raise ValueError(f"answers of {counts[:8]}... candidates, verdicts on {[len(row) for row in correct][:8]}...")
    present = np.arange(max(counts)) < np.array(counts)[:, None]
    return Field(
        _filled(present, [number for of_question in answers for number in _numbered(of_question)], -1),
        _filled(present, [bool(verdict) for of_question in correct for verdict in of_question], False),
        present,
    )


def packed(field: Field, values: Sequence[float] | np.ndarray) -> np.ndarray:
    """One number for each candidate, question after question, as float [Q, C]; 0 where there is no candidate.

    Raises:
      ValueError: not as many values as candidates.
    """
    return _filled(field.present, np.asarray(values, np.float64), 0.0)


def _filled(present: np.ndarray, values: Sequence | np.ndarray, empty: float) -> np.ndarray:
    values = np.asarray(values)
    if values.shape != (present.sum(),):
        raise ValueError(f"values of shape {values.shape} for {present.sum()} candidates")
    found = np.full(present.shape, empty, values.dtype)
    found[present] = values
    return found


def _numbered(answers: Sequence[Hashable | None]) -> list[int]:
    numbers: dict[Hashable, int] = {}
    return [-1 if answer is None else numbers.setdefault(answer, len(numbers)) for answer in answers]


def vote_weights(field: Field, scores: np.ndarray, *, logarithms: bool = False) -> np.ndarray:
    """What each candidate's vote weighs, [Q, C] in [0, 1]: its score over the highest one among its question's voters.

    Logarithms are exponentiated, so that the weights are a softmax over the voters, up to a factor. Where all scores of
    a question are equal, all weights are 1, and the vote is the majority's.

    Args:
      scores: [Q, C], infinities allowed.
      logarithms: whether the scores are; others must not be negative.

    Raises:
      ValueError: a negative score that is not meant as a logarithm.
    """
    votes = field.answers >= 0
    if not logarithms and np.any(scores[votes] < 0):
        raise ValueError("a negative score cannot be a vote; scores that are logarithms are named in LOG_SCORES")
    top = np.max(scores, axis=1, keepdims=True, initial=-np.inf, where=votes)
    below = votes & (scores != top)  # equal infinities have neither difference nor quotient
    if logarithms:
        weights = np.exp(np.subtract(scores, top, out=np.zeros(scores.shape), where=below))
    else:
        weights = np.divide(scores, top, out=np.ones(scores.shape), where=below)
    return np.where(votes, np.maximum(weights, _LEAST_VOTE), 0.0)


def _ranks(field: Field, scores: np.ndarray, ties: Ties) -> np.ndarray:
    """Of the scores within each question, upwards from 0, int [Q, C]; of equals, the one that wins ranks highest."""
    if ties not in ("first", "last"):
        raise ValueError(f"ties={ties!r}; it must be 'first' or 'last'")
    lost = np.argwhere(np.isnan(scores) & field.present)
    if len(lost):
        raise InputError(f"the score of question {lost[0][0]}, candidate {lost[0][1]}, is not a number; score it again")
    order = slice(None, None, -1 if ties == "first" else 1)
    ascending = np.argsort(scores[:, order], axis=1, kind="stable")
    return np.argsort(ascending, axis=1)[:, order].astype(np.int32)


def chosen(field: Field, scores: np.ndarray, ties: Ties = "first") -> np.ndarray:
    """The candidate of highest score of each question: [Q, C] -> int [Q].

    Raises:
      InputError: a score that is not a number.
    """
    return _highest(_ranks(field, scores, ties), field.present[:, None])[:, 0]


def _highest(ranks: np.ndarray, among: np.ndarray) -> np.ndarray:
    """[Q, C] and bool [Q, M, C] -> int [Q, M]."""
    return np.where(among, ranks[:, None], -1).argmax(axis=-1)


class _Rules(NamedTuple):
    votes: dict[str, np.ndarray]  # by rule: weights [Q, C]
    ranks: dict[str, np.ndarray]  # by rule: int [Q, C]


def _rules(field: Field, scores: Mapping[str, np.ndarray], ties: Ties) -> _Rules:
    votes, ranks = {"majority": vote_weights(field, np.ones(field.present.shape))}, {}
    for name, values in scores.items():
        ranks[f"prm/{name}"] = _ranks(field, values, ties)
        votes[f"weighted_vote/{name}"] = vote_weights(field, values, logarithms=name in LOG_SCORES)
    return _Rules(votes, ranks)


def _outcomes(field: Field, rules: _Rules, among: np.ndarray) -> dict[str, np.ndarray]:
    """Expected correctness by rule, [Q, M], where each question's candidates are those of `among`, bool [Q, M, C]."""
    taken = among.astype(np.float64)
    num_right = (taken @ field.correct[..., None])[..., 0]
    groups = field.answers[..., None] == np.arange(field.answers.max(initial=0) + 1)  # [Q, C, A]
    members = groups.sum(axis=1)  # [Q, A]
    right = (groups & field.correct[..., None]).sum(axis=1) / np.maximum(members, 1)  # [Q, A]
    found = {"pass_at_1": num_right / taken.sum(axis=-1), "oracle": (num_right > 0).astype(np.float64)}
    for rule, weights in rules.votes.items():
        found[rule] = _credit(taken @ (weights[..., None] * groups), right)
    for rule, ranks in rules.ranks.items():
        found[rule] = np.take_along_axis(field.correct, _highest(ranks, among), axis=1).astype(np.float64)
    return found


def _credit(totals: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Mean correctness of the answers that lead: votes [Q, M, A] and correctness [Q, A] -> [Q, M]; 0 without votes."""
    lead = totals.max(axis=-1, keepdims=True)
    leaders = (totals >= lead * (1 - _TIE)).astype(np.float64)
    shares = leaders @ np.stack([right, np.ones(right.shape)], axis=-1)  # [Q, M, 2]
    return np.where(lead[..., 0] > 0, shares[..., 0] / shares[..., 1], 0.0)


def _parts(field: Field, num_samples: int) -> Iterator[slice]:
    """Runs of questions whose arrays of [Q, M, C] and [Q, C, A] stay small."""
    num_questions, width = field.present.shape
    step = max(1, _CELLS // (width * max(num_samples, width)))
    return (slice(first, first + step) for first in range(0, num_questions, step))


def _part(field: Field, rules: _Rules, part: slice) -> tuple[Field, _Rules]:
    cut = _Rules(*({rule: values[part] for rule, values in kind.items()} for kind in rules))
    return Field(*(values[part] for values in field)), cut


def outcomes(field: Field, scores: Mapping[str, np.ndarray], ties: Ties = "first") -> dict[str, np.ndarray]:
    """(Expected) correctness of each question's chosen answer by every rule, {rule: [Q]}, each in [0, 1].

    Args:
      scores: {name: [Q, C]}; those of LOG_SCORES may be negative.
      ties: among equal highest scores.

    Raises:
      InputError: a score that is not a number.
      ValueError: a negative score that is none of LOG_SCORES.
    """
    rules = _rules(field, scores, ties)
    parts = [_part(field, rules, part) for part in _parts(field, 1)]
    found = [_outcomes(*cut, cut[0].present[:, None]) for cut in parts]
    return {rule: np.concatenate([of_part[rule][:, 0] for of_part in found]) for rule in found[0]}


def of_score(found: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """The rules of one score, and the references, without its name: "prm" for "prm/NAME"."""
    by_score = {rule: found[f"{rule}/{name}"] for rule in ("weighted_vote", "prm")}
    return {**{rule: found[rule] for rule in REFERENCES}, **by_score}


def best_of_n(field: Field, scores: np.ndarray, name: str) -> dict[str, float | int]:
    """Accuracies over the questions, as fractions, by each rule of one score; and how many there are of what.

    Args:
      scores: [Q, C].
      name: of the score, which says how it votes; it does not come back.
    """
    found = of_score(outcomes(field, {name: scores}), name)
    num_questions, num_candidates = field.present.shape
    sizes = {"num_candidates": num_candidates, "num_questions": num_questions}
    return {**{rule: float(values.mean()) for rule, values in found.items()}, **sizes}


class Curves(NamedTuple):
    """Accuracy of each rule at N numbers of candidates, over sub-samples of them."""

    sizes: tuple[int, ...]  # [N]: 1, 2, 4, ..., C
    mean: dict[str, np.ndarray]  # by rule, [N]
    std: dict[str, np.ndarray]  # by rule, [N]: over the sub-samples, not an error of the mean; 0 at C


def curves(
    field: Field, scores: Mapping[str, np.ndarray], ties: Ties = "first", *, num_samples: int = 400, seed: int = 0
) -> Curves:
    """What every rule makes of fewer candidates: n of each question's own, drawn without replacement, in M sub-samples.

    A sub-sample is the same for all rules and scores, and that of fewer candidates is a part of that of more. A
    question with fewer than n uses all its own.

    Args:
      scores, ties: as for `outcomes`.
      num_samples: M; at n = C there is but one.
      seed: of the sub-samples.
    """
    width = field.present.shape[1]
    sizes = [2**power for power in range(width.bit_length()) if 2**power < width]
    rules, rng = _rules(field, scores, ties), np.random.default_rng(seed)
    totals = {rule: np.zeros((len(sizes), num_samples)) for rule in ("pass_at_1", "oracle", *rules.votes, *rules.ranks)}
    for part in _parts(field, num_samples) if sizes else ():
        cut = _part(field, rules, part)
        present = cut[0].present[:, None]
        keys = np.where(present, rng.random((len(present), num_samples, width)), np.inf)
        ordered = np.sort(keys, axis=-1)
        for number, size in enumerate(sizes):
            among = (keys <= ordered[..., size - 1 : size]) & present  # the n lowest keys
            for rule, values in _outcomes(*cut, among).items():
                totals[rule][number] += values.sum(axis=0)
    accuracies = {rule: total / len(field.present) for rule, total in totals.items()}
    whole = outcomes(field, scores, ties)
    return Curves(
        (*sizes, width),
        {rule: np.append(found.mean(axis=1), whole[rule].mean()) for rule, found in accuracies.items()},
        {rule: np.append(found.std(axis=1), 0.0) for rule, found in accuracies.items()},
    )


def run_accuracy(field: Field) -> np.ndarray:
    """Accuracy of the questions' first candidates, of their second ones, and so on: [C]."""
    return (field.correct & field.present).sum(axis=0) / field.present.sum(axis=0)


def tie_figures(field: Field, scores: np.ndarray) -> dict[str, float | int]:
    """How many questions' highest score is shared, and what that makes of best-of-N.

    num_shared: by several candidates. num_deciding: by right and wrong ones, so that the rule decides. first, last:
    accuracy by each rule; expected: where one of the equals is drawn.
    """
    picked = {ties: chosen(field, scores, ties)[:, None] for ties in ("first", "last")}
    by_rule = {ties: float(np.take_along_axis(field.correct, places, axis=1).mean()) for ties, places in picked.items()}
    equals = field.present & (scores == np.take_along_axis(scores, picked["first"], axis=1))
    right = (equals & field.correct).sum(axis=1) / equals.sum(axis=1)
    return {
        "num_shared": int((equals.sum(axis=1) > 1).sum()),
        "num_deciding": int(((right > 0) & (right < 1)).sum()),
        **by_rule,
        "expected": float(right.mean()),
    }


def by_group(found: Mapping[str, np.ndarray], labels: Sequence[str | None]) -> dict[str, dict[str, float | int]]:
    """Accuracies of groups of questions: {label: {rule: mean, "num_questions": n}}, in order of the labels.

    Args:
      found: {rule: [Q]}, of `outcomes`.
      labels: each question's, Q of them; those without one (None) are in no group.
    """
    table = {}
    for label in sorted({label for label in labels if label is not None}):
        members = np.array([one == label for one in labels])
        means = {rule: float(values[members].mean()) for rule, values in found.items()}
        table[label] = {**means, "num_questions": int(members.sum())}
    return table


class Interval(NamedTuple):
    """A mean with a 95% interval."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], num_samples: int = 10_000, seed: int = 0
) -> Interval:
    """The mean gain of `ours` over `theirs` on the same questions, with its 95% percentile interval.

    Args:
      ours, theirs: one array of per-question outcomes [Q] for each repetition of the experiment (each seed), paired by
        position. Both levels are resampled: repetitions first, then questions within each.
      num_samples: bootstrap samples.
      seed: of the resampling.
    """
    differences = [np.asarray(a) - np.asarray(b) for a, b in zip(ours, theirs, strict=True)]
    rng, count = np.random.default_rng(seed), len(differences)
    times_drawn = rng.multinomial(count, np.full(count, 1 / count), size=num_samples)  # [samples, repetitions]
    totals = np.zeros(num_samples)
    for times, values in zip(times_drawn.T, differences, strict=True):
        # Questions differ in few ways (0, 1, shares of a tie): a resample of them is a draw of counts.
        levels, counts = np.unique(values, return_counts=True)
        totals += rng.multinomial(times * len(values), counts / len(values)) @ levels / len(values)
    low, high = np.quantile(totals / count, (0.025, 0.975))
    return Interval(float(np.mean([values.mean() for values in differences])), float(low), float(high))


def sign_flip_p_value(ours: np.ndarray, theirs: np.ndarray, num_samples: int = 9_999, seed: int = 0) -> float:
    """Two-sided p-value of the mean difference of paired outcomes [Q], if each difference had either sign alike.

    Where all that differ do so by as much, as where no outcome is a share of a tie, that is McNemar's exact test: a
    binomial one of the questions that differ. Elsewhere signs are flipped at random, `num_samples` times (all ways to
    flip, where they are fewer).
    """
    differences = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    differences = differences[differences != 0]  # a question where both are alike has no sign
    if not len(differences):
        return 1.0
    if np.all(np.abs(differences) == np.abs(differences[0])):
        return float(binomtest(int((differences > 0).sum()), len(differences)).pvalue)
    rng, batch = np.random.default_rng(seed), max(1, _CELLS // len(differences))
    arguments = {"n_resamples": num_samples, "batch": batch, "rng": rng, "vectorized": True}
    return float(permutation_test((differences,), np.mean, permutation_type="samples", **arguments).pvalue)


class Gain(NamedTuple):
    """What one rule gains over another on the same questions."""

    interval: Interval  # of `paired_bootstrap`
    p_value: float  # of `sign_flip_p_value`


def gain(ours: np.ndarray, theirs: np.ndarray, seed: int = 0) -> Gain:
    """The mean gain of outcomes `ours` [Q] over `theirs` [Q], with its interval and its significance."""
    return Gain(paired_bootstrap([ours], [theirs], seed=seed), sign_flip_p_value(ours, theirs, seed=seed))


class LengthEffect(NamedTuple):
    """How a score goes with the candidates' length."""

    correlation: float | None  # Spearman's, over all candidates; None where all scores or all lengths are equal
    within_questions: float | None  # mean of the questions' own correlations, over those that have one
    num_questions: int  # that have one
    mean_length: float  # over questions, of their candidates' mean
    mean_chosen: float  # over questions, of the candidate with the highest score


def length_effect(field: Field, scores: np.ndarray, lengths: np.ndarray, ties: Ties = "first") -> LengthEffect:
    """Whether the score prefers long candidates or short ones.

    Args:
      scores: [Q, C].
      lengths: [Q, C], in steps or tokens.
      ties: among equal highest scores.
    """
    every = scores[field.present][None], lengths[field.present][None], np.ones((1, field.present.sum()), bool)
    overall = _spearman(*every)[0]
    own = _spearman(scores, lengths, field.present)
    own = own[~np.isnan(own)]
    picked = np.take_along_axis(lengths, chosen(field, scores, ties)[:, None], axis=1)
    return LengthEffect(
        None if np.isnan(overall) else float(overall),
        float(own.mean()) if len(own) else None,
        len(own),
        float(np.mean(lengths.mean(axis=1, where=field.present))),
        float(picked.mean()),
    )


def _spearman(x: np.ndarray, y: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Row by row, of the columns in `mask`: [R, L] -> [R]; NaN where there is none, as either is constant."""

    def centred(values: np.ndarray) -> np.ndarray:
        ranks = rankdata(np.where(mask, values, np.nan), axis=1, nan_policy="omit")
        return np.where(mask, ranks - ranks.mean(axis=1, keepdims=True, where=mask), 0.0)

    x, y = centred(x), centred(y)
    scale = np.sqrt(np.square(x).sum(axis=1) * np.square(y).sum(axis=1))
    return np.divide((x * y).sum(axis=1), scale, out=np.full(len(x), np.nan), where=scale > 0)


def scores_by_length(field: Field, scores: np.ndarray, lengths: np.ndarray) -> dict[int, dict[str, float | int]]:
    """Mean score of the candidates of each length: {length: {"mean_score", "num_candidates"}}, in order of length."""
    lengths, scores = lengths[field.present].astype(int), scores[field.present]
    groups = {int(length): scores[lengths == length] for length in np.unique(lengths)}
    return {
        length: {"mean_score": float(members.mean()), "num_candidates": len(members)}
        for length, members in groups.items()
    }
