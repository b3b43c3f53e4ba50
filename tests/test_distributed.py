"""Several processes train as one does: DDP, FSDP2 and DeepSpeed on gloo, with checkpointing and mixed precision."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import leaving
import pytest
import timm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.multiprocessing as mp
from hub_server import HubServer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mgfc import (
    CoarseConfig,
    FeatureMaps,
    FineConfig,
    MediumConfig,
    MGFCConfig,
    SegmentationHead,
    unwrap_backbone,
    wrap_backbone,
)
from mgfc.distributed import gathered, whole

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
WORLD, STEPS, BATCH, LR = 2, 4, 4, 0.1
CONFIG = MGFCConfig(
    rank=8,
    num_classes=5,
    coarse=CoarseConfig(loss_weight=0.1),
    medium=MediumConfig(loss_weight=0.1, num_prototypes=4),
    fine=FineConfig(loss_weight=0.1),
)


class Segmenter(nn.Module):
    def __init__(self, config: MGFCConfig, building: AbstractContextManager[Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        with building or nullcontext():
            vit = timm.create_model(
                "vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=3, num_heads=2, num_classes=0, dynamic_img_size=True
            )
        self.maps = FeatureMaps(wrap_backbone(vit, config), (0, 2))
        self.head = SegmentationHead(self.maps.channels, 5)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = nn.functional.interpolate(self.head(self.maps(images)), size=labels.shape[1:], mode="bilinear")
        return nn.functional.cross_entropy(logits, labels), self.maps.backbone.calibration.loss(labels)


def batches(rank: int, world: int) -> list[tuple[Tensor, Tensor]]:
    """This process's part of a batch, again and again; all parts, in order of rank, are the batch of one process."""
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, 32, 48, generator=draw)
    labels = torch.randint(0, 5, (BATCH, 32, 48), generator=draw)
    part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    return [(images[part], labels[part])] * STEPS


def train(model: nn.Module, rank: int = 0, world: int = 1, autocast: bool = False) -> list[float]:
    """The mean loss over processes of each step."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    curve = []
    for images, labels in batches(rank, world):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = sum(model(images, labels))
        if hasattr(model, "backward"):  # an engine of DeepSpeed's, with an optimizer of its own
            model.backward(loss)
            model.step()
        else:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        value = loss.detach().clone()
        if world > 1:
            dist.all_reduce(value)
        curve.append(float(value) / world)
    return curve


def work(rank: int, kind: str, folder: str, options: dict[str, Any]) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    building = None
    if options.get("sharded_before_wrapping"):
        import deepspeed

        building = deepspeed.zero.Init(config_dict_or_path=zero_config(3))
    model = Segmenter(options.get("config", CONFIG), building)
    if options.get("checkpointing"):
        model.maps.backbone.set_grad_checkpointing()
    wrapped = distribute(model, kind)
    if "load" in options:
        load_shards(wrapped, options["load"])
    curve = train(wrapped, rank, WORLD, options.get("autocast", False))
    if "save" in options:
        save_shards(wrapped, options["save"])
    calibration = model.maps.backbone.calibration
    if kind in ("fsdp", "zero3") or rank == 0:
        calibration.save_pretrained(f"{folder}/adapter")
    if "repo" in options:
        calibration.push_to_hub(options["repo"], head=model.head)
    with gathered(calibration):
        state = {name: whole(value.detach()).clone() for name, value in calibration.adapter.state_dict().items()}
    if rank == 0:
        torch.save({"curve": curve, "state": state}, f"{folder}/result.pt")
    dist.barrier()
    dist.destroy_process_group()
    leaving.leave()


def distribute(model: Segmenter, kind: str) -> Any:
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind.startswith("zero"):
        import deepspeed

        config = zero_config(stage=int(kind[-1]))
        return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in model.maps.backbone.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def save_shards(model: Any, folder: str) -> None:
    """A checkpoint without the backbone, in the engine's own format."""
    if hasattr(model, "save_checkpoint"):
        model.save_checkpoint(folder, exclude_frozen_parameters=True)
    else:
        torch.distributed.checkpoint.save(adapted(model.state_dict()), checkpoint_id=folder)


def load_shards(model: Any, folder: str) -> None:
    if hasattr(model, "load_checkpoint"):
        model.load_checkpoint(folder, load_module_strict=False)
    else:
        torch.distributed.checkpoint.load(adapted(model.state_dict()), checkpoint_id=folder)


