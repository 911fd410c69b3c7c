"""Which aggregation rules, secure aggregation, differential privacy and codecs go together.

Each conflict is between two choices, or within one, and has one sentence that says why; a
combination is sound when it holds none of them. ``check_combination`` refuses the others before
a run starts, ``compatibility_table`` writes them down for the documentation.

What is meant by the choices: *secure aggregation* adds masked integers modulo a power of two, so
the coordinator learns the sum and nothing else. *Record-level privacy* is DP-SGD inside each
site: what leaves it is private already, and whatever is done to it afterwards stays so.
*Client-level privacy* clips each site's whole update and adds noise to the sum of them.

Sound here means exact but for rounding, and private as claimed; not that it trains well. Under
client-level privacy the clip must hold for what is decoded, since rounding can lead beyond it.

Nor does sound mean built: ``check_plan`` also refuses what runs cannot do, as client-level privacy,
which no plan can ask for. Separate means of A and B are refused unless a plan asks for them by
that name, for comparison.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from mutirao.errors import InputError
from mutirao.federated.aggregation.robust import check_krum, trimmed_rule

if TYPE_CHECKING:
    from mutirao.federated.plan import Plan

MIN_COHORT = 3
"""Fewest sites of secure aggregation: of two, each learns the other's update from the sum."""


class Rule(StrEnum):
    """How updates become one."""

    TOKEN_MEAN = "token-weighted mean"
    EQUAL_MEAN = "equal mean"
    SEPARATE_FACTOR_MEANS = "separate means of A and B"
    FEDEX = "FedEx-LoRA"
    STACKED = "stacked LoRA"
    MEDIAN = "coordinate-wise median"
    TRIMMED_MEAN = "trimmed mean"
    KRUM = "Krum"
    MULTI_KRUM = "multi-Krum"


class Secrecy(StrEnum):
    """What the coordinator sees of one site's update."""

    PLAIN = "single updates seen"
    SECURE = "secure aggregation"


class Privacy(StrEnum):
    """Differential privacy, and whose."""

    NONE = "no differential privacy"
    RECORD = "record-level privacy"
    CLIENT = "client-level privacy"


class Encoding(StrEnum):
    """How values lie on the wire."""

    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"
    INT2 = "int2"
    TOP_K = "top-k"
    FIXED_POINT = "fixed point"
    """Integers with a step that all sites share."""


class Feedback(StrEnum):
    """Error feedback, and where the clip of an update stands."""

    NONE = "no error feedback"
    THEN_CLIP = "error feedback, then clip"
    AFTER_CLIP = "error feedback after the clip"


Choice = Rule | Secrecy | Privacy | Encoding | Feedback


@dataclass(frozen=True)
class Combination:
    """What a run would do with its updates."""

    rule: Rule = Rule.TOKEN_MEAN
    """How updates become one."""
    secrecy: Secrecy = Secrecy.PLAIN
    """What the coordinator sees."""
    privacy: Privacy = Privacy.NONE
    """Differential privacy."""
    encoding: Encoding = Encoding.INT8
    """Values on the wire."""
    feedback: Feedback = Feedback.NONE
    """Error feedback."""

    @property
    def choices(self) -> tuple[Choice, ...]:
        """All five, in the order of the fields."""
        return self.rule, self.secrecy, self.privacy, self.encoding, self.feedback


@dataclass(frozen=True)
class Conflict:
    """Choices that do not go together: any of the first with any of the second."""

    first: frozenset[Choice]
    """Some choices of one kind."""
    second: frozenset[Choice]
    """Some choices of another kind; empty where the first is unsound by itself."""
    reason: str
    """One sentence that says why."""

    def holds(self, *choices: Choice) -> bool:
        """Whether this conflict is among some choices."""
        return any(one in self.first for one in choices) and (
            not self.second or any(one in self.second for one in choices)
        )


_ROBUST = frozenset({Rule.MEDIAN, Rule.TRIMMED_MEAN, Rule.KRUM, Rule.MULTI_KRUM})
_BY_FACTORS = frozenset({Rule.FEDEX, Rule.STACKED})
_BLOCK_SCALES = frozenset({Encoding.INT8, Encoding.INT4, Encoding.INT2})
_SECURE: frozenset[Choice] = frozenset({Secrecy.SECURE})
_CLIENT: frozenset[Choice] = frozenset({Privacy.CLIENT})

