"""How the pair of a generation is run: step by step from Python, compiled, or as recorded CUDA graphs.

Both change no picture beyond rounding. Compiling takes minutes once for each shape and precision. A graph is
recorded in the second step of its kind (the same networks under the same settings), and taken from the third
on if it gave in the second what the networks gave without it; for what cannot be recorded the generation goes
on as before, with a warning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from controlkit import notices
from controlkit.applying import EAGER, Networks, Rows
from controlkit.predicting import Predictor
from controlkit.recording import CudaRecorder, Recorder, apart, fault
from controlkit.reuse import kept_text

TOLERANCE = 0.02
"""How far a graph's prediction may be from that without it, as a share of its size (root mean square): room
for half precision's rounding, far less than what is wrong."""


@dataclass(frozen=True)
class Execution:
    """How the networks are run.

    compiled: by torch.compile; on a GPU with cuda_graph as well, the graphs are the compiler's own.
    cuda_graph: no effect but on a GPU. It does not go with tiles, residuals or features that are kept over
    steps, or networks that move between batches; these are run as usual.
    packed: on a processor, deep convolutions keep their weights as they are read, see `packing`.
    """

    compiled: bool = False
    cuda_graph: bool = False
    packed: bool = True


class Runner:
    """Runs one generation, and keeps between its batches what is the same in them.

    Within one `reuse.text_kept`, of one text: recordings hold its keys and values where they are.
    """

    def __init__(self, execution: Execution, device: torch.device) -> None:
        self.recordings: dict[object, Recording] = {}
        recorded = execution.cuda_graph and not execution.compiled
        self.recorder = _recorder_for(device) if recorded else None
        graphs = execution.cuda_graph and device.type == "cuda"
        self.networks = _compiled("reduce-overhead" if graphs else None) if execution.compiled else EAGER
        self._rows: dict[object, Rows] = {}

    def predictor(self, whole: Predictor, *, can_be_kept: bool) -> Callable[[Tensor, Tensor, int], Tensor]:
        """What predicts a step: `whole`, or its recordings where graphs are wanted and possible."""
        return Replayed(whole, self) if can_be_kept and self.recorder is not None else whole

    def rows(self, key: object, make: Callable[[], Rows]) -> Rows:
        """What the networks are told, the same object for the same key: recordings know it by its place.

        None is no key: it is made anew.
        """
        if key is None:
            return make()
        if key not in self._rows:
            self._rows[key] = make()
        return self._rows[key]


def _recorder_for(device: torch.device) -> Recorder | None:
    return CudaRecorder(device) if device.type == "cuda" else None


_COMPILED: dict[str | None, Networks] = {}


def _compiled(mode: str | None) -> Networks:
    """The functions, compiled once for a process: they remember what they were compiled for."""
    if mode not in _COMPILED:
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, 64)  # for shapes, and networks beside each other
        options: dict[str, Any] = {"dynamic": False, "mode": mode}
        _COMPILED[mode] = Networks(
            torch.compile(EAGER.predict, **options),
            torch.compile(EAGER.control_residuals, **options),
            compiled=True,
            graphs=mode is not None,
        )
    return _COMPILED[mode]


@dataclass(eq=False)
class Recording:
    """One kind of step: where its inputs are read, what computes it, and where the prediction then lies.

    held: whatever holds tensors that it reads where they are, and which must therefore live as long: what it
    is told, the predictor with what that computed once, the text's keys and values.
    """

    held: tuple[Any, ...]
    noisy_latents: Tensor | None = None
    timestep: Tensor | None = None
    replay: Callable[[], None] | None = None
    model_pred: Tensor | None = None


class Replayed:
    """A `Predictor` whose steps are recorded and done again."""

    def __init__(self, whole: Predictor, runner: Runner) -> None:
        self._whole, self._runner = whole, runner

    def __call__(self, noisy_latents: Tensor, timestep: Tensor, step: int) -> Tensor:
        """``model_pred`` as `Predictor` gives it."""
        runner, recordings = self._runner, self._runner.recordings
        fixed = self._whole.reads()
        key = (noisy_latents.shape, tuple(map(id, fixed)), self._whole.settings_at(step))
        known = recordings.get(key)
        if known is not None and known.replay is not None:
            return _computed(known, noisy_latents, timestep)
        model_pred = self._whole(noisy_latents, timestep, step)
        if runner.recorder is None:  # given up
            return model_pred
        if known is None:
            recordings[key] = Recording((fixed,))
            return model_pred
        # this batch's predictor, and the text, all computed by now: the kind may be known from another batch
        known.held += (self._whole, kept_text(self._whole.base.unet, *self._whole.controlnets))
        again = lambda shown, told: self._whole(shown, told, step)  # noqa: E731
        reason = _record(known, runner.recorder, again, (noisy_latents, timestep), model_pred)
        if reason:
            runner.recorder = None
            recordings.clear()
            notices.warn(f"no CUDA graph: {reason}", stacklevel=2)
        return model_pred


def _record(
    known: Recording,
    recorder: Recorder,
    predict: Callable[[Tensor, Tensor], Tensor],
    given: tuple[Tensor, Tensor],
    expected: Tensor,
) -> str:
    """Record on zeros, so that nothing real can be fixed in it, and compare; "" or what is wrong."""
    known.noisy_latents, known.timestep = shown, told = [torch.zeros_like(tensor) for tensor in given]
    try:
        known.replay, known.model_pred = recorder.record(lambda: predict(shown, told))
        found = _computed(known, *given)
    except RuntimeError as error:
        return fault(error)
    if not bool(torch.isfinite(expected).all()):
        return ""  # the loop will say so
    off = apart([(found, expected)])
    return "" if off <= TOLERANCE else f"it is {off:.2g} away from what it should compute"


def _computed(known: Recording, noisy_latents: Tensor, timestep: Tensor) -> Tensor:
    assert known.noisy_latents is not None
    assert known.timestep is not None
    assert known.replay is not None
    assert known.model_pred is not None
    known.noisy_latents.copy_(noisy_latents)
    known.timestep.copy_(timestep)
    known.replay()
    return known.model_pred.clone()  # the next replay writes over it
