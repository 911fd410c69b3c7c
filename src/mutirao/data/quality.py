"""Say which records read like text that is worth learning, and name why the others do not.

The rules are datatrove's: Gopher quality and repetition (Rae et al. 2021,
arXiv:2112.11446, table A1), FineWeb's repeated lines (Penedo et al. 2024,
arXiv:2406.17557) and C4's web boilerplate (Raffel et al. 2020, arXiv:1910.10683). Their
published thresholds are for web pages of hundreds of words; those here are set by judgement
for records of 5 words and more, and were tried on 6,456 exam questions and abstracts, of
which they drop 14, and on a few dozen good and bad texts in the tests:

- Gopher counts its most frequent n-gram even when it occurs once, which is much of a short
  text: below ``short_words`` only n-grams that really repeat are counted.
- Function words come from longer lists, in English and Portuguese, and are asked for only
  where the text is long enough that prose without them would be strange.
- A record with choices is judged as a whole, options included, which repeat each other by
  nature: its limits for repetition and word form are wider.

The language is detected per record by py3langid, offline; a text too short to tell passes.
What no rule here sees: whether the content is true, harmful, or on the subject.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import py3langid.langid
from datatrove.data import Document
from datatrove.pipeline.filters.c4_filters import C4QualityFilter
from datatrove.pipeline.filters.fineweb_quality_filter import FineWebQualityFilter
from datatrove.pipeline.filters.gopher_quality_filter import GopherQualityFilter
from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter
from datatrove.utils.word_tokenizers import load_word_tokenizer

from mutirao.data.config import Language, QualityConfig
from mutirao.data.records import Record

Rule = Callable[[str], str | None]

_FUNCTION_WORDS: dict[Language, str] = {
    "en": """the a an of and or to in is are was were be been has have had with without for from
    by on at as not no that this these which who what when where how why he she his her it its
    they their all most than after before about into during does do can may should will if""",
    "pt": """o a os as um uma de do da dos das em no na nos nas e ou para por com sem que se não
    é são foi foram ser ter tem há ao à aos às pelo pela como mais menos qual quais quando onde
    seu sua este esta isso ele ela entre sobre após antes durante foi está estão""",
}

_WARM_CHARACTERS = 300_000
"""Text whose words the tokenizer keeps; bounds its memory."""

_REASONS = {
    "gopher_short_doc": "too few words",
    "gopher_long_doc": "too many words",
    "gopher_below_avg_threshold": "words too short",
    "gopher_above_avg_threshold": "words too long",
    "gopher_too_many_hashes": "too many symbols",
    "gopher_too_many_ellipsis": "too many symbols",
    "gopher_too_many_bullets": "only bullet points",
    "gopher_too_many_end_ellipsis": "lines cut short",
    "gopher_below_alpha_threshold": "too few words with letters",
    "gopher_enough_stop_words": "no function words",
    "char_dup_ratio": "repeated lines",
    "lorem_ipsum": "placeholder text",
}
"""What people read for datatrove's names; what is not here concerns repetition."""


