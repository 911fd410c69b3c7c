"""What comes into a layer now, beside what came into it in the original, and how to mend it.

A layer that is rounded so that its outputs stay the same, given its inputs, keeps the error that
its inputs have from layers rounded before it. Here the original runs beside: a layer is asked for
the outputs that the original's gave for the original's inputs, as nearly as they can be had from
the inputs of now. One that adds to the stream of states is asked for a share of what the stream
is off as well. Layers are changed in the order in which their block calls them, those with the
same input at a time, so that each is asked to mend what all before it have done.

Shapes: W windows, T tokens, N tokens of some windows, D channels, I inputs and O outputs of a
layer.

References:
    Li et al. 2025, GPTAQ, arXiv:2504.02692: targets from the original's inputs.
    Zhang et al. 2025, Qronos, arXiv:2505.11695: the least-squares target.
    The share of the stream is our own; docs/log.md has what it was chosen by.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mutirao.compress.blocks import Pass, decoder_blocks, enter, hooked, observe
from mutirao.compress.rounding.gptq import NOT_FINITE, damped_factor
from mutirao.errors import DataError, FormatError

STREAM_SHARE = 0.5
"""Of the stream's error, how much is asked of a layer that adds to the stream."""
KEPT_BYTES = 2**30
"""Of what the original's layers take in one block and what changed ones give; what is over that
is computed again."""


class Drift(NamedTuple):
    """Means over tokens, for a layer with inputs x whose outputs are added to the stream s.

    In the original they were x' and s'.
    """

    gram: Tensor
    """(I, I) x x^T."""
    factor: Tensor
    """(I, I) lower Cholesky factor of it, damped; layers with the same input share it."""
    inputs: Tensor
    """(I, I) (x' - x) x^T."""
    stream: Tensor | None
    """(O, I) (s' - s) x^T; None where the outputs are not added to the stream."""


Begin = Callable[[str, nn.Module, Callable[[], Mapping[str, Tensor]]], Mapping[str, Tensor]]
"""Called with a block's name, the block, and what returns the Gram matrices of all its layers'
inputs. May divide what layers take, if their weights will make up for it once they are visited;
returns what it divided inputs by, (I,) by the layer's name within the block."""

Visit = Callable[[str, nn.Module, Mapping[str, Drift]], None]
"""Called with a block's name, the block, and what comes into some of its linear layers, by the
layer's name within the block; it may change those."""


def target_weight(weight_OI: Tensor, drift: Drift) -> Tensor:
    """Return the weight whose outputs are nearest to what is asked of a layer.

    Nearest in the mean square over tokens, with the damping of ``gptq.damped_factor`` for the
    squared distance to the layer's own weight.

    Args:
        weight_OI: (O, I) floating point, the layer's own.
        drift: of the layer.

    Raises:
        DataError: the drift is not finite.
    """
    if not all(bool(torch.isfinite(each).all()) for each in drift if each is not None):
        raise DataError(NOT_FINITE)
    asked_OI = weight_OI.float() @ drift.inputs
    if drift.stream is not None:
        asked_OI += STREAM_SHARE * drift.stream
    return weight_OI.float() + torch.cholesky_solve(asked_OI.T, drift.factor).T


@torch.no_grad()
def walk_parts(
    model: Any, ids_WT: Tensor, begin: Begin, visit: Visit, *, windows_per_pass: int = 4
) -> None:
    """Visit the linear layers of each block, those with the same input at a time, in order.

    Args:
        model: a transformers causal model.
        ids_WT: (W, T) token ids of calibration text.
        begin: called once a block, before its layers are visited.
        visit: called with layers; what it changes is seen by those after them.
        windows_per_pass: bounds memory; changes results by rounding only.

    Raises:
        FormatError: see ``blocks.decoder_blocks``.
    """
    blocks = decoder_blocks(model)
    kept = _shared_weights(blocks)
    passes = [enter(model, blocks, ids) for ids in torch.split(ids_WT, windows_per_pass)]
    # Models whose blocks hand on keys and values do so in what the blocks are called with.
    originals = [Pass(one.states, copy.deepcopy(one.others)) for one in passes]
    for name, block in blocks.items():
        original = _copy(block, kept)
        two = _TwoBlocks(name, original, block, _find_parts(name, original, originals[0]))
        two.look(originals)
        divisors = begin(name, block, partial(observe, name, block, passes))
        for part in two.parts:
            visit(name, block, two.observe(part, originals, passes, divisors))
        two.advance(originals, passes)


