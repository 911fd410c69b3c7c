"""Privacy attacks on a small federated model: what each defence changes, and what it costs.

A decoder of a million parameters, trained on public health text, is tuned by four sites on
answers of four institutes (MedQuAD), which hold canaries. It is attacked from where the
server, a peer and an outsider stand. Sites train plainly, with each unit's gradient clipped,
or with DP-SGD at two noise levels, about as many passes each; secure aggregation changes what
is seen, not what is trained. Controls: four times as many plain passes, and none. A small
stand-in for the federation trains in one process. Writes docs/benchmarks/data/privacy.json and
docs/benchmarks/privacy.svg, and prints a table.

    python benchmarks/bench_privacy.py             (under 15 minutes on one core)
    python benchmarks/bench_privacy.py --short     (under a minute; its figures mean nothing)

What is finished is kept in --run, and the same command goes on from there. Noise comes from
a fixed seed, so that figures repeat: nothing here is private, and nothing has to be.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from privacy_attacks import attack, audit_many_runs
from privacy_chart import draw, print_table
from privacy_journal import Journal
from privacy_settings import CONDITIONS, DATA, PUBLIC, ROOT, SHORT, SITES, Sizes
from privacy_sites import make_model, make_site, make_tokenizer, train_base

from mutirao.environment import runs_directory, silence
from mutirao.models.causal import CausalModel


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="tiny sizes; figures mean nothing")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--run", type=Path, default=runs_directory() / "bench-privacy")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/data/privacy.json")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/benchmarks/privacy.svg")
    arguments = parser.parse_args()
    if not DATA.is_dir():
        print(f"skipped: {DATA} is not there; name its parent in MUTIRAO_TEST_DATA")
        return 0
    silence()
    # It warns of each call with a fixed seed; the head of this file says so once.
    logging.getLogger("mutirao.train.private").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    sizes = SHORT if arguments.short else Sizes()
    journal = Journal(arguments.run, sizes, fresh=arguments.fresh)
    result = measure(sizes, journal)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, arguments.figure)
    print_table(result)
    return 0


def measure(sizes: Sizes, journal: Journal) -> dict[str, Any]:
    tokenizer = make_tokenizer(sizes)
    model = make_model(sizes, tokenizer)
    scorer = CausalModel(model, tokenizer, name="small decoder", max_batch_tokens=4096)
    sites = [make_site(number, scorer, sizes) for number in range(len(SITES))]
    base_figures = journal.figures(
        "base-figures",
        lambda: {"ready": bool(journal.tensors("base", lambda: train_base(model, scorer, sizes)))},
    )
    base = journal.tensors("base", lambda: train_base(model, scorer, sizes))
    conditions = {
        name: journal.figures(
            name, lambda name=name: attack(name, model, scorer, base, sites, sizes, journal)
        )
        for name in CONDITIONS
    }
    small = journal.figures("many-runs", lambda: audit_many_runs(sizes))
    cells = (base_figures, *conditions.values(), small)
    return {
        "command": "python benchmarks/bench_privacy.py",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, one thread, Python {platform.python_version()}, "
        f"PyTorch {torch.__version__}",
        "data": f"MedQuAD (CC BY 4.0): {', '.join(SITES)}; public: {', '.join(PUBLIC)}",
        "sizes": asdict(sizes),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": round(sum(row["seconds"] for row in cells), 1),
        "processor_seconds": round(sum(row["processor_seconds"] for row in cells), 1),
        "conditions": conditions,
        "many_runs_small_model": small,
    }


if __name__ == "__main__":
    sys.exit(main())
