"""Recorded graphs, on a device without any, and compiled networks: the same pictures; when they are made."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from cases import seldom
from outcomes import Run
from recorders import Counting, Deaf, Driver, Failing
from sampling_peers import cond, controlnet_of
from torch import Tensor

from controlkit import execution, sampling
from controlkit.applying import EAGER, Networks
from controlkit.base import Base
from controlkit.control import Control
from controlkit.execution import Execution
from controlkit.recording import CudaRecorder, Work, fault
from controlkit.reuse import cross_attentions
from controlkit.sampling import Memory, Savings, Tiles, generate

GRAPHS = Execution(cuda_graph=True)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """Puts a recorder where a GPU has CUDA graphs."""

    def put(made: Any) -> Any:
        monkeypatch.setattr(execution, "_recorder_for", lambda device: made)
        return made

    return put


@pytest.mark.parametrize(
    ("family", "how", "seeds", "recorded", "repeated"),
    [
        # one kind of step: seen in the first, recorded in the second, repeated from then on, in all batches
        ("sd1", {}, [0, 1], 1, 5 + 6),
        ("sd1", {"end": 0.5}, [0], 2, 2 + 2),  # with control and without
        *seldom(
            ("sdxl", {}, [0], 1, 5),
            ("sd1", {"scale": (1.0, 0.5)}, [0], 0, 0),  # no two steps are the same
            ("sd1", {"mode": "control"}, [0], 1, 5),
        ),
    ],
)
def test_graphs_change_nothing(
    load: Callable[[str], Base],
    recorder: Callable[[Any], Any],
    family: str,
    how: dict[str, Any],
    seeds: list[int],
    recorded: int,
    repeated: int,
) -> None:
    base = load(family)
    request: dict[str, Any] = {
        "seeds": seeds,
        "steps": 6,
        "controls": [Control(controlnet_of(base), cond(), **how)],
    }
    expected = generate(base, "a red cube", **request)
    made = recorder(Counting())
    found = generate(base, "a red cube", execution=GRAPHS, **request)
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
    assert (made.recorded, made.repeated) == (recorded, repeated)


def test_every_map_has_its_own_graph(sd1: Base, recorder: Callable[[Any], Any]) -> None:
    request: dict[str, Any] = {
        "seeds": [0, 1],
        "steps": 4,
        "controls": [Control(controlnet_of(sd1), cond(batch=2))],
        "guidance": 1.0,
    }
    expected = generate(sd1, "x", **request)
    made = recorder(Counting())
    found = generate(sd1, "x", execution=GRAPHS, **request)
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
    assert made.recorded == 2


@pytest.mark.parametrize(
    "how",
    [
        {"savings": Savings(features_every=2)},
        *seldom(
            {"savings": Savings(control_every=2)}, {"tiles": Tiles(64)}, {"memory": Memory(1, offload=True)}
        ),
    ],
)
def test_what_cannot_be_recorded_is_run(
    sd1: Base, recorder: Callable[[Any], Any], how: dict[str, Any]
) -> None:
    request: dict[str, Any] = {"steps": 5, "controls": [Control(controlnet_of(sd1), cond())], **how}
    expected = generate(sd1, "x", **request)
    made = recorder(Counting())
    assert np.array_equal(generate(sd1, "x", execution=GRAPHS, **request)[0], expected[0])
    assert made.recorded == 0


@pytest.mark.parametrize(
    ("kind", "reason"), [(Deaf, "away from what"), *seldom((Failing, "operation not permitted when"))]
)
def test_a_graph_that_is_wrong_is_dropped(
    sd1: Base, recorder: Callable[[Any], Any], kind: type, reason: str
) -> None:
    request: dict[str, Any] = {"steps": 5, "seeds": [0, 1], "controls": [Control(controlnet_of(sd1), cond())]}
    expected = generate(sd1, "x", **request)
    recorder(kind())
    with pytest.warns(UserWarning, match=f"no CUDA graph: .*{reason}") as told:
        found = generate(sd1, "x", execution=GRAPHS, **request)
    assert len(told) == 1
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def test_recordings_share_a_stream_and_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, recorder, seen = Driver(monkeypatch), CudaRecorder(torch.device("cuda", 1)), []

    def work() -> Tensor:
        seen.append(driver.now)
        return torch.zeros(1)

    for _ in range(2):
        recorder.record(work)
    (stream, pool), (again, shared) = driver.captures
    assert driver.made == 2  # that which was there, and one for warming up and capturing
    assert all(one is stream for one in (*seen, again))
    assert (pool, shared) == (None, "the pool")
    assert driver.now is driver.first


def test_a_capture_that_fails_leaves_the_stream_and_says_what_was_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver, recorder = Driver(monkeypatch), CudaRecorder(torch.device("cuda"))

    def work() -> Tensor:
        if driver.capturing:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")
        return torch.zeros(1)

    with pytest.raises(RuntimeError, match="due to a previous error") as failed:
        recorder.record(work)
    assert fault(failed.value) == "CUDA error: operation not permitted when stream is capturing"
    ((stream, _),) = driver.captures
    assert driver.now is driver.first  # what follows would not wait for what others do there
    assert driver.first.waited_for == [stream]


def test_one_thread_captures_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, done = Driver(monkeypatch), []

    def record(number: int, work: Work) -> None:
        CudaRecorder(torch.device("cuda")).record(work)
        done.append(number)

    other = threading.Thread(target=record, args=(2, lambda: torch.zeros(1)))

    def work() -> Tensor:
        if driver.capturing:
            other.start()
            other.join(0.05)
        return torch.zeros(1)

    record(1, work)
    other.join()
    assert sorted(done) == [1, 2]
    assert len(driver.captures) == 2


class Careless:
    """Keeps nothing alive that it recorded, as a graph does not, and says what the work said."""

    def record(self, work: Work) -> tuple[Callable[[], None], Tensor]:
        return lambda: None, work().clone()


@pytest.mark.parametrize(
    ("scale", "recorded_in"),
    [
        pytest.param(1.0, 1, marks=pytest.mark.slow),
        ((1.0, 0.6, 0.3, 0.1), 2),
    ],  # a kind of step of which each batch has one is recorded in the second
)
def test_a_recording_holds_what_it_reads(
    sd1: Base,
    recorder: Callable[[Any], Any],
    monkeypatch: pytest.MonkeyPatch,
    scale: float | tuple[float, ...],
    recorded_in: int,
) -> None:
    base, read = tiny_models.told_guidance(sd1), []
    real = execution._record

    def noting(known: Any, *rest: Any) -> str:
        whole = predictors[-1]()
        attention = next(iter(cross_attentions(base.unet)))
        parts = [whole.timestep_cond, *attention.processor.kept[0][1][0]]
        parts += [tensor for pattern in whole.merging._patterns.values() for tensor in pattern]
        read.extend(weakref.ref(part) for part in parts if isinstance(part, Tensor))
        return real(known, *rest)

    predictors: list[Any] = []
    made = execution.Runner.predictor

    def predictor(self: Any, whole: Any, **more: Any) -> Any:
        predictors.append(weakref.ref(whole))
        return made(self, whole, **more)

    monkeypatch.setattr(execution, "TOLERANCE", float("inf"))
    monkeypatch.setattr(execution, "_record", noting)
    monkeypatch.setattr(execution.Runner, "predictor", predictor)
    recorder(Careless())
    alive: list[bool] = []

    def callback(done: int, total: int, latents: Tensor) -> None:
        if done > 4 * recorded_in:  # in a later batch
            gc.collect()
            alive.append(all(reference() is not None for reference in read))

    request: dict[str, Any] = {"seeds": range(recorded_in + 1), "steps": 4}
    request |= {
        "savings": Savings(merge_tokens=0.5),
        "controls": [Control(controlnet_of(sd1), cond(), scale)],
    }
    generate(base, "x", execution=GRAPHS, callback=callback, **request)
    assert len(read) > 4
    assert alive == [True] * 4


class Generations:
    """Networks as the compiler's graphs run them: what a step gave is written over when another step begins.

    Without marks (`torch.compiler.cudagraph_mark_step_begin`) every run of a network is a step; with them a
    step is what lies between two marks.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._given: list[Tensor] = []
        self.marks = 0
        monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", self._mark)
        networks = Networks(self._predict, self._control_residuals, compiled=True, graphs=True)
        monkeypatch.setattr(execution, "_compiled", lambda mode: networks)

    def _mark(self) -> None:
        self.marks += 1
        self._next()

    def _next(self) -> None:
        for tensor in self._given:
            tensor.fill_(float("nan"))
        self._given.clear()

    def _run(self, work: Callable[..., Any], *args: Any, **told: Any) -> Any:
        if not self.marks:
            self._next()
        return work(*args, **told)

    def _predict(self, *args: Any, **told: Any) -> Tensor:
        model_pred = self._run(EAGER.predict, *args, **told)
        self._given.append(model_pred)
        return model_pred

    def _control_residuals(self, *args: Any, **told: Any) -> Any:
        residuals = self._run(EAGER.control_residuals, *args, **told)
        residuals.map(self._given.append)
        return residuals


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"scheduler": "pndm", "guidance": 1.0},  # which remembers predictions
        *seldom(
            {"memory": Memory(1, one_branch=True)}, {"savings": Savings(control_every=2)}, {"seeds": [0, 1]}
        ),
    ],
)
def test_no_step_reads_what_the_next_one_writes_over(
    sd1: Base, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    request: dict[str, Any] = {"steps": 5, "controls": [Control(controlnet_of(sd1), cond())], **how}
    expected = generate(sd1, "x", **request)
    networks = Generations(monkeypatch)
    found = generate(sd1, "x", execution=Execution(compiled=True), **request)
    assert networks.marks
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Traces as a compiler would, refusing any break, and computes as before; how many graphs there are."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options: dict[str, Any] = {"backend": "eager", "fullgraph": True, "dynamic": False}
    parts = (torch.compile(part, **options) for part in (EAGER.predict, EAGER.control_residuals))
    monkeypatch.setitem(execution._COMPILED, None, Networks(*parts, compiled=True))
    yield lambda: int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch's tracing warns of its own parts
def test_networks_are_traced_once_for_all_steps_and_pictures(sd1: Base, traced: Callable[[], int]) -> None:
    request: dict[str, Any] = {"steps": 4, "controls": [Control(controlnet_of(sd1), cond(), end=0.5)]}
    expected = [generate(sd1, word, seeds=[seed], **request)[0] for seed, word in enumerate("xyz")]
    for seed, word in enumerate("xyz"):
        found = generate(sd1, word, seeds=[seed], execution=Execution(compiled=True), **request)[0]
        assert np.array_equal(found, expected[seed])
    assert traced() == 3  # the control network, and the U-Net with its residuals and without


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_compiled_networks_make_the_same_pictures(sd1: Base) -> None:
    request: dict[str, Any] = {"steps": 3, "controls": [Control(controlnet_of(sd1), cond())]}
    expected = generate(sd1, "x", **request)[0]
    found = generate(sd1, "x", execution=Execution(compiled=True), **request)[0]
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("more", [("--features-every", 2), ("--merge-tokens", 0.5)])
def test_what_does_not_go_with_compiling(generate: Run, sd1: Base, more: tuple[str, float]) -> None:
    name = more[0].removeprefix("--").replace("-", "_")
    assert f"compile does not go with {name}" in generate("--compile", *more).refused()
    with pytest.raises(ValueError, match=f"compile does not go with {name}"):
        sampling.generate(sd1, "x", execution=Execution(compiled=True), savings=Savings(**{name: more[1]}))


@pytest.mark.filterwarnings("default")  # without a GPU the command says that it has no effect
def test_the_command_records_and_repeats(generate: Run, run: Run) -> None:
    generate("--cuda-graph", "--steps", 3, "-o", "out.png").done()
    run("generate", "--like", "out.png", "-o", "again.png").done()
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()
