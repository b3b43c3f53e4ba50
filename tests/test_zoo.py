"""Each row of the zoo, observed on the bare model: plain hooks, one perturbed cell, the libraries' own switches."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import CASES, Case, Grid, cases


def record(case: Case, model: nn.Module, images: Tensor) -> tuple[list[str], list[Tensor], Any]:
    """Names in order of execution, token tensors, and the model's own output."""
    names: list[str] = []
    outputs: list[Tensor] = []

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            assert isinstance(output, Tensor) == (case.item is None)
            names.append(name)
            outputs.append(case.tokens(output).detach())

        return keep

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in case.blocks]
    with torch.no_grad():
        result = case.call(model, images)
    for handle in handles:
        handle.remove()
    return names, outputs, result


def expected_shape(case: Case, n: int, batch: int, grid: Grid) -> tuple[int, ...]:
    (h, w), dim = grid, case.dims[n]
    if case.layout == "NHWC":
        return batch, h, w, dim
    if case.layout == "NCHW":
        return batch, dim, h, w
    if case.layout == "windows":
        return 4 * batch, case.leading[n] + h * w // 4, dim
    return batch, case.leading[n] + h * w + case.trailing[n], dim


def flat(case: Case, tokens: Tensor) -> Tensor:
    """(B, extra and patch tokens, C), in the block's own order."""
    if case.layout == "NCHW":
        tokens = tokens.movedim(1, -1)
    return tokens.flatten(1, -2) if tokens.ndim > 3 else tokens


def perturbed(case: Case, grid: Grid, seed: int, limit: int = 12) -> tuple[Tensor, list[Grid]]:
    """A batch: an image as it is, then with one cell of the grid replaced by noise in each copy."""
    (height, width), (h, w) = case.image_size, grid
    cells = [(r, c) for r in range(h) for c in range(w)]
    cells = cells[:: math.ceil(len(cells) / limit)]
    images, noise = case.images(1, seed).repeat(len(cells) + 1, 1, 1, 1), 5 * case.images(1, seed + 100)[0]
    for image, (r, c) in zip(images[1:], cells, strict=True):
        rows = slice(round(r * height / h), round((r + 1) * height / h))
        columns = slice(round(c * width / w), round((c + 1) * width / w))
        image[:, rows, columns] = noise[:, rows, columns]
    return images, cells


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert cases(tier=1) and cases(library="timm") and set(cases()) == set(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_row(case: Case) -> None:
    model = case.build()
    assert not model.training
    check_architecture(case, model)
    check_blocks(case, model)
    if case.dynamic:
        check_other_size(case, model)
    if case.layout in ("NLC", "NHWC", "NCHW", "BTNC") and case.grids[0] is not None:
        check_raster_order(case, model)
    check_features(case, model)
    if case.library != "authors":  # theirs is a wrapper around a block, if any
        check_checkpointing(case, model)


def check_architecture(case: Case, model: nn.Module) -> None:
    assert type(model).__name__ == case.architecture


def check_blocks(case: Case, model: nn.Module) -> None:
    names, outputs, _ = record(case, model, case.images())
    assert tuple(names) == case.blocks
    for n, (tokens, grid) in enumerate(zip(outputs, case.grids, strict=True)):
        assert tokens.isfinite().all()
        assert tokens.shape[1 if case.layout == "NCHW" else -1] == case.dims[n]
        if grid is not None:
            shape = tokens.flatten(1, 2).shape if case.layout == "BTNC" else tokens.shape
            assert tuple(shape) == expected_shape(case, n, 2, grid), n


def check_other_size(case: Case, model: nn.Module) -> None:
    height, width = case.image_size
    _, outputs, _ = record(case, model, case.images(size=(height, 2 * width)))
    for n, (tokens, grid) in enumerate(zip(outputs, case.grids, strict=True)):
        assert grid is None or tuple(tokens.shape) == expected_shape(case, n, 2, (grid[0], 2 * grid[1]))


def check_raster_order(case: Case, model: nn.Module) -> None:
    """In the first block of each grid, the most changed token is the perturbed cell."""

    def tokens_of(images: Tensor, n: int) -> Tensor:
        return flat(case, record(case, model, images)[1][n])

    starts = grid_starts(case)
    assert all(in_raster_order(case, n, partial(tokens_of, n=n), case.leading[n]) for n in starts) == case.raster


def grid_starts(case: Case) -> list[int]:
    """Block 0, and the first block of each later grid that is fine enough to tell places apart."""
    grids = case.grids
    return [0, *(n for n in range(1, len(grids)) if grids[n] and grids[n] != grids[n - 1] and min(grids[n]) > 2)]


def in_raster_order(case: Case, n: int, tokens_of: Callable[[Tensor], Tensor], leading: int) -> bool:
    """Whether the most changed of block n's tokens is that of the perturbed cell, for each cell.

    An overlapping stem may favour the neighbour of the perturbed cell, hence the tolerance of one.
    """
    change = 0
    for seed in range(3):
        images, cells = perturbed(case, case.grids[n], seed)
        tokens = tokens_of(images)
        change = change + (tokens[1:] - tokens[:1]).norm(dim=-1)
    found = [divmod(k - leading, case.grids[n][1]) for k in change.argmax(dim=1).tolist()]
    near = all(max(abs(r - y), abs(c - x)) <= 1 for (r, c), (y, x) in zip(cells, found, strict=True))
    pairs = zip(zip(*cells, strict=True), zip(*found, strict=True), strict=True)
    return near and all(torch.corrcoef(torch.tensor(pair, dtype=torch.float))[0, 1] > 0.8 for pair in pairs)


def check_features(case: Case, model: nn.Module) -> None:
    offered = []
    if hasattr(model, "forward_intermediates"):
        offered.append("forward_intermediates")
    if case.library == "timm":
        try:
            case.build(features_only=True, out_indices=(0,))
            offered.append("features_only")
        except (RuntimeError, TypeError, AttributeError):
            pass
    elif case.library == "transformers":
        with torch.no_grad():
            output = case.call(model, case.images(), output_hidden_states=True)
        offered += [name for name in ("hidden_states", "feature_maps") if getattr(output, name, None) is not None]
    assert tuple(offered) == case.features


def check_checkpointing(case: Case, model: nn.Module) -> None:
    try:
        model.set_grad_checkpointing(True) if case.library == "timm" else model.gradient_checkpointing_enable()
        supported = True
    except (AssertionError, ValueError):
        supported = False
    assert supported == case.checkpointing