class QualityFilter:
    """Checks one record after another; the word tokenizers load at the first."""

    def __init__(self, config: QualityConfig | None = None) -> None:
        self.config = config or QualityConfig()
        self._rules: dict[tuple[Language, bool, bool], list[Rule]] = {}
        self._num_warmed: dict[Language, int] = {}

    def reason(self, record: Record) -> str | None:
        """Return why a record is dropped, in a few words, or None when it is kept."""
        text = record.text
        num_words = len(text.split())
        if not num_words or not record.completion.strip():
            return "empty"
        language = self._language(text, num_words)
        if language is None:
            return "another language"
        self._warm(language, text)
        key = (language, bool(record.choices), num_words < self.config.short_words)
        if key not in self._rules:
            self._rules[key] = self._make_rules(*key)
        return next((found for rule in self._rules[key] if (found := rule(text))), None)

    def _language(self, text: str, num_words: int) -> Language | None:
        """Return the likeliest accepted language, or None where it is surely another."""
        ranked = _language_identifier().rank(text)
        top, confidence = ranked[0]
        is_other = top not in self.config.languages
        if (
            is_other
            and num_words >= self.config.language_words
            and confidence >= self.config.language_confidence
        ):
            return None
        accepted: dict[str, Language] = {name: name for name in self.config.languages}
        return next(accepted[name] for name, _ in ranked if name in accepted)

    def _warm(self, language: Language, text: str) -> None:
        """Let the word tokenizer keep the words of the first texts.

        datatrove frees the tokenizer's vocabulary after each text, and meets every common
        word anew in the next; kept words cut a whole preparation from 10.4 to 7.2 s (1,733
        records, 1.3 MB, one run each on a shared two-core machine, 2026).
        """
        done = self._num_warmed.get(language, 0)
        if done < _WARM_CHARACTERS:
            self._num_warmed[language] = done + len(text)
            load_word_tokenizer(language).tokenizer.tokenizer(text[:_WARM_CHARACTERS])

    def _make_rules(self, language: Language, has_choices: bool, is_short: bool) -> list[Rule]:
        quality = self._gopher_quality(language, has_choices)
        # Prose of 20 words holds several function words, a heading or a list may hold none.
        min_function_words = (0 if is_short else 2) if has_choices else 1
        quality.min_stop_words = min_function_words
        rules = [
            _as_rule(quality),
            _as_rule(_gopher_repetition(language, has_choices, is_short)),
        ]
        if not has_choices:
            rules += [_as_rule(_fineweb(language)), _boilerplate_rule(language)]
        return rules

    def _gopher_quality(self, language: Language, has_choices: bool) -> GopherQualityFilter:
        words = _FUNCTION_WORDS[language].split()
        return GopherQualityFilter(
            min_doc_words=3 if has_choices else self.config.min_words,
            max_doc_words=self.config.max_words,
            # Options such as "A. 2 B. 4" are short, names of drugs and proteins long.
            min_avg_word_length=1.3 if has_choices else 2.2,
            max_avg_word_length=16 if has_choices else 12,
            max_symbol_word_ratio=0.1,
            max_bullet_lines_ratio=None,
            max_ellipsis_lines_ratio=0.5,
            # Punctuation counts as words here, and abstracts are full of numbers.
            max_non_alpha_words_ratio=0.3 if has_choices else 0.35,
            stop_words=[*words, *(word.capitalize() for word in words)],
            language=language,
        )


@cache
def _language_identifier() -> Any:
    langid = py3langid.langid
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def _gopher_repetition(
    language: Language, has_choices: bool, is_short: bool
) -> GopherRepetitionFilter:
    top: tuple[tuple[int, float], ...] = ()
    repeated: tuple[tuple[int, float], ...]
    if has_choices:
        repeated = ((2, 0.6), (3, 0.5), (5, 0.4))
    elif is_short:
        repeated = ((2, 0.3), (3, 0.25), (5, 0.2))
    else:
        top = ((2, 0.2), (3, 0.18), (4, 0.16))
        repeated = ((5, 0.2), (6, 0.19), (7, 0.18), (8, 0.17), (9, 0.16), (10, 0.15))
    return GopherRepetitionFilter(
        dup_line_frac=0.5 if has_choices else 0.3,
        dup_line_char_frac=0.4 if has_choices else 0.2,
        top_n_grams=top,
        dup_n_grams=repeated,
        language=language,
    )


def _fineweb(language: Language) -> FineWebQualityFilter:
    """FineWeb's share of repeated lines only: notes are lists, and end without a stop."""
    return FineWebQualityFilter(
        line_punct_thr=0.0,
        short_line_thr=1.0,
        char_duplicates_ratio=0.1,
        new_line_ratio=2.0,
        language=language,
    )


def _boilerplate_rule(language: Language) -> Rule:
    """C4's rules for web furniture only: sentences are not asked for, nor full stops."""
    c4 = C4QualityFilter(
        remove_citations=False,
        filter_no_terminal_punct=False,
        min_num_sentences=-1,
        min_words_per_line=-1,
        max_word_length=200,
        filter_javascript=False,
        filter_curly_bracket=False,
        language=language,
    )

    def rule(text: str) -> str | None:
        document = Document(text=text, id="")
        verdict = c4.filter(document)
        if verdict is not True:
            return _name_reason(verdict)
        return None if document.text else "web boilerplate"

    return rule


def _as_rule(datatrove_filter: Any) -> Rule:
    def rule(text: str) -> str | None:
        verdict = datatrove_filter.filter(Document(text=text, id=""))
        return None if verdict is True else _name_reason(verdict)

    return rule


def _name_reason(verdict: Any) -> str:
    name = verdict[1] if isinstance(verdict, tuple) else "quality"
    return _REASONS.get(name, "repetition")
