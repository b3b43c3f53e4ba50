"""Threads that run one model at once: a forward's grid, images and statistics are its own."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny import calibrated, tiny_dinov2, tiny_vit
from torch import Tensor, nn

import mgfc.attachment
from mgfc.backbones.grid import GridTracker

TALL, WIDE = (96, 64), (64, 96)  # as many patches, on other grids


def images(size: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(model: nn.Module, batch: Tensor) -> Tensor:
    output = model(batch)
    return output if isinstance(output, Tensor) else output.last_hidden_state


def make(build: Callable[..., nn.Module] = tiny_vit) -> nn.Module:
    model = build()
    calibrated(model)
    return model


def share_the_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives all threads one state of the grids, as a plain class would."""
    kept = {name: value for name, value in vars(GridTracker).items() if name not in ("__dict__", "__weakref__", "__reduce__")}
    monkeypatch.setattr(mgfc.attachment, "GridTracker", type("SharedTracker", (), kept))


def in_threads(*tasks: Callable[[], Any]) -> list[Any]:
    """The results of tasks that run at once, or what they raised."""
    results: list[Any] = [None] * len(tasks)

    def work(index: int) -> None:
        try:
            results[index] = tasks[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    return results


def agree(found: Any, expected: Tensor) -> bool:
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)


@contextmanager
def held(module: nn.Module, thread_name: str) -> Iterator[tuple[threading.Event, threading.Event]]:
    """A thread stops where it enters a module, tells so, and goes on when it is told to."""
    entered, go_on = threading.Event(), threading.Event()

    def stop(module: nn.Module, args: Any) -> None:
        if threading.current_thread().name == thread_name:
            entered.set()
            assert go_on.wait(60)

    handle = module.register_forward_pre_hook(stop)
    yield entered, go_on
    handle.remove()


def one_inside_the_other(model: nn.Module, module: nn.Module, first: Tensor, second: Tensor) -> tuple[Any, Any]:
    """A forward that begins and ends while another one is held in a module."""
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(run(model, first))
        except Exception as error:
            found.append(error)

    with held(module, "first") as (entered, go_on):
        thread = threading.Thread(target=work, name="first")
        thread.start()
        assert entered.wait(60)
        inner = run(model, second)
        go_on.set()
        thread.join(60)
    return found[0], inner


PLACES = {
    "before a block": lambda model: model.blocks[0],
    "in a block": lambda model: model.blocks[0].attn,
    "between blocks": lambda model: model.blocks[1],
    "after the patch embedding": lambda model: model.norm_pre,
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_forward_that_is_interrupted_by_one_of_another_resolution(place: Callable[[nn.Module], nn.Module]) -> None:
    model = make()
    for first, second in ((images(TALL), images(WIDE, 1)), (images(TALL), images((32, 48), 1))):
        expected = run(model, first), run(model, second)
        found = one_inside_the_other(model, place(model), first, second)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_with_a_shared_tracker_the_interrupted_forward_takes_the_wrong_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    share_the_tracker(monkeypatch)
    model, first, second = make(), images(TALL), images(WIDE, 1)
    expected = run(model, first), run(model, second)
    found = one_inside_the_other(model, model.blocks[0].attn, first, second)
    assert not agree(found[0], expected[0]) and agree(found[1], expected[1])


def hammer(model: nn.Module, number: int) -> list[bool]:
    """Whether each thread's outputs are those of a run on its own."""
    batches = [images(size, seed) for seed, size in enumerate((TALL, WIDE))]
    expected = [run(model, batch) for batch in batches]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    barrier = threading.Barrier(len(batches))

    def task(index: int) -> bool:
        barrier.wait(60)
        return all(agree(run(model, batches[index]), expected[index]) for _ in range(number))

    try:
        results = in_threads(*(lambda index=index: task(index) for index in range(len(batches))))
    finally:
        sys.setswitchinterval(interval)
    return [result is True for result in results]


@pytest.mark.parametrize("build", [tiny_vit, tiny_dinov2])
def test_many_forwards_of_two_resolutions_at_once(build: Callable[..., nn.Module]) -> None:
    assert hammer(make(build), 60) == [True, True]


def test_with_a_shared_tracker_many_forwards_at_once_go_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    share_the_tracker(monkeypatch)
    model = make()
    assert any(not all(hammer(model, 100)) for _ in range(5))


def test_distances_and_scenes_of_threads_are_their_own() -> None:
    model, first, second = make(), images(TALL), 3 * images(WIDE, 1) + 2
    run(model, first)
    expected = model.calibration.distance()

    def inside() -> Tensor:
        run(model, first)
        return model.calibration.distance()

    def outside() -> Tensor:
        with model.calibration.scene(second):
            run(model, second[..., :32])
        return model.calibration.distance()

    run(model, second)
    other = model.calibration.distance()
    for _ in range(5):
        one, two = in_threads(inside, outside)
        assert torch.equal(one, expected) and torch.equal(two, other) and not torch.equal(one, two)
