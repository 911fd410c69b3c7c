"""Three ordinary chat prompts, each about 128 tokens with the model's chat template."""

from __future__ import annotations

import json
from pathlib import Path

STAFF = (
    "Our clinic has two nurses, one doctor and a receptionist, and from May to August the number "
    "of patients with respiratory infections nearly doubles. Write a practical plan for these "
    "four months: how to arrange the shifts, which patients should be seen first, what to do "
    "when somebody on the staff falls ill, and how we can tell after each week whether the plan "
    "is working. Please give reasons for every recommendation, and be concrete."
)
HISTORY = (
    "Explique para uma turma do ensino médio como surgiu a cidade do Rio de Janeiro, por que ela "
    "se tornou a capital do país e o que mudou quando a capital foi para Brasília. Conte a "
    "história em ordem, com exemplos da vida das pessoas comuns em cada época, e termine com "
    "três perguntas para os alunos discutirem em grupo."
)
PROGRAM = (
    "I have a Python program that reads a large CSV file of purchases (date, customer, product, "
    "price) into a list and then loops over it once for each customer to add up what they spent "
    "per month. It takes more than an hour. Explain why it is slow, then write a faster version "
    "that goes through the file only once and prints the ten customers who spent most in each "
    "month. Explain the code after showing it, and say how much memory it needs."
)
PROMPTS = {"staff": STAFF, "historia": HISTORY, "program": PROGRAM}


def encode_prompts(model_directory: Path, cache: Path) -> dict[str, object]:
    """Return the prompts as token ids, and the ids that end an answer.

    Encoded by transformers, once, and kept in ``cache``: everybody gets the same ids.

    Args:
        model_directory: a Hugging Face directory with tokenizer and chat template.
        cache: JSON file to keep them in.
    """
    if cache.is_file():
        kept: dict[str, object] = json.loads(cache.read_bytes())
        if kept["texts"] == PROMPTS:
            return kept
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_directory, local_files_only=True)
    ids = {
        name: tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for name, text in PROMPTS.items()
    }
    stop_ids = sorted({tokenizer.eos_token_id, *tokenizer.encode("<|im_end|><|endoftext|>")})
    encoded = {"texts": PROMPTS, "ids": ids, "stop_ids": stop_ids}
    cache.write_text(json.dumps(encoded), encoding="utf-8")
    return encoded
