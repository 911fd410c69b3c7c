"""A tiny model that has learned something: what rounds it must forget some of it."""

from __future__ import annotations

import random
from pathlib import Path

from small_road import OBJECTS, SUBJECTS, TIMES, VERBS


def make_text(num_sentences: int, seed: int = 0) -> str:
    """Sentences of four parts drawn at random, one a line."""
    draw = random.Random(seed)
    parts = (SUBJECTS, VERBS, OBJECTS, TIMES)
    return "".join(
        " ".join(draw.choice(each) for each in parts) + ".\n" for _ in range(num_sentences)
    )


def write_trained(source: Path, folder: Path, num_steps: int = 120) -> Path:
    """Train a tiny random model on such sentences for some seconds; write it to a folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(source))
    model = AutoModelForCausalLM.from_pretrained(str(source), dtype=torch.float32)
    ids = torch.tensor(tokenizer(make_text(800, seed=1))["input_ids"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for weight in model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.08)
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
        for step in range(num_steps):
            starts = torch.randint(0, len(ids) - 64, (16,))
            batch = ids[starts[:, None] + torch.arange(64)]
            for group in optimizer.param_groups:
                group["lr"] = 4e-3 * (1 - step / num_steps)
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder
