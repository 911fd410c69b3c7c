"""Membership inference: on a model that overfits, on one that never saw a record, under noise."""

import math

import numpy as np
import pytest
from scipy import stats
from secret_keepers import (
    as_language_model,
    overfit,
    random_records,
    small_decoder,
    train_with_noise,
)

from mutirao.errors import DataError, InputError
from mutirao.evaluate.losses import TextResult, evaluate_examples
from mutirao.evaluate.outcomes import auroc
from mutirao.evaluate.privacy.membership import (
    calibrated_scores,
    evaluate_membership,
    likelihood_ratio_scores,
    loss_scores,
)


def text_result(losses, tokens):
    return TextResult(
        loss=sum(losses) / sum(tokens),
        num_tokens=sum(tokens),
        record_losses=tuple(losses),
        record_tokens=tuple(tokens),
    )


def test_scores_are_per_token():
    target, reference = text_result([2.0, 9.0], [2, 3]), text_result([4.0, 6.0], [2, 3])
    assert loss_scores(target).tolist() == [-1.0, -3.0]
    assert calibrated_scores(target, reference).tolist() == [1.0, -1.0]
    with pytest.raises(DataError, match="cannot be compared"):
        calibrated_scores(target, text_result([4.0, 6.0], [2, 4]))


def test_area_and_rates_of_normal_scores():
    """Two normals one deviation apart: both figures are known."""
    rng = np.random.default_rng(0)
    result = evaluate_membership(
        rng.normal(1.0, 1.0, 4000), rng.normal(size=4000), false_positive_rates=[0.01, 0.001]
    )
    assert result.auc == pytest.approx(stats.norm.cdf(1 / math.sqrt(2)), abs=0.02)
    assert result.auc_low < stats.norm.cdf(1 / math.sqrt(2)) < result.auc_high
    assert result.auc_high - result.auc_low < 0.03
    for found in result.rates:
        asked = found.asked_false_positive_rate
        expected = stats.norm.sf(stats.norm.isf(asked) - 1)
        assert found.num_false_positives == round(asked * 4000)
        assert found.rate == pytest.approx(expected, abs=0.02)
        assert (found.low, found.high) == pytest.approx(
            stats.binomtest(round(found.rate * 4000), 4000).proportion_ci(0.95, "exact"), abs=1e-9
        )


def test_area_with_ties_as_elsewhere():
    rng = np.random.default_rng(1)
    members, others = rng.integers(0, 5, 40), rng.integers(0, 5, 30)
    result = evaluate_membership(members, others, false_positive_rates=[])
    expected = auroc([*members.tolist(), *others.tolist()], [1] * 40 + [0] * 30)
    assert result.auc == pytest.approx(expected)


def test_ties_never_accuse_more_than_allowed():
    found = evaluate_membership([1.0] * 10, [1.0] * 200, false_positive_rates=[0.01]).rates[0]
    assert (found.num_false_positives, found.rate) == (0, 0.0)


def test_too_few_others_for_a_rate():
    evaluate_membership([1.0], [0.0] * 100, false_positive_rates=[0.01], num_resamples=2)
    with pytest.raises(DataError, match=r"0\.100% .* on 100 non-members \(expected at least 1000"):
        evaluate_membership([1.0], [0.0] * 100, false_positive_rates=[0.01, 0.001])


def test_bad_input():
    with pytest.raises(DataError, match="at least one member"):
        evaluate_membership([], [1.0])
    with pytest.raises(DataError, match="not finite"):
        evaluate_membership([math.nan], [1.0])
    with pytest.raises(InputError, match="false positive rate"):
        evaluate_membership([1.0], [1.0], false_positive_rates=[1.0])


def shadow_statistics(num_shadows=16, num_records=400, seed=0):
    """Records differ far more in difficulty than by whether they were learned."""
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(0.0, 5.0, num_records)
    half = np.arange(num_shadows)[:, None] < num_shadows // 2
    shadows = rng.permuted(np.broadcast_to(half, (num_shadows, num_records)), axis=0)
    is_in = np.concatenate([rng.integers(0, 2, (1, num_records)).astype(bool), shadows])
    statistics = difficulty + is_in + 0.5 * rng.normal(size=is_in.shape)
    return statistics[0], statistics[1:], is_in[1:], is_in[0]


def test_likelihood_ratios_find_what_the_plain_statistic_does_not():
    target, shadows, is_in, is_member = shadow_statistics()
    ratios = likelihood_ratio_scores(target, shadows, is_in)
    better = evaluate_membership(ratios[is_member], ratios[~is_member])
    plain = evaluate_membership(target[is_member], target[~is_member])
    assert better.auc > 0.85
    assert plain.auc < 0.65
    # The sum that it is, for one record.
    mine, record = shadows[:, 0], is_in[:, 0]
    deviations = [
        math.sqrt(
            sum(((shadows[c[:, n], n] - shadows[c[:, n], n].mean()) ** 2).sum() for n in range(400))
            / (c.sum() - 400)
        )
        for c in (is_in, ~is_in)
    ]
    expected = stats.norm.logpdf(target[0], mine[record].mean(), deviations[0])
    expected -= stats.norm.logpdf(target[0], mine[~record].mean(), deviations[1])
    assert ratios[0] == pytest.approx(expected)


def test_likelihood_ratios_refuse_what_they_cannot_fit():
    target, shadows, is_in, _ = shadow_statistics()
    with pytest.raises(DataError, match="do not fit"):
        likelihood_ratio_scores(target[1:], shadows, is_in)
    with pytest.raises(DataError, match="fewer than two shadow models"):
        likelihood_ratio_scores(target, shadows, np.ones_like(is_in))


def attack(train):
    """AUC by calibrated and by plain loss, after ``train(model, members)``."""
    records = random_records(260, 14, seed=2)
    members, others = records[:60], records[60:]
    model = small_decoder()
    scorer = as_language_model(model)
    before = [evaluate_examples(scorer, [[e] for e in group]) for group in (members, others)]
    train(model, members)
    after = [evaluate_examples(scorer, [[e] for e in group]) for group in (members, others)]
    calibrated = [calibrated_scores(*pair) for pair in zip(after, before, strict=True)]
    return evaluate_membership(*calibrated), evaluate_membership(*map(loss_scores, after))


def test_an_overfitted_model_is_seen_through():
    calibrated, plain = attack(lambda model, members: overfit(model, members, num_epochs=25))
    assert calibrated.auc > 0.95
    assert calibrated.rates[0].low > 0.3
    assert plain.auc > 0.9


def test_a_model_that_saw_no_record_gives_nothing_away():
    others = random_records(60, 14, seed=5)
    calibrated, _ = attack(lambda model, members: overfit(model, others, num_epochs=25))
    assert calibrated.auc_low < 0.5 < calibrated.auc_high


def test_noise_brings_the_attack_down():
    def train(model, members):
        units = [(member,) for member in members]
        train_with_noise(model, units, noise_multiplier=4.0, num_steps=20, units_per_step=12)

    calibrated, _ = attack(train)
    assert calibrated.auc < 0.7
    assert calibrated.rates[0].rate < 0.2
