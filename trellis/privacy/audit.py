"""What a training gave away, measured: a lower bound on epsilon from guesses about canaries, after one run.

Each of m canaries is in the data or out by a fair coin of its own.  Whoever sees the result guesses r of the coins and
abstains on the rest.  Under (epsilon, delta)-DP a guess is right at most as often as randomized response would be, with
probability e^epsilon / (e^epsilon + 1), apart from what delta allows; too many right guesses refute the claim.

The accountant says that epsilon is at most so much, if the code does what it is charged for; an audit says that it is
at least so much, whatever the code does.  It finds bugs and proves nothing: with m = 1000 the bound stays far below a
true epsilon, and a low one is no evidence of privacy.
Steinke, Nasr, Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023, https://arxiv.org/abs/2305.08846
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

HALVINGS = 50


def epsilon_lower_bound(
    num_guesses: int, num_correct: int, *, num_canaries: int, delta: float, confidence: float = 0.95
) -> float:
    """The largest epsilon known to be refuted at this delta; 0 if none is.

    Of an (epsilon, delta)-DP training it exceeds epsilon with probability 1 - confidence at most, if `num_guesses` was
    fixed before the scores were seen: the best of several bounds is none.
    """
    if not 0.5 < confidence < 1:
        raise ValueError(f"{confidence=}: it must be above 1/2 and below 1")

    def refuted(epsilon: float) -> bool:
        found = p_value(epsilon, num_guesses, num_correct, num_canaries=num_canaries, delta=delta)
        return found <= 1 - confidence

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):  # it ends: with epsilon every guess may be right
        low, high = high, 2 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def p_value(epsilon: float, num_guesses: int, num_correct: int, *, num_canaries: int, delta: float) -> float:
    """The most probability that (epsilon, delta)-DP leaves to v or more right guesses of r.

    P[W >= v] + 2 m delta max over i in 1..v of P[v > W >= v - i] / i, for W ~ Binomial(r, e^epsilon / (e^epsilon + 1)).
    Steinke et al., Theorem 5.2; an i above v only lowers the quotient.
    """
    r, v, m = num_guesses, num_correct, num_canaries
    if not 0 <= v <= r <= m or not 0 <= delta <= 1 or not 0 <= epsilon < math.inf:
        raise ValueError(f"{epsilon=}, {num_guesses=}, {num_correct=}, {num_canaries=}, {delta=}")
    if v == 0:
        return 1.0
    w = _binomial(r, epsilon)
    at_least_v = float(w[v:].sum())
    by_delta = float((w[:v][::-1].cumsum() / np.arange(1, v + 1)).max())
    return min(at_least_v + 2 * m * delta * by_delta, 1.0)


def count_correct(scores_m: npt.ArrayLike, is_in_m: npt.ArrayLike, *, num_guesses: int) -> int:
    """How many guesses are right: "in" for the higher half of `num_guesses` extreme scores, "out" for the lower.

    Ties go by position, which must say nothing of who is in.
    """
    scores, is_in = np.asarray(scores_m, np.float64), np.asarray(is_in_m, np.bool_)
    if scores.ndim != 1 or scores.shape != is_in.shape or not 0 <= num_guesses <= len(scores) or num_guesses % 2:
        raise ValueError(f"{scores.shape=}, {is_in.shape=}, {num_guesses=}: it must be even, and at most the canaries")
    if np.isnan(scores).any():
        raise ValueError("a score is not a number: nothing can be guessed from it")
    by_score, half = np.argsort(scores, kind="stable"), num_guesses // 2
    return int((~is_in[by_score[:half]]).sum() + is_in[by_score[len(scores) - half :]].sum())


def _binomial(r: int, epsilon: float) -> Floats:
    """P[W = k] for k in 0..r.  -> (r + 1,)"""
    log_factorials = np.concatenate([[0.0], np.log(np.arange(1, r + 1)).cumsum()])
    log_choices = log_factorials[r] - log_factorials - log_factorials[::-1]
    k = np.arange(r + 1)
    log_right, log_wrong = -np.logaddexp(0.0, -epsilon), -np.logaddexp(0.0, epsilon)
    found: Floats = np.exp(log_choices + k * log_right + (r - k) * log_wrong)
    return found
