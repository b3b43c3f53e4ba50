"""The reference segmentation head."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import randomise

from mgfc import SegmentationHead


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(6, 9)], (12, 18)),
        ([(6, 9), (6, 9)], (12, 18)),
        ([(3, 5), (6, 9), (24, 36)], (48, 72)),
        ([(8, 2), (2, 8)], (16, 16)),
        ([(1, 1)], (2, 2)),
    ],
    ids=str,
)
def test_logits_at_twice_the_largest_map(sizes: list[tuple[int, int]], expected: tuple[int, int]) -> None:
    channels = [8 * (i + 1) for i in range(len(sizes))]
    maps = [torch.randn(2, c, *size) for c, size in zip(channels, sizes, strict=True)]
    assert SegmentationHead(channels, 11, hidden_dim=16)(maps).shape == (2, 11, *expected)


def test_every_map_and_every_parameter_takes_part() -> None:
    head = SegmentationHead([8, 12], 5, hidden_dim=16)
    maps = [torch.randn(2, 8, 6, 9, requires_grad=True), torch.randn(2, 12, 3, 4, requires_grad=True)]
    head(maps).square().sum().backward()
    assert all(item.grad is not None and item.grad.abs().max() > 0 for item in [*maps, *head.parameters()])


def test_arguments_rebuild_the_same_head() -> None:
    head, maps = SegmentationHead((8, 12), num_classes=5, hidden_dim=16), [torch.randn(2, 8, 6, 9), torch.randn(2, 12, 3, 4)]
    randomise(head)
    again = SegmentationHead(**json.loads(json.dumps(head.arguments)))
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(maps), head(maps)) and again.arguments == head.arguments


def test_channels_last_maps_give_the_same_logits() -> None:
    head, maps = SegmentationHead([8], 5, hidden_dim=16).double(), [torch.randn(2, 8, 6, 9, dtype=torch.float64)]
    torch.testing.assert_close(head([maps[0].to(memory_format=torch.channels_last)]), head(maps), rtol=0, atol=1e-12)


def test_half_precision() -> None:
    logits = SegmentationHead([8, 8], 5, hidden_dim=16).bfloat16()([torch.randn(1, 8, 4, 4).bfloat16()] * 2)
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_maps_is_an_error(count: int) -> None:
    with pytest.raises(ValueError, match="zip"):
        SegmentationHead([8, 8], 5)([torch.randn(1, 8, 4, 4)] * count)
