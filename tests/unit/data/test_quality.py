import pytest

from mutirao.data import QualityConfig, QualityFilter, Record


@pytest.fixture(scope="module")
def quality():
    return QualityFilter()


def plain(text):
    return Record(id="x", source="x", text=text)


GOOD = [
    "What is the most likely diagnosis in a child with fever, rash and red eyes?",
    "Pt seen in clinic today. BP 120/80, HR 72. Continue lisinopril 10 mg daily.",
    "Na 140\nK 4.1\nHb 12.3 g/dL\nCreatinine 1.1 mg/dL\nGlucose 98 in the morning",
    "Paciente admitido com dor no peito há dois dias, sem febre. Prescrito dipirona 500 mg.",
    "We studied 204 women (28.5%); odds ratio 1.60, 95% CI 1.45-1.80, P < 0.001 for the trend.",
]


@pytest.mark.parametrize("text", GOOD)
def test_short_clinical_text_passes(quality, text):
    assert quality.reason(plain(text)) is None


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ("  \n ", {"empty"}),
        ("ok", {"too few words"}),
        ("the patient has pain " * 12, {"repetition"}),
        ("The patient was seen today in the clinic.\n" * 20, {"repetition"}),
        ("### @@@ !!! $$$ %%% ^^^ &&& *** ((( ))) ___ +++ === {{{ }}}", {"too few words"}),
        ("12 40 3.5 88 the 19 77 23 11 90 4.2 66 and 31 20", {"too few words with letters"}),
        ("a b c d e f g h i j k l m n o p q r s", {"words too short"}),
        (
            "1234 4021 3355 8812 the 1977 7712 2312 1190 9042 and 6631 2044 1199 8310",
            {"too few words with letters"},
        ),
        ("xqzt wvbk plmrf dfgh zzkq wrtp mnbv qwsx lkjh pzxc vbnm tyui", {"another language"}),
        ("xqzt wvbk plmrf dfgh zzkq wrtp", {"no function words"}),
        (
            "the " + "qwertyuiopasdfgh" * 3 + " of " + "zxcvbnmasdfghjkl" * 3 + " in",
            {"words too long"},
        ),
        (
            "Le patient a été admis à l'hôpital avec une douleur thoracique depuis deux jours "
            "et il a été traité.",
            {"another language"},
        ),
        (
            "This site uses cookies, see our privacy policy.\nBy the use of cookies you agree "
            "to the terms of use.",
            {"web boilerplate"},
        ),
    ],
)
def test_bad_text_is_dropped_for_its_reason(quality, text, reasons):
    assert quality.reason(plain(text)) in reasons


def test_language_can_be_narrowed():
    text = (
        "O paciente foi admitido com dor no peito há dois dias, sem febre, e não havia tomado "
        "nenhum remédio antes da consulta; foram pedidos exames e ele ficou em observação."
    )
    assert QualityFilter().reason(plain(text)) is None
    english = QualityFilter(QualityConfig(languages=("en",)))
    assert english.reason(plain(text)) == "another language"


def test_question_with_options_is_judged_leniently(quality):
    prompt = "Question: Dose?\nA. 10 mg\nB. 20 mg\nC. 30 mg\nD. 40 mg\nAnswer:"
    question = Record(
        id="x",
        source="x",
        text=prompt + " B. 20 mg",
        context_length=len(prompt),
        choices=(" A", " B", " C", " D"),
        answer=1,
        task="question",
    )
    assert quality.reason(question) is None


def test_record_without_learned_part_is_empty(quality):
    record = Record(id="x", source="x", text="A question with no answer?", context_length=26)
    assert quality.reason(record) == "empty"