@dataclass(frozen=True)
class _Part:
    """Linear layers of a block that have the same input."""

    names: tuple[str, ...]
    streams: dict[str, str]
    """By the layer, the module that takes the stream which the layer's outputs are added to."""

    @property
    def modules(self) -> set[str]:
        """Those whose inputs are needed."""
        return {self.names[0], *self.streams.values()}


View = dict[str, Tensor]
"""What some windows are in a block: (W, T, channels) what modules take, by name, and under the
empty name the block's output, if it ran to its end."""


@dataclass
class _TwoBlocks:
    """A block as it was, and as it is by now."""

    name: str
    original: nn.Module
    changed: nn.Module
    parts: list[_Part]
    views: list[View | None] = field(default_factory=list)
    """Of the original, for each pass; None where there was no room to keep it."""
    answers: list[View] = field(default_factory=list)
    """What layers that have been changed give, for each pass, as far as there was room."""
    room: int = field(default_factory=lambda: KEPT_BYTES)

    def look(self, originals: list[Pass]) -> None:
        """Run the original once, and keep what parts will ask of it, as far as there is room."""
        modules = set[str]().union(*(part.modules for part in self.parts))
        self.answers = [{} for _ in originals]
        for one in originals:
            view = _look(self.name, self.original, one, modules) if self.room > 0 else None
            self.views.append(view if view is not None and self._has_room(view) else None)

    def observe(
        self,
        part: _Part,
        originals: list[Pass],
        passes: list[Pass],
        divisors: Mapping[str, Tensor],
    ) -> dict[str, Drift]:
        """Return the drift of a part's layers, after those of the parts before were changed."""
        first = part.names[0]
        divisor = divisors.get(first)
        grams: list[Tensor] = []
        inputs: list[Tensor] = []
        streams: dict[str, list[Tensor]] = {name: [] for name in part.streams}
        num_tokens = 0
        for index, (original, one) in enumerate(zip(originals, passes, strict=True)):
            view = self.views[index]
            if view is None:
                view = _look(self.name, self.original, original, part.modules, first)
            now = self._look_again(index, one, part)
            x_NI, was_NI = (each[first].flatten(0, 1).float() for each in (now, view))
            _add(grams, x_NI, x_NI)
            _add(inputs, (was_NI if divisor is None else was_NI / divisor) - x_NI, x_NI)
            for layer, module in part.streams.items():
                gap_WTD = view[module].float() - now[module].float()
                _add(streams[layer], gap_WTD.flatten(0, 1), x_NI)
            num_tokens += len(x_NI)
        gram_II, input_II = grams[0] / num_tokens, inputs[0] / num_tokens
        means = {layer: sums[0] / num_tokens for layer, sums in streams.items()}
        factor_II = damped_factor(gram_II)
        return {
            layer: Drift(gram_II, factor_II, input_II, means.get(layer)) for layer in part.names
        }

    def advance(self, originals: list[Pass], passes: list[Pass]) -> None:
        """Take all windows to the next block."""
        for index, (original, one) in enumerate(zip(originals, passes, strict=True)):
            view = self.views[index]
            if view is None:
                view = {"": original.through(self.name, self.original)}
            original.states = view[""]
            one.states = self._look_again(index, one, None)[""]

    def _look_again(self, index: int, one: Pass, part: _Part | None) -> View:
        """Look at the changed block up to a part, or to its end; keep what changed layers give."""
        known = self.answers[index]
        names = [each.names for each in self.parts]
        before = names if part is None else names[: names.index(part.names)]
        answers = {layer for layers in before for layer in layers} - known.keys()
        modules, last = (set[str](), None) if part is None else (part.modules, part.names[0])
        view = _look(self.name, self.changed, one, modules, last, known, answers)
        given = {layer: view.pop(key) for layer in answers if (key := f"{layer}()") in view}
        if part is not None and self._has_room(given):
            known.update(given)
        return view

    def _has_room(self, view: View) -> bool:
        """Take room for something, if there is enough."""
        num_bytes = sum(each.nbytes for each in view.values())
        has_room = num_bytes <= self.room
        self.room -= num_bytes * has_room
        return has_room


def _add(sums: list[Tensor], left_NO: Tensor, right_NI: Tensor) -> None:
    """Add a product to a sum that begins as nothing."""
    if sums:
        sums[0].addmm_(left_NO.T, right_NI)
    else:
        sums.append(left_NO.T @ right_NI)


class _Enough(Exception):
    """What was looked for has been seen; the rest of a block need not run."""


