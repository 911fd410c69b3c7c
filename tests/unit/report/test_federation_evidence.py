from __future__ import annotations

import dataclasses
import json
import logging
import string
from pathlib import Path
from typing import Any

import pytest
from seen_page import Page
from synthetic_federation import digest, write_attacks, write_site
from typer.testing import CliRunner

from mutirao.cli.app import app
from mutirao.errors import AuditError, InputError
from mutirao.federated.audit.log import LOG_NAME, AuditLog
from mutirao.federated.audit.record import Release
from mutirao.federated.identity import open_identity, public_hex
from mutirao.federated.site.policy import PolicyRules
from mutirao.report.federation.attacks import read_attacks
from mutirao.report.federation.evidence import read_evidence
from mutirao.report.federation.sentences import LANGUAGES, TEXTS, Language, Sentences
from mutirao.report.federation.sheet import render_evidence, write_evidence


def seen(work: Path, language: Language = "en", **given: Any) -> Page:
    page = Page(render_evidence(read_evidence(work, **given), language, log=work / LOG_NAME))
    assert page.open == []
    page.check_is_inert()
    return page


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "mutirao.federated.site.policy")


def test_plain_run_says_so(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    work = write_site(tmp_path / "site", policy=policy)
    page = seen(work, policy=policy)
    for words in (
        "The log is whole. 11 records",
        "Checked with the public key in the site's own folder.",
        "What left: 1.2 MB in all",
        "None: all 10 updates left in clear; the coordinator can read each.",
        "None: no noise was added, and no ε holds.",
        "No record is of a kind that holds text of your documents.",
        "trains any recipe; runs any app bundle",
        "The last update was allowed by this very file.",
        "the coordinator sees yours alone",
        "Without differential privacy there is no formal guarantee",
        "Names in the text are not removed",
        "layers.*.q.lora_B.weight",
        public_hex(open_identity(work / "identity")),
        digest("plan"),
        digest("coordinator"),
        *(digest(f"payload {number}") for number in range(1, 11)),
    ):
        assert words in page.text


def test_masked_and_noisy_run_says_so(tmp_path: Path) -> None:
    page = seen(write_site(tmp_path / "site", is_masked=True, is_private=True))
    for words in (
        "10 of 10 updates masked; only sums of at least 3 sites can be read (4 in some rounds).",
        "ε = 3 at δ = 1e-05, spent so far; noise 1.1 × clip 1, for one unit",
        "30 payloads; their hashes are in records 2 to 40",
        "not their sum",
        "ε bounds what can be learned of one patient",
    ):
        assert words in page.text
    assert "the coordinator sees yours alone" not in page.text


def test_one_clear_update_takes_the_promise_back(tmp_path: Path) -> None:
    work = write_site(tmp_path / "site", is_masked=True, is_private=True)
    write_site(work, num_rounds=1)
    page = seen(work)
    assert "10 of 11 updates masked" in page.text
    assert "10 of 11 updates." in page.text
    assert "the coordinator sees yours alone" in page.text
    assert "no formal guarantee" in page.text


def test_noise_of_nothing_is_none(tmp_path: Path) -> None:
    work = write_site(tmp_path / "site", num_rounds=1)
    log = AuditLog(work / LOG_NAME, open_identity(work / "identity"), site="north")
    log.append(
        Release.model_validate(
            {
                "run": "other",
                "round": 1,
                "recipient": "coordinator",
                "kind": "adapter update",
                "codec": "int8",
                "noise": {"noise_multiplier": 0, "clip_norm": 1, "epsilon": 0, "delta": 1e-5},
                "payload_bytes": 1,
                "payload_sha256": digest("x"),
            }
        )
    )
    evidence = read_evidence(work)
    assert [run.num_noisy for run in evidence.runs] == [0, 0]
    assert seen(work).text.count("no noise was added") == 2


def test_altered_log_is_told_first_and_ends_with_an_error(tmp_path: Path) -> None:
    work = write_site(tmp_path / "site")
    path = work / LOG_NAME
    path.write_bytes(path.read_bytes().replace(b'"round":5', b'"round":9'))
    with pytest.raises(AuditError, match="record 6 was altered"):
        write_evidence(work)
    page = Page((work / "evidence.html").read_text(encoding="utf-8"))
    assert "THE LOG IS NOT WHOLE." in page.text
    assert "Only the 5 good records before the fault are shown." in page.text
    assert "The log is whole" not in page.text
    assert "holds only for the records before the fault" in page.text


def test_another_key_is_a_fault(tmp_path: Path) -> None:
    work = write_site(tmp_path / "site")
    evidence = read_evidence(work, key=public_hex(open_identity(tmp_path / "other")))
    assert evidence.fault is not None
    assert "another key" in evidence.fault


def test_log_without_a_key_from_elsewhere_proves_less(tmp_path: Path) -> None:
    work = write_site(tmp_path / "site", num_rounds=1)
    (work / "identity" / "site-key.public.pem").unlink()
    page = seen(work)
    assert "this does not tell whose log it is" in page.text


def test_kinds_that_are_not_known_are_not_vouched_for(tmp_path: Path) -> None:
    page = seen(write_site(tmp_path / "site", kind="patient letters", num_rounds=1))
    assert "Kinds that this version does not know: patient letters." in page.text
    assert "No record is of a kind that holds text" not in page.text


def test_other_policy_and_no_policy_are_told(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    work = write_site(tmp_path / "site", policy=policy, num_rounds=1)
    policy.write_text(policy.read_text() + "\n# read again\n")
    assert "was NOT allowed by this file" in seen(work, policy=policy).text
    plain = write_site(tmp_path / "plain", num_rounds=2)
    assert "2 updates left without any policy being asked." in seen(plain).text


def test_bytes_that_left_again_are_one_row(tmp_path: Path) -> None:
    work = write_site(tmp_path / "site", num_rounds=1)
    write_site(work, num_rounds=1)
    evidence = read_evidence(work)
    assert [(each.num_records, each.sha256) for each in evidence.shipments] == [
        (2, digest("payload 1"))
    ]
    assert "same bytes 2 times" in seen(work).text


def test_hostile_strings_stay_text(tmp_path: Path) -> None:
    evil = "</p><script>alert(1)</script><img src=x onerror=y>\u202e"
    work = write_site(tmp_path / "site", site=evil, kind=evil, content=evil, run=evil, num_rounds=1)
    page = seen(work)
    assert "img" not in page.tags
    assert "<script>alert(1)</script>" in "".join(page.words)
    assert "\u202e" not in "".join(page.words)


def test_attacks_are_read_as_far_as_they_go(tmp_path: Path) -> None:
    attacks = read_attacks(write_attacks(tmp_path / "privacy.json"))
    rows = {row.defence: row for row in attacks.rows}
    assert rows["plain"].auc == 0.81
    assert rows["plain"].exposure_bits == 19.9
    assert rows["plain"].extracted == 0.75
    assert rows["plain"].true_positive_rate == 0.015
    assert rows["dp-high"].claimed_epsilon == 8.0
    assert rows["dp-low"].auc is None
    page = seen(write_site(tmp_path / "site"), attacks=tmp_path / "privacy.json")
    assert "0.81 [0.79; 0.83]" in page.text
    assert "not in this training" in page.text


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"conditions": []}', '{"conditions": {"a": 1, "b": [2]}}', "[" * 99999],
)
def test_attacks_of_other_forms(tmp_path: Path, content: str) -> None:
    path = tmp_path / "privacy.json"
    path.write_text(content)
    if '"b"' in content:
        assert [row.auc for row in read_attacks(path).rows] == [None, None]
        return
    with pytest.raises(InputError, match="no results of privacy attacks"):
        read_attacks(path)


