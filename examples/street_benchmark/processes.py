"""One process or many: torchrun's processes, and how a model is spread over them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

ENGINES = ("ddp", "fsdp")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def processes() -> Iterator[torch.device]:
    """Joins the processes that torchrun started, if it did and nobody has yet. Gives the device of this one."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    joins = "RANK" in os.environ and not dist.is_initialized()
    if joins:
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield device
    finally:
        if joins:
            dist.destroy_process_group()


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of what all processes hold, in each of them."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def wait() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def first_process_first() -> Iterator[None]:
    """The first process goes through it before the others do."""
    if rank() > 0:
        wait()
    yield
    if rank() == 0:
        wait()


def spread(model: nn.Module, blocks: nn.ModuleList, engine: str, device: torch.device) -> nn.Module:
    """A model as it trains: as it is in one process, by DDP, or by FSDP2 with each block of the backbone by itself."""
    if world() == 1:
        return model
    if engine == "ddp":
        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    mesh = init_device_mesh(device.type, (world(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model
