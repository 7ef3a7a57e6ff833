"""Forward and backward of a micro-batch as one recorded graph, which a GPU runs without the host's help.

A step of a ControlNet is some thousand small kernels; at small batches the host takes longer to start them
than a GPU to run them. A CUDA graph is started as a whole. It reads its inputs and writes its results at
fixed addresses: inputs are copied into buffers, and gradients stay allocated and are added to. There is one
graph for each shape of a micro-batch, and all use the same memory for what they compute in between.

No graph is trusted before it has been seen to compute right: it is recorded on zeros, so that nothing of real
inputs can be fixed in it, and its first results are compared with those computed without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from controlkit.recording import CudaRecorder, Recorder, apart, fault
from controlkit.training.task import Losses

if TYPE_CHECKING:
    from controlkit.training.loop import Run
    from controlkit.training.machine import Machine

TOLERANCE = 0.02
"""How far losses and gradients may be from those computed without a graph, as a share of their size (root
mean square): room for bf16's rounding where sums are taken in another order, far less than what is wrong."""


@dataclass
class _Recorded:
    """A micro-batch of one shape: its input buffers, what computes it, and where each pair's loss then is."""

    buffers: dict[str, Tensor]
    replay: Callable[[], None]
    each: Tensor
    trusted: bool = False


class Graphs:
    """Computes a run's micro-batches by recorded graphs, as long as these prove right."""

    def __init__(self, run: Run, recorder: Recorder) -> None:
        self._task: Any = run.task
        self._run, self._recorder = run, recorder
        self._recorded: dict[tuple[object, ...], _Recorded] = {}
        self._gradients: dict[nn.Parameter, Tensor] = {}  # where graphs add theirs to

    @torch.no_grad()
    def forward_backward(self, part: Any, share: float) -> Losses:
        """Add to the gradients those of ``share`` times the part's mean loss; the part's losses."""
        given = self._task.inputs(part)
        given["share"] = torch.full((), share, device=self._run.machine.device)
        key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in given.items())
        recorded = self._recorded.get(key)
        if recorded is not None and recorded.trusted:
            each = _computed(recorded, given)
        else:
            each = self._checked(key, given)
        return Losses(each, given["timesteps"], self._task.levels)

    def _checked(self, key: tuple[object, ...], given: Mapping[str, Tensor]) -> Tensor:
        """Compute without a graph, and beside it with one, which is made if need be and trusted if alike."""
        parameters = list(self._run.weights.parameters.values())
        before = [None if p.grad is None else p.grad.clone() for p in parameters]
        for p in parameters:
            p.grad = None
        each = self._work(given).clone()
        expected = [p.grad for p in parameters]
        reason = self._compare(key, given, each, expected)
        for p, old, new in zip(parameters, before, expected, strict=True):
            total = old if new is None else new if old is None else old + new
            kept = self._gradients.get(p)
            p.grad = total if reason or kept is None or total is None else kept.copy_(total)
        if reason:
            self._give_up(reason)
        return each

    def _compare(
        self,
        key: tuple[object, ...],
        given: Mapping[str, Tensor],
        each: Tensor,
        expected: Sequence[Tensor | None],
    ) -> str:
        """Compute by graph; "" if it is as expected, or what is wrong."""
        parameters = list(self._run.weights.parameters.values())
        try:
            for p, gradient in zip(parameters, expected, strict=True):
                if gradient is not None:
                    p.grad = self._gradients.setdefault(p, torch.zeros_like(p))
                elif p in self._gradients:
                    return "another set of parameters has gradients"
            if key not in self._recorded:
                self._recorded[key] = self._record(given)
            for gradient in self._gradients.values():
                gradient.zero_()
            found = _computed(self._recorded[key], given)
        except RuntimeError as error:
            return fault(error)
        gradients = [(p.grad, e) for p, e in zip(parameters, expected, strict=True)]
        pairs = [(one, other) for one, other in gradients if one is not None and other is not None]
        if not all(bool(torch.isfinite(other).all()) for _, other in [(found, each), *pairs]):
            return ""  # nothing can be compared: the next step will tell
        off = max(apart([(found, each)]), apart(pairs))
        self._recorded[key].trusted = off <= TOLERANCE  # not a number is not, either
        return "" if off <= TOLERANCE else f"it is {off:.2g} away from what it should compute"

    def _record(self, given: Mapping[str, Tensor]) -> _Recorded:
        buffers = {name: torch.zeros_like(tensor) for name, tensor in given.items()}
        return _Recorded(buffers, *self._recorder.record(lambda: self._work(buffers)))

    def _work(self, given: Mapping[str, Tensor]) -> Tensor:
        with torch.enable_grad():
            each: Tensor = self._task.errors(self._run.whole, given)
            (each.mean() * given["share"]).backward()
        return each.detach()

    def _give_up(self, reason: str) -> None:
        """From now on the run computes without graphs."""
        run = self._run
        run.graphs, run.weights.keeps_gradients = None, False
        self._recorded.clear()
        run.watch.say(run.step + 1, f"no CUDA graph from step {run.step + 1} on: {reason}", keep=True)


def _computed(recorded: _Recorded, given: Mapping[str, Tensor]) -> Tensor:
    """Each pair's loss; its gradients are added where they belong."""
    for name, buffer in recorded.buffers.items():
        buffer.copy_(given[name])
    recorded.replay()
    return recorded.each.clone()  # the next replay writes over it


def open_graphs(run: Run) -> Graphs | None:
    """Graphs for a run whose recipe asks for them; None, with a line, where they cannot be."""
    if not getattr(run.recipe, "cuda_graph", False):
        return None
    reason = why_not(run.recipe, run.machine)
    recorder = None if reason else _recorder_for(run.machine.device)
    if recorder is None:
        run.watch.say(run.step, f"no CUDA graph: {reason or f'this run is on {run.machine.device}'}")
        return None
    if getattr(run.recipe, "compile", False):
        run.weights.keep_gradients()  # those that the compiler's graphs write are written over by the next
        run.watch.say(run.step, "CUDA graphs are the compiler's own (reduce-overhead), of what it compiles")
        return None
    run.weights.keeps_gradients = True
    return Graphs(run, recorder)


def why_not(recipe: Any, machine: Machine) -> str:
    """Why a recipe's training cannot have graphs; "" where it can, on a device that has them."""
    if machine.processes.count > 1:
        return "several processes exchange gradients while they compute"
    if recipe.precision == "fp16":
        return "fp16 scales its gradients on the way (precision=bf16 does not)"
    if recipe.reward:
        return "a reward looks at other pairs in each step"
    if recipe.gradient_checkpointing:
        return "gradient_checkpointing computes twice, with the state of random numbers kept by the host"
    return ""


def _recorder_for(device: torch.device) -> Recorder | None:
    return CudaRecorder(device) if device.type == "cuda" else None