CONFLICTS: tuple[Conflict, ...] = (
    Conflict(
        frozenset({Rule.SEPARATE_FACTOR_MEANS}),
        frozenset(),
        "The mean of B times the mean of A is not the mean of the products BA; freeze A, or "
        "aggregate by FedEx-LoRA or stacking.",
    ),
    Conflict(
        _ROBUST,
        _SECURE,
        "Robust rules compare single updates, which secure aggregation hides; bound each site's "
        "update by a clip instead.",
    ),
    Conflict(
        _BY_FACTORS,
        _SECURE,
        "FedEx-LoRA and stacking need each site's own factors, and secure aggregation gives sums "
        "alone; freeze A, so that a sum is enough.",
    ),
    Conflict(
        frozenset({Encoding.TOP_K}),
        _SECURE,
        "Each site keeps other places, so masked values of different coordinates would be added; "
        "send the tensor whole, in fixed point.",
    ),
    Conflict(
        _BLOCK_SCALES,
        _SECURE,
        "Each site's blocks have scales of their own, so a sum of masked codes has no meaning; "
        "use fixed point, whose step all sites share.",
    ),
    Conflict(
        frozenset({Encoding.FP32, Encoding.BF16}),
        _SECURE,
        "Masks cancel in integers modulo a power of two, not in floats that are rounded; use "
        "fixed point.",
    ),
    Conflict(
        frozenset({Feedback.AFTER_CLIP}),
        _CLIENT,
        "A residual that is added after the clip makes an update larger than the sensitivity "
        "that the noise is made for; clip after it is added.",
    ),
    Conflict(
        frozenset({Rule.TOKEN_MEAN}),
        frozenset({Privacy.RECORD, Privacy.CLIENT}),
        "Token counts tell of the records without any noise, and a weight multiplies the "
        "sensitivity; use the equal mean.",
    ),
    Conflict(
        frozenset({Rule.TOKEN_MEAN}),
        _SECURE,
        "Weights by tokens are in clear and tell a site's size, which the sum was to hide; use "
        "the equal mean.",
    ),
    Conflict(
        _ROBUST,
        _CLIENT,
        "The noise is made for a sum of clipped updates, and a rule that selects among them has "
        "another sensitivity; use the equal mean.",
    ),
    Conflict(
        _BY_FACTORS,
        _CLIENT,
        "Clip and noise bound a site's factors, and their product has another sensitivity; "
        "freeze A and use the equal mean.",
    ),
    Conflict(
        frozenset({Rule.MEDIAN, Rule.TRIMMED_MEAN}),
        frozenset({Encoding.TOP_K}),
        "Where most sites leave a coordinate out, its median or trimmed mean is zero whatever "
        "the others sent; send tensors whole, or use multi-Krum.",
    ),
    Conflict(
        frozenset({Rule.STACKED}),
        frozenset({Feedback.THEN_CLIP, Feedback.AFTER_CLIP}),
        "Stacked factors begin anew in each round, so a residual of the round before belongs to "
        "others; leave error feedback out.",
    ),
)


def find_conflicts(combination: Combination) -> list[str]:
    """Return why a combination is unsound, a sentence for each conflict; none where it is sound."""
    return [each.reason for each in CONFLICTS if each.holds(*combination.choices)]


def check_combination(combination: Combination) -> None:
    """Refuse an unsound combination before anything starts.

    Raises:
        InputError: with its choices, and every reason.
    """
    if reasons := find_conflicts(combination):
        chosen = ", ".join(combination.choices)
        raise InputError(f"this combination is not sound ({chosen}): {' '.join(reasons)}")


def plan_combination(plan: Plan) -> Combination:
    """Return what a plan would do with its updates."""
    federated = plan.federated
    upload = federated.upload
    is_secure = federated.secure is not None
    encoding = Encoding.TOP_K if upload.is_sparse else Encoding(upload.format)
    return Combination(
        rule=_plan_rule(plan),
        secrecy=Secrecy.SECURE if is_secure else Secrecy.PLAIN,
        privacy=Privacy.RECORD if federated.privacy is not None else Privacy.NONE,
        encoding=Encoding.FIXED_POINT if is_secure else encoding,
        feedback=Feedback.AFTER_CLIP if federated.error_feedback else Feedback.NONE,
    )


def _plan_rule(plan: Plan) -> Rule:
    federated = plan.federated
    match federated.aggregation:
        case "mean" if plan.lora is not None and not plan.lora.freeze_a:
            return Rule.SEPARATE_FACTOR_MEANS
        case "mean":
            return Rule.TOKEN_MEAN if federated.weighting == "tokens" else Rule.EQUAL_MEAN
        case other:
            return _RULES[other]


