"""The evidence sheet: what left a site and what protected it, on one A4 page, to be signed.

Made for somebody who answers for the text and does not read code. It says what is not
protected as plainly as what is; where the log is not whole, it says so first and in red. Ten
rounds fit on a page; longer tables go on over further pages. The page loads nothing and runs no
script, and strings of the log, which may come from other machines, are escaped.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mutirao import __version__
from mutirao.artifact import write_atomic
from mutirao.errors import AuditError, InputError
from mutirao.federated.audit.log import LOG_NAME
from mutirao.federated.messages import printable
from mutirao.federated.site.policy import ANY, PolicyRules
from mutirao.report.federation.attacks import AttackRow
from mutirao.report.federation.evidence import Evidence, RunEvidence, Shipment, read_evidence
from mutirao.report.federation.sentences import LANGUAGES, Language, Sentences
from mutirao.report.page import make_environment
from mutirao.report.summary import to_plain

MAX_SHOWN = 3
"""Values of a list that are printed before the rest is only counted, so that a page suffices."""


@dataclass(frozen=True)
class Row:
    """One line of the table of what left."""

    round: str
    time: str
    kind: str
    size: str
    tensors: str
    payload: str
    """Hash, or where the hashes are."""
    note: str
    is_hash: bool


def write_evidence(
    work: Path,
    *,
    policy: Path | None = None,
    key: str | None = None,
    attacks: Path | None = None,
    language: str = "en",
) -> Path:
    """Write the evidence sheet of a site into its work folder, and return its path.

    Args:
        work: the site's folder, which has ``audit.jsonl``.
        policy: the site's policy file; None leaves it out.
        key: the site's public key; None takes the one in the folder.
        attacks: results of the privacy attacks; None leaves them out.
        language: 'en' or 'pt-BR'.

    Raises:
        InputError: a file cannot be read, or the language is not one of the two.
        RecipeError: the policy cannot be read.
        AuditError: the log is not whole; the sheet was written and says so.
        DiskFullError: no room; an earlier sheet is as it was.
    """
    chosen = check_language(language)
    evidence = read_evidence(work, policy=policy, key=key, attacks=attacks)
    path = work / ("evidence.html" if chosen == "en" else f"evidence.{chosen}.html")
    write_atomic(path, render_evidence(evidence, chosen, log=work / LOG_NAME))
    if evidence.fault is not None:
        raise AuditError(
            f"audit log {work / LOG_NAME}: {evidence.fault}; {path} was written and says so"
        )
    return path


def check_language(language: str) -> Language:
    """Return the language, if there is a table for it.

    Raises:
        InputError: there is none.
    """
    for known in LANGUAGES:
        if language == known:
            return known
    raise InputError(f"language {language!r} is not there (expected one of {', '.join(LANGUAGES)})")


def evidence_json(evidence: Evidence) -> str:
    """Return the evidence as one JSON object."""
    return json.dumps(to_plain(asdict(evidence)), indent=2, ensure_ascii=False)


def render_evidence(evidence: Evidence, language: Language = "en", *, log: Path) -> str:
    """Return the sheet; the same evidence gives the same text."""
    say = Sentences(language)
    return (
        make_environment()
        .get_template("evidence.html.j2")
        .render(
            say=say,
            evidence=evidence,
            rows=[_row(each, say, len(evidence.runs)) for each in evidence.shipments],
            runs=[(run, _run_facts(run, say)) for run in evidence.runs],
            secure=[secure_sentence(run, say) for run in evidence.runs],
            privacy=[privacy_sentence(run, say) for run in evidence.runs],
            raw=raw_sentences(evidence, say),
            rules=policy_rules(evidence.policy.rules, say) if evidence.policy else [],
            policy_note=policy_note(evidence, say),
            attack_rows=[_attack_cells(row, say) for row in evidence.attacks.rows]
            if evidence.attacks
            else [],
            unprotected=unprotected(evidence, say),
            command=_command(evidence, log),
            version=__version__,
        )
    )


def raw_sentences(evidence: Evidence, say: Sentences) -> list[str]:
    """Say whether text left, as far as the log tells, and what keeps it in."""
    told = []
    if evidence.unknown_kinds:
        kinds = ", ".join(printable(kind) for kind in evidence.unknown_kinds)
        told.append(say("raw_unknown", kinds=kinds))
    else:
        told.append(say("raw_stayed"))
    if evidence.fault is not None:
        told.append(say("raw_broken"))
    return [*told, say("raw_how", sentences=say.count(evidence.num_sentences))]


def secure_sentence(run: RunEvidence, say: Sentences) -> str:
    """Say what secure aggregation hid in a run."""
    if not run.num_updates:
        return say("no_update")
    if run.cohort is None:
        return say("secure_none", updates=say.count(run.num_updates))
    least, most = run.cohort
    return say(
        "secure_yes",
        masked=say.count(run.num_masked),
        updates=say.count(run.num_updates),
        least=say.count(least),
        most=say("secure_most", most=say.count(most)) if most > least else "",
    )


def privacy_sentence(run: RunEvidence, say: Sentences) -> str:
    """Say what differential privacy holds for a run."""
    if not run.num_updates:
        return say("no_update")
    if run.noise is None:
        return say("privacy_none")
    return say(
        "privacy_yes",
        epsilon=say.number(run.noise.epsilon),
        delta=say.number(run.noise.delta),
        noise=say.number(run.noise.noise_multiplier),
        clip=say.number(run.noise.clip_norm),
        noisy=say.count(run.num_noisy),
        updates=say.count(run.num_updates),
    )


def unprotected(evidence: Evidence, say: Sentences) -> list[str]:
    """Say what is not protected, by what the log shows of every update."""
    keys = [
        "open_sum" if evidence.is_masked else "open_clear",
        "open_epsilon" if evidence.is_noisy else "open_formal",
        "open_names",
        "open_beside",
        "open_log",
    ]
    return [say(key) for key in keys]


def policy_rules(rules: PolicyRules, say: Sentences) -> list[tuple[str, str]]:
    """Return what the policy allows, rule by rule."""
    told = [
        (say(f"rule_{name}"), _listed(getattr(rules, name), say))
        for name in ("recipes", "coordinators", "app_bundles")
    ]
    told += [
        (say("rule_kinds"), _some([say.named("kind", kind) for kind in rules.kinds], say)),
        (say("rule_codecs"), _some(rules.codecs, say)),
        (say("rule_tensors"), _some(rules.tensors, say)),
    ]
    day, run = say.size(rules.max_bytes_per_day), say.size(rules.max_bytes_per_run)
    told.append((say("rule_bytes"), say("rule_bytes_value", day=day, run=run)))
    if rules.min_cohort:
        value = say("rule_cohort_value", number=rules.min_cohort)
        told.append((say("rule_cohort"), value))
    if rules.differential_privacy is not None:
        privacy = rules.differential_privacy
        value = say(
            "rule_epsilon_value",
            epsilon=say.number(privacy.max_epsilon),
            rounds=privacy.max_noise_free_rounds,
        )
        told.append((say("rule_epsilon"), value))
    return told


def policy_note(evidence: Evidence, say: Sentences) -> str:
    """Say whether the policy that is shown is the one that was obeyed."""
    if evidence.num_without_policy:
        return say("policy_unasked", number=say.count(evidence.num_without_policy))
    if evidence.policy is None or not any(run.num_updates for run in evidence.runs):
        return ""
    return say("policy_same" if evidence.policy.is_current else "policy_other")


def _row(shipment: Shipment, say: Sentences, num_runs: int) -> Row:
    first, last = shipment.rounds or (None, None)
    rounds = "–" if shipment.rounds is None else f"{first}" if first == last else f"{first}–{last}"
    if num_runs > 1:
        rounds = f"{printable(shipment.run)[:8]} {rounds}"
    kind = say.named("kind", printable(shipment.kind))
    again = shipment.sha256 is not None and shipment.num_records > 1
    return Row(
        round=rounds,
        time=shipment.time.replace("T", " ").removesuffix("Z"),
        kind=f"{kind}, {printable(shipment.codec)}",
        size=say.size(shipment.num_bytes),
        tensors=say.count(shipment.num_tensors) if shipment.num_tensors else "–",
        payload=shipment.sha256
        or say(
            "added_up",
            number=say.count(shipment.num_records),
            first=say.count(shipment.records[0]),
            last=say.count(shipment.records[1]),
        ),
        note=say("sent_again", number=say.count(shipment.num_records)) if again else "",
        is_hash=shipment.sha256 is not None,
    )


def _run_facts(run: RunEvidence, say: Sentences) -> list[tuple[str, str]]:
    facts = [
        (say("recipe"), _some(run.recipes, say) if run.recipes else say("unknown")),
        (say("recipient"), _some(run.recipients, say)),
    ]
    if run.contents:
        facts.append((say("content"), _some(run.contents, say, most=1)))
    if run.tensors:
        facts.append((say("tensors_named"), _some(run.tensors, say)))
    return facts


def _attack_cells(row: AttackRow, say: Sentences) -> list[str]:
    def two(value: float | None) -> str:
        return "–" if value is None else say.number(value, 2)

    auc = two(row.auc)
    if row.auc_low is not None and row.auc_high is not None:
        auc += f" [{two(row.auc_low)}; {two(row.auc_high)}]"
    named = say.share(row.attribution)
    if row.attribution is not None and row.chance is not None:
        named += f" ({say.share(row.chance)})"
    return [
        printable(row.defence),
        auc,
        say.share(row.true_positive_rate),
        say.share(row.extracted),
        named,
        f"{two(row.audited_epsilon)} / {two(row.claimed_epsilon)}",
    ]


def _listed(values: Sequence[str], say: Sentences) -> str:
    return say("any") if tuple(values) == (ANY,) else say("listed", number=len(values))


def _some(values: Sequence[str], say: Sentences, *, most: int = MAX_SHOWN) -> str:
    """Return the first values of a list, safe to show, and how many more there are."""
    told = ", ".join(printable(value)[:200] for value in values[:most])
    more = len(values) - most
    return f"{told}, {say('and_more', number=say.count(more))}" if more > 0 else told


def _command(evidence: Evidence, log: Path) -> str:
    key = f" --key {evidence.public_key}" if evidence.public_key else ""
    return f"mutirao federate audit {shlex.quote(log.name)}{key}"
