"""The processes that share a site's training steps (``Site.num_processes``), seen from rank 0.

Rank 0 is the process that answers requests, and the only one that knows of rounds kept, answers
and policies. The others (``rank_process``) are started when a round is first trained, load the
site's model and data themselves, and keep both from round to round. For a round each gets a
line with the plan through its pipe, says that it is ready, and takes from rank 0 what the round
begins with: what is trained, the history of layers, the optimizer's state. From there on all
train alike (``train.parallel``).

After any failure in a round all ranks are ended, and started again for the next try. Nothing
of theirs is lost, for they keep nothing that counts. They end with rank 0, too.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from mutirao.config import Config
from mutirao.errors import FederationError, RankLostError
from mutirao.federated.plan import Plan, Site
from mutirao.federated.site.models import LoadedModel
from mutirao.federated.site.process import describe_exit
from mutirao.train.parallel import Ranks, join

RANKS_FOLDER = "ranks"
"""In a site's work folder: where its ranks find each other."""
MAX_LOSSES = 3
"""Times that a round is begun before it is given up."""


class Greeting(Config):
    """The first line that a rank gets."""

    site: Site
    """Where model and data are."""
    rank: int
    """Its number, from 1."""
    store: Path
    """The file in which the ranks find each other."""


class Ready(Config):
    """What a rank says before it joins, and before each round."""

    error: str = ""
    """Why it cannot; empty where it can."""


class RoundStart(Config):
    """The line with which a round begins; tensors follow from rank 0, in their order."""

    plan: Plan
    """What was agreed."""
    round: int
    """Number, from 1."""
    num_threads: int
    """Threads of each rank: the same, so that all round alike."""
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    """Names and shapes of the tensors, all float32."""
    groups: list[dict[str, Any]] | None
    """The optimizer's parameter groups; null where it starts anew."""


class RankProcesses:
    """Ranks 1 and on of one site.

    Args:
        site: whose.
    """

    def __init__(self, site: Site) -> None:
        self.site = site
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ranks: Ranks | None = None
        # Also where nobody closes: at the end of the interpreter, or of the last reference.
        self._end = weakref.finalize(self, _end_all, self._processes)

    @property
    def process_ids(self) -> list[int]:
        """Ids of the processes that run now, rank 1 first."""
        return [process.pid for process in self._processes]

    @contextmanager
    def share_round(
        self,
        plan: Plan,
        loaded: LoadedModel,
        round_number: int,
        optimizer_state: Mapping[str, Any] | None,
    ) -> Iterator[Ranks]:
        """Have all ranks begin a round as this process is about to; it must train inside.

        Args:
            plan: what was agreed.
            loaded: this process's model, in the state that the round begins with.
            round_number: from 1.
            optimizer_state: to go on from, or None.

        Raises:
            RankLostError: a rank ended; nothing of the round counts, and it may be tried again.
            FederationError: a rank cannot begin, for instance because its model was altered.
        """
        before = torch.get_num_threads()
        num_threads = max(1, before // self.site.num_processes)
        tensors = _round_tensors(loaded, optimizer_state)
        start = RoundStart(
            plan=plan,
            round=round_number,
            num_threads=num_threads,
            shapes=tuple((name, tuple(each.shape)) for name, each in tensors.items()),
            groups=None if optimizer_state is None else optimizer_state["param_groups"],
        )
        try:
            ranks = self._join()
            for process in self._processes:
                _tell(process, start)
            for number, process in enumerate(self._processes, 1):
                self._hear(number, process)
            for tensor in tensors.values():
                ranks.broadcast(tensor.to(torch.float32))
            torch.set_num_threads(num_threads)
            yield ranks
        except BaseException:
            self.close()
            raise
        finally:
            torch.set_num_threads(before)

    def close(self) -> None:
        """End the processes at once, if there are any."""
        _end_all(self._processes)
        self._ranks = None
        shutil.rmtree(self.site.work / RANKS_FOLDER, ignore_errors=True)

    def _join(self) -> Ranks:
        """Start the processes where they do not run, and return what connects them."""
        if self._ranks is None:
            folder = self.site.work / RANKS_FOLDER
            shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
            folder.mkdir(parents=True)
            store = folder / secrets.token_hex(8)
            numbers = range(1, self.site.num_processes)
            self._processes += [_start() for _ in numbers]
            for number, process in zip(numbers, self._processes, strict=True):
                _tell(process, Greeting(site=self.site, rank=number, store=store))
            for number, process in zip(numbers, self._processes, strict=True):
                self._hear(number, process)
            self._ranks = join(store, 0, self.site.num_processes)
        return self._ranks

    def _hear(self, number: int, process: subprocess.Popen[bytes]) -> None:
        """Wait until a rank says that it is ready."""
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            error = Ready.model_validate_json(line).error
        except ValidationError:
            process.kill()
            raise RankLostError(
                f"rank {number} ended with {describe_exit(process.wait())}; see its standard "
                "error, and whether memory is enough"
            ) from None
        if error:
            raise FederationError(f"rank {number} cannot train: {error}")


def name_tensors(
    trained: Mapping[str, Tensor],
    history: Mapping[str, tuple[Tensor, Tensor]],
    optimizer: Mapping[int, Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """Return under one name each what a round begins with; the inverse of ``part_tensors``."""
    tensors = {f"trained {name}": tensor for name, tensor in trained.items()}
    for module, (b_OR, a_RI) in history.items():
        tensors |= {f"b {module}": b_OR, f"a {module}": a_RI}
    for index, values in optimizer.items():
        tensors |= {f"optimizer {index} {key}": value for key, value in values.items()}
    return tensors


def part_tensors(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]], dict[int, dict[str, Tensor]]]:
    """Return what is trained, the history's (B, A) by module, and the optimizer's tensors."""
    trained: dict[str, Tensor] = {}
    history: dict[str, tuple[Tensor, Tensor]] = {}
    optimizer: dict[int, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        kind, _, name = full.partition(" ")
        if kind == "trained":
            trained[name] = tensor
        elif kind == "b":
            history[name] = (tensor, tensors[f"a {name}"])
        elif kind == "optimizer":
            index, _, key = name.partition(" ")
            optimizer.setdefault(int(index), {})[key] = tensor
    return trained, history, optimizer


def _round_tensors(
    loaded: LoadedModel, optimizer_state: Mapping[str, Any] | None
) -> dict[str, Tensor]:
    parameters = loaded.model.named_parameters()
    trained = {name: each.detach() for name, each in parameters if each.requires_grad}
    history = {
        module: (torch.from_numpy(b_OR), torch.from_numpy(a_RI))
        for module, (b_OR, a_RI) in loaded.factors.items()
    }
    return name_tensors(trained, history, optimizer_state["state"] if optimizer_state else {})


def _start() -> subprocess.Popen[bytes]:
    # A session of its own, so that an interrupt from the keyboard reaches rank 0 alone.
    return subprocess.Popen(
        [sys.executable, "-m", "mutirao.federated.site.rank_process", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )


def _tell(process: subprocess.Popen[bytes], message: Config) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(message.model_dump_json().encode() + b"\n")
        process.stdin.flush()
    except OSError:
        return  # it has ended; its silence tells


def _end_all(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was still to be written has no reader
                    pipe.close()
    processes.clear()