_RULES = {
    "separate": Rule.SEPARATE_FACTOR_MEANS,
    "fedex": Rule.FEDEX,
    "stacked": Rule.STACKED,
    "median": Rule.MEDIAN,
    "trimmed_mean": Rule.TRIMMED_MEAN,
    "krum": Rule.KRUM,
    "multi_krum": Rule.MULTI_KRUM,
}


def check_plan(plan: Plan, num_sites: int) -> None:
    """Refuse a plan that is unsound, or that so few sites cannot carry out.

    Args:
        plan: of the run.
        num_sites: sites of the run.

    Raises:
        InputError: with every reason.
    """
    combination = plan_combination(plan)
    reasons = find_conflicts(combination)
    if plan.federated.weighting == "tokens" and combination.rule not in _ROBUST:
        weighted = find_conflicts(replace(combination, rule=Rule.TOKEN_MEAN))
        reasons += [reason for reason in weighted if reason not in reasons]
    if plan.federated.aggregation == "separate":  # by name, for comparison
        reasons = [reason for reason in reasons if reason != CONFLICTS[0].reason]
    reasons += _find_unbuilt(plan) + _find_too_few(plan, num_sites)
    if reasons:
        chosen = ", ".join(combination.choices)
        raise InputError(f"this plan is not sound ({chosen}): {' '.join(reasons)}")


def _find_unbuilt(plan: Plan) -> list[str]:
    """Return a sentence for each setting that would have no effect."""
    federated = plan.federated
    found = []
    if federated.turns > 1 and _plan_rule(plan) in _BY_FACTORS:
        found.append(
            f"federated.turns is not built for aggregation={federated.aggregation}; let all sites "
            "train in every round."
        )
    if federated.second_moments and plan.lora is not None:
        found.append(
            "federated.second_moments are of all weights, and this plan trains an adapter; leave "
            "them out."
        )
    if federated.second_moments and federated.privacy is not None:
        found.append(
            "federated.second_moments are of gradients without the noise of differential privacy; "
            "leave them out."
        )
    if federated.secure is None:
        return found
    if federated.turns > 1:
        found.append(
            "federated.turns is not built for secure aggregation, and small groups would hide "
            "less; let all sites train in every round."
        )
    if federated.error_feedback:
        found.append("federated.error_feedback is not built for secure aggregation; leave it out.")
    if federated.max_update_norm is not None:
        found.append(
            "federated.max_update_norm cannot be checked under secure aggregation; "
            "federated.secure.clip bounds every value instead."
        )
    return found


def _find_too_few(plan: Plan, num_sites: int) -> list[str]:
    federated = plan.federated
    found = []
    group = num_sites // federated.turns
    if group == 0:
        found.append(
            f"federated.turns={federated.turns} is more than the {num_sites} sites of the run."
        )
    elif federated.quorum > group:
        whole = "the run" if federated.turns == 1 else "a turn"
        found.append(
            f"federated.quorum={federated.quorum} is more than the {group} sites of {whole}."
        )
    fewest = federated.quorum or group
    try:
        if federated.aggregation == "trimmed_mean":
            trimmed_rule(fewest, federated.num_faulty)
        if federated.aggregation in ("krum", "multi_krum"):
            check_krum(fewest, federated.num_faulty)
    except InputError as error:
        found.append(f"federated.{error}.")
    if federated.secure is not None:
        threshold = federated.secure.threshold or 0
        if num_sites < MIN_COHORT or threshold > num_sites:
            found.append(
                f"Secure aggregation needs at least {max(MIN_COHORT, threshold)} sites, and the "
                f"run has {num_sites}."
            )
    return found


def compatibility_table() -> str:
    """Return the matrix as a Markdown table for the documentation.

    A cell says whether the two choices go together; a number names the sentence below it that
    says why not. Since every conflict is between two choices or within one, the pairs tell all.
    """
    columns: tuple[Choice, ...] = (
        Secrecy.SECURE,
        *tuple(Privacy)[1:],
        Encoding.TOP_K,
        *tuple(Feedback)[1:],
    )
    rows: tuple[Choice, ...] = (*Rule, *Encoding, *tuple(Feedback)[1:])
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = (_cell(row, column) for column in columns)
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    notes = [f"{number}. {each.reason}" for number, each in enumerate(CONFLICTS, 1)]
    return "\n".join([*lines, "", *notes]) + "\n"


def _cell(row: Choice, column: Choice) -> str:
    if type(row) is type(column):
        return ""
    numbers = [str(i) for i, each in enumerate(CONFLICTS, 1) if each.holds(row, column)]
    return f"no ({', '.join(numbers)})" if numbers else "yes"
