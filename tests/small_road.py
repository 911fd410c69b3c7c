"""A small road: a tiny random model and two silos of real English sentences' shape."""

import json
import os
import subprocess
import sys
from pathlib import Path

MUTIRAO = str(Path(sys.executable).parent / "mutirao")
SUBJECTS = ["The patient", "A nurse", "The surgeon", "An elderly man", "The visiting student"]
VERBS = ["describes", "records", "examines", "reports", "remembers"]
OBJECTS = ["a mild headache", "the blood pressure", "an old fracture", "chest pain", "a fever"]
TIMES = ["after the meal", "in the morning", "since last week", "during the visit", "at night"]

SMALL_RECIPE = """\
model = {model}
question = "What is a fever?"
answer_tokens = 4

[silos]
north = {north}
south = {south}

[federated]
num_rounds = 2
tokens_per_round = 400
monitor_tokens = 100

[lora]
rank = 2
num_layers = 1

[train]
tokens_per_step = 128
warmup_tokens = 50

[evaluation]
max_text_tokens = 200
num_questions = 4
num_outcomes = 4

[[compress]]
bits = 8
group_size = 16

[[compress]]
bits = 3
group_size = 16
"""


def write_silo(folder: Path, first: int) -> Path:
    """Write 90 different records of text, and some questions, into a silo's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(first, first + 90):
        parts = []
        for step in range(3):
            key = number * 7 + step * 31
            parts.append(
                f"{SUBJECTS[key % 5]} {VERBS[key // 5 % 5]} {OBJECTS[key // 25 % 5]} "
                f"{TIMES[key // 125 % 5]}, and the {number} notes say that it was seen before"
            )
        lines.append({"text": ". ".join(parts) + "."})
    for number in range(first, first + 30):
        prompt = f"Question: which number follows {number}, as the ward counts its beds?\nAnswer:"
        choices = [f" {number + 1}", f" {number - 1}"]
        lines.append({"prompt": prompt, "choices": choices, "answer": 0})
    text = "\n".join(json.dumps(line) for line in lines)
    (folder / "notes.jsonl").write_text(text + "\n", encoding="utf-8")
    return folder


class SmallRoad:
    """Everything that a small demonstration needs, and a way to run it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.run_folder = folder / "run"
        self.recipe = folder / "recipe.toml"
        silos = {
            "north": write_silo(folder / "north folder", 0),
            "south": write_silo(folder / "south", 500),
        }
        quoted = {name: json.dumps(str(path)) for name, path in silos.items()}
        self.recipe.write_text(SMALL_RECIPE.format(model=json.dumps(str(model)), **quoted))
        self.attempts = folder / "attempts"

    def environment(self) -> dict[str, str]:
        blocked = Path(__file__).parent / "blocked"
        return {
            **os.environ,
            "MUTIRAO_HOME": str(self.folder / "home"),
            "MUTIRAO_TEST_ATTEMPTS": str(self.attempts),
            "PYTHONPATH": str(blocked),
            "COLUMNS": "1000",  # no sentence is wrapped
        }

    def command(self, *arguments: str) -> list[str]:
        start = [MUTIRAO, "demo", "--config", str(self.recipe), "--out", str(self.run_folder)]
        return [*start, *arguments]

    def run(self, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
            **options,
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments),
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