def test_every_text_has_both_languages_and_the_same_places() -> None:
    for key, texts in TEXTS.items():
        places = [{each[1] for each in string.Formatter().parse(x)} - {None} for x in texts]
        assert len(texts) == len(LANGUAGES)
        assert all(texts), key
        assert places[0] == places[1], key


def test_every_gap_of_a_policy_is_translated() -> None:
    rules = PolicyRules(
        recipes=("any",),
        app_bundles=("any",),
        coordinators=("any",),
        kinds=(),
        codecs=(),
        tensors=("*",),
        max_bytes_per_day=0,
        max_bytes_per_run=0,
    )
    assert len(rules.gaps()) == 6
    assert all(f"gap_{gap}" in TEXTS for gap in rules.gaps())


def test_portuguese_sheet(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    work = write_site(tmp_path / "site", policy=policy)
    path = write_evidence(work, policy=policy, language="pt-BR")
    assert path.name == "evidence.pt-BR.html"
    text = path.read_text(encoding="utf-8")
    assert '<html lang="pt-BR">' in text
    page = Page(text)
    for words in ("O registro está íntegro.", "1,2 MB no total", "treina qualquer receita"):
        assert words in page.text
    for words in ("The log", "What left", "updates left"):
        assert words not in page.text


def test_numbers_of_both_languages() -> None:
    assert Sentences("en").count(1234567) == "1,234,567"
    assert Sentences("pt-BR").count(1234567) == "1.234.567"
    assert Sentences("pt-BR").share(0.015) == "1,5 %"


def test_empty_log_and_missing_log(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"audit\.jsonl cannot be read"):
        read_evidence(tmp_path)
    (tmp_path / LOG_NAME).touch()
    assert "Nothing left, says the log." in seen(tmp_path).text


def test_long_lists_are_counted(tmp_path: Path) -> None:
    work = write_site(tmp_path / "site", num_rounds=1)
    evidence = read_evidence(work)
    run = dataclasses.replace(evidence.runs[0], tensors=tuple(f"part{x}.w" for x in "abcdefgh"))
    many = dataclasses.replace(evidence, runs=(run,))
    text = Page(render_evidence(many, log=work / LOG_NAME)).text
    assert "parta.w, partb.w, partc.w, and 5 more" in text


def test_verb_writes_the_sheet(tmp_path: Path) -> None:
    work = write_site(tmp_path / "site", num_rounds=1)
    result = CliRunner().invoke(app, ["report", str(work), "--evidence", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["fault"] is None
    assert (work / "evidence.html").exists()
    wrong = CliRunner().invoke(app, ["report", str(work), "--evidence", "--language", "fr"])
    assert isinstance(wrong.exception, InputError)
