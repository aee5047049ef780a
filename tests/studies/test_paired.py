"""Paired differences, Student's t and Holm's adjustment, against scipy and by hand."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sape2.studies.compare.paired import Paired, holm, paired_difference
from sape2.studies.compare.summary import Summary, grouped, numbers, summarize

A = {0: 0.812, 1: 0.807, 2: 0.821, 3: 0.809, 4: 0.815}
B = {0: 0.805, 1: 0.806, 2: 0.811, 3: 0.811, 4: 0.804}


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_difference_interval_and_p_are_those_of_scipy(n):
    a, b = ({seed: values[seed] for seed in range(n)} for values in (A, B))
    found, wanted = paired_difference(a, b), stats.ttest_rel(list(a.values()), list(b.values()))
    interval = wanted.confidence_interval(0.95)
    assert (found.n, found.p) == (n, pytest.approx(wanted.pvalue, rel=1e-9))
    assert (found.ci_low, found.ci_high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.difference == pytest.approx(sum(a[s] - b[s] for s in range(n)) / n)


def test_a_difference_by_hand():
    """d = 1, 2, 3: mean 2, s 1, t = 2 √3; with 2 degrees of freedom p = 1 - t/√(2 + t²), and t(0.975) = 4.302653."""
    found = paired_difference({0: 2.0, 1: 4.0, 2: 6.0}, {0: 1.0, 1: 2.0, 2: 3.0})
    half = 4.302653 / math.sqrt(3)
    assert (found.difference, found.std) == (2, 1)
    assert found.p == pytest.approx(1 - math.sqrt(12 / 14))
    assert (found.ci_low, found.ci_high) == pytest.approx((2 - half, 2 + half), rel=1e-6)


def test_only_seeds_that_both_have_are_paired():
    assert paired_difference(A | {9: 0.1}, {seed: B[seed] for seed in (1, 3)} | {8: 0.9}) == paired_difference(
        {seed: A[seed] for seed in (1, 3)}, {seed: B[seed] for seed in (1, 3)}
    )
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_one_pair_gives_no_spread_no_interval_and_no_p():
    assert paired_difference({3: 0.75}, {3: 0.5}) == Paired(1, 0.25)


@pytest.mark.parametrize("step", [0.0, 0.1])
def test_equal_differences_give_no_interval_and_no_p(step):
    """Rounding leaves a spread of 1e-17, which would give p = 1e-16 and an interval of no width."""
    found = paired_difference({s: v + step for s, v in A.items()}, A)
    assert (found.ci_low, found.ci_high, found.p) == (None, None, None)


def test_one_image_more_of_fifty_thousand_under_every_seed_is_an_equal_difference():
    """The rounding of an accuracy is then larger than 1e-12 of the difference; it gave p = 3e-24."""
    right = (500, 20_000, 31_000)
    found = paired_difference(*({seed: (n + more) / 50_000 for seed, n in enumerate(right)} for more in (1, 0)))
    assert (found.ci_low, found.ci_high, found.p) == (None, None, None)
    assert found.difference == pytest.approx(2e-5)


@pytest.mark.parametrize("missing", [math.nan, math.inf, None])
def test_what_is_not_finite_is_not_measured(missing):
    assert paired_difference({0: missing, 1: 0.75}, {0: 0.5, 1: 0.5}) == Paired(1, 0.25)
    found = summarize({"ape": {0: 0.5, 1: 0.5}, "rope": {0: missing, 1: 0.75}, "none": {0: missing}}, "ape")
    assert {name: (summary.mean, summary.n) for name, summary in found.items()} == {"ape": (0.5, 2), "rope": (0.75, 1)}


def test_pairs_may_be_named_by_anything():
    assert paired_difference({None: 2, "a": 4}, {"a": 1, None: 1}) == paired_difference({0: 2, 1: 4}, {0: 1, 1: 1})


def test_holm_by_hand():
    """0.005 x 4, 0.01 x 3, 0.03 x 2, then 0.04 x 1 raised to the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, None, 0.6]) == [1.0, None, 1.0]
    assert holm([0.01, math.nan, 0.02, 0.001]) == pytest.approx([0.02, None, 0.02, 0.003])
    assert holm([]) == []


