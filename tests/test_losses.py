"""The losses alone: against naive computations, and that they prefer what is right."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mgfc import LabelError
from mgfc.losses import check_labels, coarse_loss, fine_loss, label_boundaries, label_mix, medium_loss

IGNORE = 255
GRIDS = [((32, 48), (4, 6)), ((37, 50), (4, 6)), ((5, 7), (5, 7)), ((64, 33), (1, 1)), ((3, 4), (6, 8)), ((30, 20), (7, 3))]


def some_labels(size: tuple[int, int], batch: int = 2, num_classes: int = 5) -> Tensor:
    labels = torch.randint(num_classes, (batch, *size))
    labels[torch.rand(labels.shape) < 0.2] = IGNORE
    return labels


def window(index: int, count: int, size: int) -> slice:
    """The pixels of a patch along one axis, where a size is no multiple of the grid: every pixel that it touches."""
    return slice(math.floor(index * size / count), math.ceil((index + 1) * size / count))


def windows(labels: Tensor, grid: tuple[int, int]) -> list[list[Tensor]]:
    height, width = labels.shape[1:]
    return [
        [image[window(y, grid[0], height), window(x, grid[1], width)] for y in range(grid[0]) for x in range(grid[1])]
        for image in labels
    ]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64], ids=str)
@pytest.mark.parametrize(("size", "grid"), GRIDS, ids=str)
def test_label_mix_counts_the_pixels_of_each_patch(size: Any, grid: Any, dtype: torch.dtype) -> None:
    labels = some_labels(size).to(dtype)
    expected = torch.zeros(2, math.prod(grid), 5)
    for b, patches in enumerate(windows(labels, grid)):
        for n, pixels in enumerate(patches):
            counts = torch.tensor([(pixels == k).sum() for k in range(5)]).float()
            expected[b, n] = counts / counts.sum().clamp_min(1)
    mix = label_mix(labels, grid, 5)
    torch.testing.assert_close(mix, expected, rtol=0, atol=1e-6)
    sums = mix.sum(2)
    assert ((sums - 1).abs().lt(1e-5) | sums.eq(0)).all() and sums.gt(0).any()


def test_label_mix_of_ignored_patches_is_zero() -> None:
    labels = torch.ones(1, 8, 8, dtype=torch.long)
    labels[:, :4] = IGNORE
    assert torch.equal(label_mix(labels, (2, 1), 3), torch.tensor([[[0.0, 0, 0], [0, 1, 0]]]))
    assert torch.equal(label_mix(labels.where(labels == 1, -1), (2, 1), 3, ignore_index=-1), label_mix(labels, (2, 1), 3))
    assert torch.equal(label_mix(torch.full((1, 8, 8), IGNORE), (2, 2), 3), torch.zeros(1, 4, 3))


def test_label_mix_may_ignore_a_class_id() -> None:
    labels = torch.tensor([[[0, 0], [1, 2]]])
    assert torch.equal(label_mix(labels, (1, 1), 3, ignore_index=0), torch.tensor([[[0, 0.5, 0.5]]]))


@pytest.mark.parametrize(("size", "grid"), GRIDS, ids=str)
def test_label_boundaries_of_each_patch(size: Any, grid: Any) -> None:
    labels = some_labels(size, num_classes=2)
    labels[:, : size[0] // 2] = 1
    edges = torch.zeros(labels.shape, dtype=torch.long)
    for b, y, x in np.ndindex(*labels.shape):
        for other in ((y + 1, x), (y, x + 1)):
            if other[0] < size[0] and other[1] < size[1]:
                pair = {int(labels[b, y, x]), int(labels[(b, *other)])}
                edges[b, y, x] |= len(pair) == 2 and IGNORE not in pair
    expected = torch.tensor([[float(pixels.max()) for pixels in patches] for patches in windows(edges, grid)])
    assert torch.equal(label_boundaries(labels, grid), expected) and expected.max() == 1


def test_an_ignored_region_has_no_boundary() -> None:
    labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
    labels[:, :, 3:5] = IGNORE
    labels[:, :, 5:] = 1
    assert not label_boundaries(labels, (2, 2)).any()
    assert label_boundaries(labels, (2, 2), ignore_index=-1).all()


@pytest.mark.parametrize(("dtype", "void", "ignore_index"), [(torch.uint8, 255, -1), (torch.int8, -1, 255)], ids=str)
def test_an_ignore_index_beyond_the_dtype_does_not_wrap(dtype: torch.dtype, void: int, ignore_index: int) -> None:
    labels = torch.zeros(2, 8, 8, dtype=dtype)
    labels[:, :, 4:] = void
    assert label_boundaries(labels, (2, 2), ignore_index).any()
    with pytest.raises(LabelError, match=f"found {min(void, 0)} to {max(void, 0)}"):
        check_labels(labels, 2, 5, ignore_index)


# Each loss prefers what is right


def test_coarse_loss_prefers_the_categories_that_are_there() -> None:
    labels = torch.tensor([[[0, 2], [IGNORE, 2]], [[1, 1], [1, 1]]])
    present = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0]])
    right, wrong = coarse_loss(present * 20 - 10, labels), coarse_loss(10 - present * 20, labels)
    assert right < 1e-3 and wrong > 9
    assert coarse_loss(torch.zeros(2, 4), labels) == pytest.approx(math.log(2))
    half = present.clone()
    half[0, 2] = 0
    assert right < coarse_loss(half * 20 - 10, labels) < wrong


def test_medium_loss_prefers_the_class_of_the_patch() -> None:
    labels = torch.randint(4, (2, 3, 4))
    mix = label_mix(labels, (3, 4), 4)
    logits = 20 * torch.zeros(2, 12, 4).scatter(2, labels.flatten(1).unsqueeze(2), 1.0)
    right, wrong = medium_loss(logits, mix), medium_loss(-logits, mix)
    assert right < 1e-3 and wrong > 15
    assert medium_loss(torch.zeros(2, 12, 4), mix) == pytest.approx(math.log(4))


def test_medium_loss_is_the_mean_over_the_patches_that_count() -> None:
    category, mix = torch.randn(2, 5, 4), torch.rand(2, 5, 4)
    mix = mix / mix.sum(2, keepdim=True)
    mix[0, 3] = 0
    terms = [
        -sum(mix[b, n, k] * category[b, n].log_softmax(0)[k] for k in range(4))
        for b in range(2)
        for n in range(5)
        if (b, n) != (0, 3)
    ]
    torch.testing.assert_close(medium_loss(category, mix), sum(terms) / 9)


def test_fine_loss_prefers_the_boundaries() -> None:
    target = torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 1]])
    right, wrong = fine_loss(target * 20 - 10, target), fine_loss(10 - target * 20, target)
    assert right < 1e-3 and wrong > 9
    assert fine_loss(torch.zeros(2, 4), target) == pytest.approx(math.log(2))


def test_fine_loss_weighs_both_kinds_of_patches_the_same() -> None:
    target = torch.zeros(1, 10)
    target[0, 0] = 1
    missed, false_alarms = torch.full((1, 10), -5.0), torch.full((1, 10), 5.0)
    assert fine_loss(missed, target) == pytest.approx(float(fine_loss(false_alarms, target)))


def losses_of(labels: Tensor, scale: float = 1.0) -> tuple[Tensor, list[Tensor]]:
    presence, category, boundary = torch.randn(2, 5), torch.randn(2, 12, 5), torch.randn(2, 12)
    inputs = [(scale * item).requires_grad_() for item in (presence, category, boundary)]
    loss = coarse_loss(inputs[0], labels)
    loss = loss + medium_loss(inputs[1], label_mix(labels, (3, 4), 5))
    return loss + fine_loss(inputs[2], label_boundaries(labels, (3, 4))), inputs


@pytest.mark.parametrize(
    "labels",
    [some_labels((30, 44)), torch.full((2, 30, 44), IGNORE), torch.zeros(2, 30, 44, dtype=torch.uint8), some_labels((1, 1))],
    ids=["some", "all ignored", "one class", "one pixel"],
)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_values_and_gradients_are_finite(labels: Tensor, scale: float) -> None:
    loss, inputs = losses_of(labels, scale)
    loss.backward()
    assert loss.isfinite() and loss.ndim == 0
    assert all(item.grad is not None and item.grad.isfinite().all() for item in inputs)


def test_half_precision_predictions_give_float32_losses() -> None:
    labels = some_labels((30, 44))
    mix, target = label_mix(labels, (3, 4), 5), label_boundaries(labels, (3, 4))
    half = [torch.randn(2, 5).bfloat16(), torch.randn(2, 12, 5).bfloat16(), torch.randn(2, 12).bfloat16()]
    values = [coarse_loss(half[0], labels), medium_loss(half[1], mix), fine_loss(half[2], target)]
    assert [value.dtype for value in values] == [torch.float32] * 3


# Labels


GOOD = torch.zeros(2, 8, 8, dtype=torch.long)


@pytest.mark.parametrize(
    ("labels", "facts"),
    [
        (GOOD[0], ["expected shape (2, H, W)", "found (8, 8)"]),
        (GOOD[:1], ["expected shape (2, H, W)", "found (1, 8, 8)"]),
        (GOOD.unsqueeze(1), ["expected shape (2, H, W)", "found (2, 1, 8, 8)"]),
        (np.zeros((2, 8, 8)), ["expected shape (2, H, W)", "found ndarray"]),
        (None, ["expected shape (2, H, W)", "found NoneType"]),
        (GOOD.float(), ["expected integers", "found torch.float32", "labels.long()"]),
        (GOOD.bool(), ["expected integers", "found torch.bool"]),
        (GOOD + 5, ["class ids from 0 to 4", "ignore_index=255", "found 5 to 5", "num_classes"]),
        (GOOD - 1, ["class ids from 0 to 4", "found -1 to -1"]),
        (torch.arange(128).reshape(2, 8, 8), ["found 0 to 127"]),
    ],
    ids=lambda value: str(getattr(value, "shape", ""))[:40],
)
def test_wrong_labels(labels: Any, facts: list[str]) -> None:
    with pytest.raises(LabelError) as caught:
        check_labels(labels, 2, 5, IGNORE)
    assert [fact for fact in facts if fact not in str(caught.value)] == []


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_right_labels(dtype: torch.dtype) -> None:
    labels = torch.randint(5, (2, 8, 8)).to(dtype)
    check_labels(labels, 2, 5, IGNORE)
    ignored = labels.clone()
    ignored[0] = -1
    check_labels(ignored, 2, 5, int(ignored[0, 0, 0]))
    check_labels(torch.full((2, 8, 8), 7, dtype=dtype), 2, 5, 7)