def adapted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of all that the model holds, what training changes."""
    return {name: value for name, value in state.items() if "calibration" in name or name.startswith("head.")}


def zero_config(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": BATCH // WORLD,
        "optimizer": {"type": "SGD", "params": {"lr": LR}},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }


def run(kind: str, folder: Path, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed")
    mp.spawn(work, (kind, str(folder), options), nprocs=WORLD)
    found = torch.load(folder / "result.pt", weights_only=True)
    return found["curve"], found["state"]


def alone(**options: Any) -> tuple[list[float], dict[str, Tensor]]:
    model = Segmenter(options.get("config", CONFIG))
    curve = train(model, autocast=options.get("autocast", False))
    if options.get("resume"):
        curve += train(model)
    return curve, model.maps.backbone.calibration.adapter.state_dict()


ENGINES = ["ddp", "fsdp", *(pytest.param(kind, marks=pytest.mark.hosts) for kind in ("zero1", "zero3"))]
NO_LOSSES = MGFCConfig(rank=8, medium=MediumConfig(num_prototypes=4))


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("options", [{}, {"checkpointing": True}], ids=["plain", "checkpointing"])
def test_two_processes_train_as_one(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    options = {"config": NO_LOSSES, **options}
    curve, state = run(kind, tmp_path, **options)
    expected, parameters = alone(**options)
    assert max(abs(a - b) for a, b in zip(curve, expected, strict=True)) <= 1e-5
    assert expected[-1] < expected[0]
    assert state.keys() == parameters.keys()
    for key, value in parameters.items():
        torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-5)


def test_mixed_precision(tmp_path: Path) -> None:
    curve, _ = run("ddp", tmp_path, config=NO_LOSSES, autocast=True)
    expected, _ = alone(config=NO_LOSSES, autocast=True)
    assert max(abs(a - b) for a, b in zip(curve, expected, strict=True)) <= 2e-2


def test_losses_of_the_calibrators_use_every_parameter(tmp_path: Path) -> None:
    curve, _ = run("ddp", tmp_path)
    assert len(curve) == STEPS  # DDP raises at the second step if a parameter has no gradient


@pytest.mark.parametrize("kind", ENGINES)
def test_what_was_trained_is_saved_and_loads(kind: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    _, state = run(kind, tmp_path, config=NO_LOSSES)
    vit = unwrap_backbone(Segmenter(NO_LOSSES).maps.backbone)
    wrap_backbone(vit, tmp_path / "adapter")
    assert all(torch.equal(value, state[key]) for key, value in vit.calibration.adapter.state_dict().items())
    assert not [warning for warning in recwarn if "other weights" in str(warning.message)]


@pytest.mark.hosts
def test_a_backbone_that_is_sharded_already(tmp_path: Path) -> None:
    """As Transformers loads one where DeepSpeed's ZeRO-3 is on: its own parameters look empty."""
    curve, state = run("zero3", tmp_path, config=NO_LOSSES, sharded_before_wrapping=True)
    assert curve[-1] < curve[0]
    vit = unwrap_backbone(Segmenter(NO_LOSSES).maps.backbone)
    with pytest.warns(UserWarning, match="other weights"):  # initialisation finds them empty, too
        wrap_backbone(vit, tmp_path / "adapter")
    assert all(torch.equal(value, state[key]) for key, value in vit.calibration.adapter.state_dict().items())


def test_one_process_of_all_pushes_what_is_sharded(logged_in: HubServer, tmp_path: Path) -> None:
    repo = "org/sharded"
    _, state = run("fsdp", tmp_path, config=NO_LOSSES, repo=repo)
    assert [r.path for r in logged_in.requests].count("/api/repos/create") == 1
    assert "head.safetensors" in logged_in.files(repo)
    vit = wrap_backbone(unwrap_backbone(Segmenter(NO_LOSSES).maps.backbone), repo)
    assert all(torch.equal(value, state[key]) for key, value in vit.calibration.adapter.state_dict().items())


@pytest.mark.parametrize("kind", ENGINES[1:])
def test_a_checkpoint_of_the_adapter_alone_resumes(kind: str, tmp_path: Path) -> None:
    shards, (first, second) = tmp_path / "shards", (tmp_path / "first", tmp_path / "second")
    for folder in (first, second):
        folder.mkdir()
    curve, _ = run(kind, first, config=NO_LOSSES, save=str(shards))
    resumed, state = run(kind, second, config=NO_LOSSES, load=str(shards))
    curve += resumed
    expected, parameters = alone(config=NO_LOSSES, resume=True)
    assert len(curve) == 2 * STEPS and expected[-1] < expected[STEPS]
    assert max(abs(a - b) for a, b in zip(curve, expected, strict=True)) <= 1e-5
    for key, value in parameters.items():
        torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-5)
    if kind == "fsdp":
        saved = torch.distributed.checkpoint.FileSystemReader(shards).read_metadata().state_dict_metadata
        assert sorted(saved) == sorted(adapted(Segmenter(NO_LOSSES).state_dict()))


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_the_example_under_torchrun(engine: str, tmp_path: Path) -> None:
    example = Path(__file__).parents[1] / "examples" / "train_distributed.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(WORLD), leaving.__file__]
    words = f"--engine {engine} --model test_vit --size 32 48 --steps 2 --out {tmp_path / 'adapter'}".split()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, str(example), *words], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("step ") == 2
    vit = wrap_backbone(timm.create_model("test_vit", dynamic_img_size=True), tmp_path / "adapter")
    assert vit.calibration.num_batches == 2


ACCELERATED = """
import sys

import torch
from accelerate import Accelerator
from test_distributed import NO_LOSSES, Segmenter, batches

accelerator = Accelerator(cpu=True)
model = Segmenter(NO_LOSSES)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
model, optimizer = accelerator.prepare(model.train(), optimizer)
for images, labels in batches(accelerator.process_index, accelerator.num_processes):
    accelerator.backward(sum(model(images, labels)))
    optimizer.step()
    optimizer.zero_grad()
accelerator.unwrap_model(model).maps.backbone.calibration.save_pretrained(sys.argv[1])
assert accelerator.num_processes == int(sys.argv[2])
"""


def test_accelerate_launch(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    (tmp_path / "train.py").write_text(ACCELERATED)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(WORLD)]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    script = [leaving.__file__, str(tmp_path / "train.py"), str(tmp_path / "adapter"), str(WORLD)]
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "strides do not match" not in done.stderr
    vit = unwrap_backbone(Segmenter(NO_LOSSES).maps.backbone)
    wrap_backbone(vit, tmp_path / "adapter")
    _, expected = alone(config=NO_LOSSES)
    for key, value in vit.calibration.adapter.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)