def _look(
    name: str,
    block: nn.Module,
    one: Pass,
    modules: set[str],
    last: str | None = None,
    known: Mapping[str, Tensor] | None = None,
    answers: Iterable[str] = (),
) -> View:
    """Return what modules take, and under NAME() what layers give.

    Args:
        name: of the block.
        block: it.
        one: what it is called with.
        modules: whose inputs are wanted.
        last: of them; the block stops there. None for a run to the end.
        known: what layers give, which need not run.
        answers: layers whose outputs are wanted, if they run.
    """
    view: View = {}

    def take(module: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            view[module] = inputs[0]
            if module == last:
                raise _Enough

        return keep

    def give(layer: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def keep(_: nn.Module, __: Any, output: Tensor) -> None:
            view[f"{layer}()"] = output

        return keep

    with (
        _answered(block, known or {}),
        hooked(block.get_submodule(each).register_forward_hook(give(each)) for each in answers),
        hooked(block.get_submodule(each).register_forward_pre_hook(take(each)) for each in modules),
        suppress(_Enough),
    ):
        view[""] = one.through(name, block)
    return view


@contextmanager
def _answered(block: nn.Module, known: Mapping[str, Tensor]) -> Iterator[None]:
    """Let layers give what is known of them, for a while."""
    layers = {each: block.get_submodule(each) for each in known}
    try:
        for each, layer in layers.items():
            layer.forward = partial(_answer, known[each])
        yield
    finally:
        for layer in layers.values():
            layer.__dict__.pop("forward", None)


def _answer(output: Tensor, _: Tensor) -> Tensor:
    return output


def _find_parts(name: str, block: nn.Module, one: Pass) -> list[_Part]:
    """Return a block's parts in the order in which they run.

    What a layer's outputs are added to is found by looking: a module takes, or the block returns,
    exactly the sum of the outputs and of what another module took.

    Raises:
        FormatError: a layer runs more or less often than once.
    """
    inputs: list[tuple[str, Tensor]] = []
    outputs: dict[str, Tensor] = {}
    stream: list[tuple[str, Tensor]] = []

    def hook(module: str, is_linear: bool) -> Callable[[Any, tuple[Any, ...], Any], None]:
        def keep(_: Any, args: tuple[Any, ...], output: Any) -> None:
            if is_linear:
                inputs.append((module, args[0]))
                outputs[module] = output
            elif args and isinstance(args[0], Tensor) and args[0].shape == one.states.shape:
                stream.append((module, args[0]))

        return keep

    with hooked(
        module.register_forward_hook(hook(each, isinstance(module, nn.Linear)))
        for each, module in block.named_modules()
        if each and not list(module.children())
    ):
        stream.append(("", one.through(name, block)))
    times = Counter(layer for layer, _ in inputs)
    for layer, module in block.named_modules():
        if isinstance(module, nn.Linear) and times[layer] != 1:
            raise FormatError(
                f"{name}.{layer} runs {times[layer]} times in its block, which gptq does not "
                "support (expected once); use rtn or awq"
            )
    groups: list[tuple[Tensor, list[str]]] = []
    for layer, x in inputs:
        for other, names in groups:
            if other is x:
                names.append(layer)
                break
        else:
            groups.append((x, [layer]))

    def taken_by(layer: str) -> str | None:
        """Return the module that takes what a layer's outputs are added to."""
        for index, (module, before) in enumerate(stream):
            if before.shape == outputs[layer].shape:
                total = before + outputs[layer]
                if any(torch.equal(total, after) for _, after in stream[index + 1 :]):
                    return module
        return None

    found = {layer: taken_by(layer) for layer, _ in inputs}
    return [
        _Part(tuple(names), {each: module for each in names if (module := found[each])})
        for _, names in groups
    ]


def _shared_weights(blocks: Mapping[str, nn.Module]) -> dict[int, Tensor]:
    """Return copies of the weights that several layers use, by the parameter's id."""
    weights = [
        module.weight
        for block in blocks.values()
        for module in block.modules()
        if isinstance(module, nn.Linear)
    ]
    uses = Counter(map(id, weights))
    return {id(each): each.detach().clone() for each in weights if uses[id(each)] > 1}


def _copy(block: nn.Module, kept: Mapping[int, Tensor]) -> nn.Module:
    """Return a copy of a block as it was, also where it shares weights with one before it."""
    original = copy.deepcopy(block)
    for mine, module in zip(original.modules(), block.modules(), strict=True):
        if isinstance(module, nn.Linear) and id(module.weight) in kept:
            mine.weight.data.copy_(kept[id(module.weight)])  # type: ignore[operator]
    return original
