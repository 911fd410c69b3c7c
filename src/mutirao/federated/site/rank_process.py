"""A process that computes its share of a site's training steps; see ``ranks``.

It reads lines from standard input and answers on standard output; tensors come from rank 0
through what connects the ranks. Whatever goes wrong ends it, and rank 0 hears of that. It ends
with rank 0, whatever it is doing then.
"""

from __future__ import annotations

import sys
from typing import IO, TYPE_CHECKING

from mutirao.environment import silence
from mutirao.errors import MutiraoError
from mutirao.federated.site.process import end_with_parent, take_pipes

if TYPE_CHECKING:
    from mutirao.federated.site.ranks import Ready


def main(parent: int) -> None:
    """Train rounds with rank 0 until it is gone."""
    end_with_parent(parent)
    lines, answers = take_pipes()
    silence()
    from mutirao.federated.site.models import ModelCache
    from mutirao.federated.site.ranks import Greeting, Ready, RoundStart
    from mutirao.federated.site.trainer import LocalTrainer
    from mutirao.train.parallel import join

    greeting = Greeting.model_validate_json(lines.readline())
    site, cache = greeting.site, ModelCache()
    _say(answers, Ready())
    ranks = join(greeting.store, greeting.rank, site.num_processes)
    for line in lines:
        start = RoundStart.model_validate_json(line)
        try:
            trainer = LocalTrainer(site, start.plan, cache)
        except MutiraoError as error:
            _say(answers, Ready(error=str(error)))
            return
        _say(answers, Ready())
        trainer.follow_round(start, ranks)


def _say(answers: IO[bytes], ready: Ready) -> None:
    answers.write(ready.model_dump_json().encode() + b"\n")
    answers.flush()


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]))
    except MutiraoError as error:  # rank 0 says the same, or has ended
        sys.exit(f"a rank ended: {error}")
