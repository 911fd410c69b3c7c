"""Reads what a site can show: its verified audit log, its policy, the results of attacks.

Payloads of updates are told one by one; all else that left (losses, messages of secure
aggregation, sentences in place of an answer) is added up by run. Only records before the first
fault are told. Nothing is concluded here but what the records say: a log cannot tell of what
left past the site's program.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutirao.federated.audit.check import verify_log
from mutirao.federated.audit.log import LOG_NAME
from mutirao.federated.audit.record import ERROR_KIND, AuditRecord, Noise, Opening, Release
from mutirao.federated.identity import PUBLIC_NAME, parse_public_key
from mutirao.federated.messages import printable
from mutirao.federated.site.gate import CONTROL_KIND, IDENTITY_FOLDER, UPDATE_KIND, WEIGHTS_KIND
from mutirao.federated.site.policy import LOSSES_KIND, PolicyRules, load_policy
from mutirao.report.federation.attacks import Attacks, read_attacks

KNOWN_KINDS = (UPDATE_KIND, WEIGHTS_KIND, LOSSES_KIND, CONTROL_KIND, ERROR_KIND)
"""Kinds of message that the site's program makes; none of them holds text of records."""
ADDED_UP = (LOSSES_KIND, CONTROL_KIND, ERROR_KIND)


@dataclass(frozen=True)
class Shipment:
    """One payload, or several of a kind that are added up."""

    run: str
    rounds: tuple[int, int] | None
    """First and last round; None where none was said."""
    kind: str
    codec: str
    time: str
    """Of the last record."""
    num_records: int
    """Times that it was recorded; a payload that is asked for again leaves again."""
    num_bytes: int
    sha256: str | None
    """Of the payload; None where several are added up."""
    num_tensors: int
    records: tuple[int, int]
    """Numbers of the first and the last record."""


@dataclass(frozen=True)
class RunEvidence:
    """What a site's log says of one run."""

    run: str
    first_time: str
    last_time: str
    recipes: tuple[str, ...]
    """Hashes of the plans."""
    recipients: tuple[str, ...]
    """Who got it, with the public key where it is known."""
    contents: tuple[str, ...]
    """What was in the updates, in the log's words."""
    tensors: tuple[str, ...]
    """Patterns of the tensors' names, numbers replaced by *."""
    num_updates: int
    num_masked: int
    """Updates under secure aggregation."""
    cohort: tuple[int, int] | None
    """Smallest and largest cohort of those."""
    num_noisy: int
    """Updates under differential privacy."""
    noise: Noise | None
    """Of the last of them."""


@dataclass(frozen=True)
class PolicyEvidence:
    """The site's policy, and whether it is the one that the records name."""

    rules: PolicyRules
    sha256: str
    gaps: tuple[str, ...]
    is_current: bool
    """Whether the last update was allowed by this very file."""


@dataclass(frozen=True)
class Evidence:
    """All that the sheet shows."""

    site: str
    fault: str | None
    """Why the log is not whole; None where it is."""
    notes: tuple[str, ...]
    num_records: int
    public_key: str | None
    key_source: str
    """'given', 'folder' (the site's own), or 'log' (named by the log itself)."""
    head_sha256: str | None
    """Hash of the last good record, which covers all before it."""
    code_versions: tuple[str, ...]
    runs: tuple[RunEvidence, ...]
    shipments: tuple[Shipment, ...]
    num_bytes: int
    unknown_kinds: tuple[str, ...]
    """Kinds that this version's program does not make."""
    num_sentences: int
    """Sentences that left in place of an answer."""
    policy_hashes: tuple[str, ...]
    """Policies that the records name."""
    num_without_policy: int
    """Updates that no policy was asked about."""
    policy: PolicyEvidence | None
    attacks: Attacks | None

    @property
    def is_masked(self) -> bool:
        """Whether each update left under secure aggregation."""
        return _all_of(self.runs, lambda run: run.num_masked)

    @property
    def is_noisy(self) -> bool:
        """Whether each update left under differential privacy."""
        return _all_of(self.runs, lambda run: run.num_noisy)


