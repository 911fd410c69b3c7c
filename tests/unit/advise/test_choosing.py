"""Which candidate is taken, and what is said of it."""

from __future__ import annotations

import pytest

from mutirao.advise.choosing import Candidate, Speed, choose, explain, mark_pareto
from mutirao.advise.config import Budget
from mutirao.advise.measuring import Measured
from mutirao.advise.ways import Way
from mutirao.compress.loss import CompressionLoss
from mutirao.errors import InputError
from mutirao.precision.fit import Prediction

LOSS = 3.0


def _candidate(bits, num_bytes, rise, half=0.0, *, speed=None, group_size=32):
    return Candidate(
        Way("rtn", bits, group_size),
        0.01,
        num_bytes,
        float(bits),
        Prediction(rise, rise - half, rise + half),
        None,
        speed,
    )


CANDIDATES = mark_pareto(
    [
        _candidate(8, 800, 0.001, 0.001),
        _candidate(4, 400, 0.05, 0.02),
        _candidate(3, 350, 0.30, 0.05),
        _candidate(4, 420, 0.06, 0.02, group_size=64),
        _candidate(2, 250, 2.0, 0.5),
    ]
)


def test_pareto_leaves_out_what_is_larger_and_worse():
    marked = {str(each.way): each.is_pareto for each in CANDIDATES}
    assert marked.pop("4 bits in groups of 64 by rtn") is False
    assert all(marked.values())
    assert [each.total_bytes for each in CANDIDATES] == [250, 350, 400, 420, 800]


@pytest.mark.parametrize(
    ("budget", "bits"),
    [
        (Budget(disk_bytes=500), 4),
        (Budget(disk_bytes=360), 3),
        (Budget(), 8),
        (Budget(loss_share=0.024), 4),  # 0.072 nats: 4 bits may cost 0.07
        (Budget(loss_share=0.022), 8),  # 0.066 nats: the interval's end is over it
        (Budget(loss_share=1.0), 2),
        (Budget(loss_share=0.2, disk_bytes=450), 3),
    ],
)
def test_the_choice_keeps_to_the_budget(budget, bits):
    assert choose(CANDIDATES, budget, LOSS).way.bits == bits


def test_an_impossible_budget_says_what_would_do():
    with pytest.raises(InputError) as caught:
        choose(CANDIDATES, Budget(disk_bytes=100, loss_share=0.01), LOSS)
    said = str(caught.value)
    assert said.startswith("no way of rounding keeps to 100 B of disk and a rise of at most 1.00%")
    assert "the smallest, 2 bits in groups of 32 by rtn, takes 250 B" in said
    assert "the gentlest, 8 bits in groups of 32 by rtn" in said


def test_what_is_resident_goes_before_what_is_streamed():
    speed = Speed("Q4_0", resident_bytes=600, least_bytes=100, tokens_per_s=1.0)
    large = _candidate(8, 800, 0.001, speed=Speed("Q8_0", 1000, 200, 0.5))
    small = _candidate(4, 400, 0.05, speed=speed)
    assert choose([large, small], Budget(memory_bytes=700), LOSS) is small
    assert choose([large, small], Budget(memory_bytes=300), LOSS) is large
    with pytest.raises(InputError, match="memory"):
        choose([large, small], Budget(memory_bytes=50), LOSS)


def test_what_was_measured_goes_before_what_was_foretold():
    loss = CompressionLoss(3.0, 3.1, 0.1, 0.01, 0.09, 1000)
    way = Way("rtn", 4, 32)
    candidate = Candidate(way, 0.01, 400, 4.0, Prediction(9.0, 8.0, 10.0), Measured(way, loss))
    assert candidate.rise.mean == 0.1
    assert candidate.rise.high == pytest.approx(0.1196)


def test_the_sentence_has_the_reason():
    chosen = choose(CANDIDATES, Budget(loss_share=0.024), LOSS)
    said = explain(chosen, CANDIDATES, Budget(loss_share=0.024), LOSS)
    assert "Take 4 bits in groups of 32 by rtn: 400 B" in said
    assert "rises by 1.67% ± 0.67% (predicted)" in said
    assert "3 bits in groups of 32 by rtn, may cost 11.67%, over the 2.40% allowed" in said
    tight = explain(CANDIDATES[1], CANDIDATES, Budget(disk_bytes=360), LOSS)
    assert "the next better, 4 bits in groups of 32 by rtn, takes 400 B" in tight
