"""Which blocks a `layers` value of a configuration names."""

from __future__ import annotations

from collections.abc import Sequence

from mgfc.config import Layers, expect


def select_layers(layers: Layers, depth: int, where: str, among: Sequence[int] | None = None) -> tuple[int, ...]:
    """The block indices that a `layers` value names, ascending, for a backbone of `depth` blocks.

    Args:
        layers: "all", "first:n", "last:n" or block indices.
        depth: blocks of the backbone.
        where: the field, for errors.
        among: the only blocks to choose from; "first:n" and "last:n" then count these, and take all if they are fewer.

    Raises:
        ConfigError: if it names a block that is not there.
    """
    blocks = tuple(range(depth) if among is None else among)
    if isinstance(layers, str):
        kind, _, count = layers.partition(":")
        if kind == "all":
            return blocks
        expect(among is not None or int(count) <= depth, where, f"at most the backbone's {depth} blocks", layers)
        return blocks[: int(count)] if kind == "first" else blocks[-int(count) :]
    chosen = {i % depth if -depth <= i < depth else i for i in layers}
    expected = f"block indices of a backbone of {depth} blocks" if among is None else f"calibrated blocks, that is, {blocks}"
    expect(chosen <= set(blocks), where, expected, layers)
    return tuple(sorted(chosen))