def read_evidence(
    work: Path, *, policy: Path | None = None, key: str | None = None, attacks: Path | None = None
) -> Evidence:
    """Verify a site's log and read what belongs to it.

    Args:
        work: the site's work folder, which has ``audit.jsonl``.
        policy: the site's policy file; None leaves it out.
        key: the site's public key, 64 hexadecimal digits or a PEM file; None takes the one in
            the site's folder, or else the one that the log itself names.
        attacks: results of the privacy attacks; None leaves them out.

    Raises:
        InputError: the log, the key or the results cannot be read.
        RecipeError: the policy cannot be read.
    """
    source = "given" if key else "log"
    own = work / IDENTITY_FOLDER / PUBLIC_NAME
    if key is None and own.exists():
        key, source = str(own), "folder"
    found = verify_log(work / LOG_NAME, parse_public_key(key) if key else None)
    records = found.records
    releases = [record for record in records if isinstance(record.entry, Release)]
    updates = [record for record in releases if _entry(record).kind not in ADDED_UP]
    opening = records[0].entry if records else None
    kinds = dict.fromkeys(_entry(record).kind for record in releases)
    return Evidence(
        site=printable(opening.site if isinstance(opening, Opening) else work.resolve().name),
        fault=found.fault.message if found.fault else None,
        notes=tuple(found.notes),
        num_records=len(records),
        public_key=found.public_key,
        key_source=source,
        head_sha256=records[-1].sha256 if records else None,
        code_versions=_unique(printable(record.code_version) for record in records),
        runs=tuple(
            _run(run, [record for record in releases if _entry(record).run == run])
            for run in dict.fromkeys(_entry(record).run for record in releases)
        ),
        shipments=_shipments(releases),
        num_bytes=sum(_entry(record).payload_bytes for record in releases),
        unknown_kinds=tuple(kind for kind in kinds if kind not in KNOWN_KINDS),
        num_sentences=sum(_entry(record).kind == ERROR_KIND for record in releases),
        policy_hashes=_unique(_entry(record).policy_sha256 for record in updates),
        num_without_policy=sum(_entry(record).policy_sha256 is None for record in updates),
        policy=_policy(policy, updates) if policy else None,
        attacks=read_attacks(attacks) if attacks else None,
    )


def name_pattern(name: str) -> str:
    """Return a tensor's name with each number replaced by *."""
    return re.sub(r"\d+", "*", name)


def _entry(record: AuditRecord) -> Release:
    assert isinstance(record.entry, Release)
    return record.entry


def _unique(values: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(value for value in values if value))


def _all_of(runs: Sequence[RunEvidence], count: Any) -> bool:
    trained = [run for run in runs if run.num_updates]
    return bool(trained) and all(count(run) == run.num_updates for run in trained)


def _run(run: str, records: Sequence[AuditRecord]) -> RunEvidence:
    releases = [_entry(record) for record in records]
    updates = [each for each in releases if each.kind not in ADDED_UP]
    cohorts = [each.mask.cohort_size for each in updates if each.mask]
    noises = [each.noise for each in updates if each.noise and each.noise.noise_multiplier > 0]
    keys = (
        f"{each.recipient} ({each.recipient_key})" if each.recipient_key else each.recipient
        for each in releases
    )
    return RunEvidence(
        run=printable(run),
        first_time=records[0].time,
        last_time=records[-1].time,
        recipes=_unique(each.recipe_sha256 for each in releases),
        recipients=_unique(keys),
        contents=_unique(each.content for each in updates),
        tensors=_unique(name_pattern(name) for each in updates for name in each.tensors),
        num_updates=len(updates),
        num_masked=len(cohorts),
        cohort=(min(cohorts), max(cohorts)) if cohorts else None,
        num_noisy=len(noises),
        noise=noises[-1] if noises else None,
    )


def _shipments(records: Sequence[AuditRecord]) -> tuple[Shipment, ...]:
    """Group records: updates by payload, all else by run and kind, in order of first record."""
    groups: dict[tuple[Any, ...], list[AuditRecord]] = {}
    for record in records:
        entry = _entry(record)
        is_own = entry.kind not in ADDED_UP
        parts = (entry.round, entry.payload_sha256, entry.codec) if is_own else ()
        groups.setdefault((not is_own, entry.run, entry.kind, *parts), []).append(record)
    in_order = sorted(groups.items(), key=lambda group: (group[0][0], group[1][0].sequence))
    return tuple(_shipment(group) for _, group in in_order)


def _shipment(records: Sequence[AuditRecord]) -> Shipment:
    releases = [_entry(record) for record in records]
    first = releases[0]
    rounds = sorted(each.round for each in releases if each.round is not None)
    hashes = {each.payload_sha256 for each in releases}
    return Shipment(
        run=first.run,
        rounds=(rounds[0], rounds[-1]) if rounds else None,
        kind=first.kind,
        codec=first.codec,
        time=records[-1].time,
        num_records=len(records),
        num_bytes=sum(each.payload_bytes for each in releases),
        sha256=hashes.pop() if len(hashes) == 1 else None,
        num_tensors=max(len(each.tensors) for each in releases),
        records=(records[0].sequence, records[-1].sequence),
    )


def _policy(path: Path, updates: Sequence[AuditRecord]) -> PolicyEvidence:
    found = load_policy(path)
    last = _entry(updates[-1]).policy_sha256 if updates else None
    return PolicyEvidence(
        rules=found.rules,
        sha256=found.sha256,
        gaps=tuple(found.rules.gaps()),
        is_current=last == found.sha256,
    )