p_values = st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=8)


@settings(max_examples=40, deadline=None)
@given(p_values)
def test_holm_keeps_the_order_and_never_lowers(values):
    pairs = [(p, q) for p, q in zip(values, holm(values), strict=True) if p is not None]
    assert all(p <= q <= 1 for p, q in pairs)
    assert [q for _, q in sorted(pairs)] == sorted(q for _, q in pairs)
    assert all(q <= min(1, p * len(pairs)) for p, q in pairs)  # never above Bonferroni


seeds = st.dictionaries(st.integers(0, 5), st.floats(0, 1).map(lambda x: round(x, 4)))


@settings(max_examples=40, deadline=None)
@given(seeds, seeds)
def test_exchanging_the_two_turns_the_sign_and_nothing_else(a, b):
    one, other = paired_difference(a, b), paired_difference(b, a)
    if one is None:
        assert other is None
        return
    assert other.difference == pytest.approx(-one.difference)
    assert (one.ci_low is None) == (other.ci_low is None)
    if one.p is not None:
        assert one.ci_low < one.difference < one.ci_high
        assert (other.ci_low, other.ci_high) == pytest.approx((-one.ci_high, -one.ci_low))
        assert other.p == pytest.approx(one.p)


# --- summaries -------------------------------------------------------------------------------------------------------


def rows_of(**values):
    return [{"encoding": name, "seed": seed, "value": value} for name, some in values.items() for seed, value in some.items()]


def test_a_group_is_compared_with_the_baseline_and_p_adjusted_over_the_groups():
    found = summarize(grouped(rows_of(ape=B, sape2=A, none={0: 0.7, 1: 0.72, 2: 0.69}, rope={7: 0.9})), "ape")
    assert list(found) == ["ape", "sape2", "none", "rope"]
    assert found["sape2"].pair == paired_difference(A, B)
    assert found["none"].p_holm == pytest.approx(min(1, 2 * found["none"].pair.p))
    assert (found["rope"].pair, found["ape"].pair, found["rope"].n) == (None, None, 1)
    assert numbers(found["none"])["std"] == pytest.approx(stats.tstd([0.7, 0.72, 0.69]))
    assert summarize({"ape": B})["ape"].pair is None


def test_two_rows_of_one_run_are_no_two_seeds():
    with pytest.raises(ValueError, match="there are two rows of ape, seed 0"):
        grouped([*rows_of(ape={0: 0.5}), *rows_of(ape={0: 0.6})])


@pytest.mark.parametrize(
    ("gain", "p_holm", "level", "verdict"),
    [
        ((0.02, 0.01, 0.03), 0.04, None, "higher"),
        ((-0.02, -0.03, -0.01), 0.04, 0.015, "lower"),
        ((0.02, 0.019, 0.021), 0.06, 0.05, "unresolved"),  # the interval is without 0, and Holm's p is not below 0.05
        ((-0.004, 0.0, 0.005), 1.0, 0.015, "level"),
        ((-0.004, 0.0, 0.005), 1.0, None, "unresolved"),
        ((-0.02, 0.0, 0.03), 1.0, 0.015, "unresolved"),
        ((-0.02, 0.0, 0.03), None, 0.015, ""),
    ],
)
def test_a_verdict_is_of_holms_p_and_of_how_narrow_the_interval_is(gain, p_holm, level, verdict):
    pair = paired_difference(dict(enumerate(gain)), dict.fromkeys(range(3), 0.0))
    assert Summary(0.5, 0.1, 3, pair, p_holm).verdict(level) == verdict
    assert Summary(0.5, None, 1, Paired(1, 0.3)).verdict(level) == ""
