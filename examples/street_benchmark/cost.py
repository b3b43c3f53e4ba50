"""Hours and memory to expect of a run, computed from multiplications, bytes and a card's data sheet. Nothing here is measured.

A multiplication with its addition counts as two operations (FLOPs). A backward pass costs once the forward for the gradient
of the inputs, and once more for that of the weights where they are trained. The head computes in TF32, at half the rate of
bfloat16 and, since its operations are small, at a third of the share of it that the backbone reaches. A step has a fixed
overhead beside.
"""

from __future__ import annotations

from dataclasses import dataclass

from street_benchmark.settings import BATCH_SIZE, CROP, PATCH, STEPS

GIB = 2**30
# Of its data sheet's rate for dense bfloat16. What a ViT-L reaches in training by PyTorch is usually between 0.3 and 0.5.
UTILISATION, HEAD_UTILISATION = 0.35, 0.12
# Seconds of a step that no faster card shortens: some thousand small kernels to launch, masks matched on the CPU. Assumed.
OVERHEAD = 0.1
# Bytes that a ViT block keeps for the backward pass, for a token and a channel: arXiv 2205.05198, Equation 2, without the
# matrix of attention, which fused attention does not keep.
KEPT_BY_A_BLOCK = 34
# Bytes that the Mask2Former head and its loss keep for the backward pass, for a pixel of a crop; counted by
# `torch.autograd.graph.saved_tensors_hooks`, see tests/test_street_benchmark.py.
KEPT_BY_THE_HEAD = 4400
CARDS = {"RTX 4090, 24 GB": 165e12, "A100, 80 GB": 312e12, "H100, 80 GB": 989e12}
"""Dense bfloat16 operations a second, by the makers' data sheets."""


@dataclass(frozen=True)
class Backbone:
    """A plain ViT.

    Args:
        width: C.
        depth: blocks.
        parameters: of all of it.
    """

    width: int = 1024
    depth: int = 24
    parameters: float = 304e6

    def forward(self, tokens: int) -> float:
        """FLOPs of one image: linear layers 24 N C^2, attention 4 N^2 C, in each block."""
        return self.depth * (24 * tokens * self.width**2 + 4 * tokens**2 * self.width)


@dataclass(frozen=True)
class Trains:
    """What a method trains in the backbone, and how far back gradients go.

    Args:
        parameters: trained ones.
        backward: cost of the backbone's backward pass, in forward passes.
    """

    parameters: float
    backward: float


# Trained parameters of DINOv2-L/16, and whether gradients pass the backbone and reach its own weights.
METHODS = {
    "frozen": Trains(0, 0),
    "full": Trains(304e6, 2),
    "lora": Trains(6.3e6, 1),
    "rein": Trains(2.5e6, 1),
    "mgfc": Trains(2.0e6, 1),
}
HEAD_PARAMETERS = 20.6e6


def head_forward(crop: int, width: int = 1024, dim: int = 256, queries: int = 100) -> float:
    """FLOPs of Mask2Former's head for one crop: pixel decoder, then transformer decoder."""
    strides = {stride: (crop // stride) ** 2 for stride in (4, 8, 16, 32)}
    tokens = strides[8] + strides[16] + strides[32]
    inputs = 2 * width * dim * (tokens + strides[4])
    sampling = 8 * 3 * 4 * 3  # heads, levels, points, and two offsets with a weight
    encoder = 6 * 2 * tokens * dim * (2 * dim + sampling + 2 * 1024)
    finest = 2 * strides[4] * dim * (9 * dim + dim)
    cross = 3 * (2 * 2 * tokens * dim**2 + 4 * queries * tokens * dim)  # each of three levels three times
    queries_alone = 9 * 2 * queries * dim * (2 * dim + 4 * dim + 2 * 2048) + 9 * 4 * queries**2 * dim
    masks = 10 * 2 * queries * (dim * strides[4] + 3 * dim**2)
    return inputs + encoder + finest + cross + queries_alone + masks


@dataclass(frozen=True)
class Expected:
    """Of one run on one card.

    Args:
        hours: of training.
        memory: GiB at its peak.
    """

    hours: float
    memory: float


def expect(
    method: str,
    rate: float,
    *,
    processes: int = 1,
    checkpointing: bool = False,
    crop: int = CROP,
    batch_size: int = BATCH_SIZE,
    steps: int = STEPS,
    backbone: Backbone | None = None,
) -> Expected:
    """What a run by the protocol takes.

    Args:
        method: a name in `METHODS`.
        rate: dense bfloat16 operations a second of a card: a value of `CARDS`.
        processes: cards that share a batch by DDP; communication is not counted.
        checkpointing: whether the backbone's activations are computed twice instead of kept.
        crop: height and width of crops.
        batch_size: crops in a step.
        steps: of the run.
        backbone: DINOv2-L by default.
    """
    vit, trains, crops = backbone or Backbone(), METHODS[method], batch_size / processes
    tokens = (crop // PATCH) ** 2 + 1
    again = 1 if checkpointing and trains.backward else 0
    operations = crops * vit.forward(tokens) * (1 + again + trains.backward)
    seconds = operations / (rate * UTILISATION) + crops * 3 * head_forward(crop, vit.width) / (rate / 2 * HEAD_UTILISATION)
    return Expected(steps * (seconds + OVERHEAD) / 3600, _memory(vit, trains, crops, tokens, checkpointing, crop) / GIB)


def _memory(vit: Backbone, trains: Trains, crops: float, tokens: int, checkpointing: bool, crop: int) -> float:
    """Bytes: weights, their copies in bfloat16, gradients with AdamW's two moments, and what the backward pass needs."""
    trained = HEAD_PARAMETERS + trains.parameters
    weights = 4 * (vit.parameters + trained) + 2 * vit.parameters + 12 * trained
    block = KEPT_BY_A_BLOCK * tokens * vit.width
    kept = 0 if not trains.backward else vit.depth * 2 * tokens * vit.width + block if checkpointing else vit.depth * block
    return weights + crops * (kept + KEPT_BY_THE_HEAD * crop**2)


def table() -> str:
    """Hours and memory of each method by the protocol, in Markdown."""
    from domain_generalization.report import markdown

    rows = []
    for method in METHODS:
        hours = [f"{expect(method, rate).hours:.1f}" for rate in CARDS.values()]
        four = f"{expect(method, CARDS['A100, 80 GB'], processes=4).hours:.1f}"
        memory = [expect(method, 1e12).memory, expect(method, 1e12, checkpointing=True).memory]
        rows.append([method, *hours, four, *(f"{value:.0f}" for value in memory)])
    titles = [f"hours, one {card}" for card in CARDS]
    return markdown(["method", *titles, "hours, four A100", "GiB", "GiB, `--checkpointing`"], rows)
