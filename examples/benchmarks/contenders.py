"""Who is compared in `cost.py`: a frozen DINOv2 of random weights, and what each way to adapt it makes of it."""

from __future__ import annotations

import copy
import functools
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model

sys.path.append(str(Path(__file__).parents[1]))

from domain_generalization import methods

from mgfc import ConfigError, MGFCConfig, wrap_backbone

PATCH = 14
NUM_CLASSES = 19
# Width, depth and heads; T is for tests alone.
MODELS = {"T": (32, 4, 2), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}
STAGES = ("coarse", "medium", "fine")


class NotAvailable(Exception):  # noqa: N818 - a result rather than an error
    """This version of mgfc has no such form."""


def configure(*stages: str) -> MGFCConfig:
    """The adapter and these stages alone, each as by default."""
    return MGFCConfig.from_dict({stage: {} if stage in stages else None for stage in STAGES})


def mgfc(vit: nn.Module) -> None:
    wrap_backbone(vit)


def mgfc_stages(vit: nn.Module, stages: tuple[str, ...] = ()) -> None:
    wrap_backbone(vit, configure(*stages))


def mgfc_late(vit: nn.Module) -> None:
    wrap_backbone(vit, MGFCConfig(layers="last:4"))


def lora(vit: Any, rank: int = 8, **options: Any) -> None:
    """LoRA on every linear layer of the blocks, by `peft`; their names differ between versions of Transformers."""
    linears = {name.rsplit(".")[-1] for name, layer in vit.encoder.named_modules() if isinstance(layer, nn.Linear)}
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=sorted(linears), **options)
    inject_adapter_in_model(config, vit)


def dora(vit: nn.Module) -> None:
    """DoRA on the same layers."""
    lora(vit, use_dora=True)


def fuse(vit: Any) -> None:
    """Puts mgfc's adapter into the frozen weights, where this version of mgfc can."""
    if not hasattr(vit.calibration, "fuse"):
        raise NotAvailable("the calibration has no fuse()")
    vit.calibration.fuse()


def merge(vit: nn.Module) -> None:
    """Puts PEFT's adapters into the frozen weights, and leaves plain linear layers."""
    layers = [(name, layer) for name, layer in vit.named_modules() if isinstance(layer, BaseTunerLayer)]
    for name, layer in layers:
        layer.merge()
        vit.set_submodule(name, layer.get_base_layer())


@dataclass(frozen=True)
class Contender:
    """A way to adapt a backbone.

    Args:
        adapt: changes a frozen `Dinov2Model` in place and leaves trainable what it trains.
        finish: what is done once before inference.
        figures: what is measured of it.
    """

    adapt: Callable[[nn.Module], None]
    finish: Callable[[nn.Module], None] | None = None
    figures: tuple[str, ...] = ("inference", "training")


INFERENCE = ("inference",)
CONTENDERS = {
    "bare": Contender(methods.frozen),
    "mgfc": Contender(mgfc),
    "mgfc_fused": Contender(mgfc, fuse, INFERENCE),
    "lora": Contender(lora),
    "lora_merged": Contender(lora, merge, INFERENCE),
    "dora": Contender(dora),
    "rein": Contender(methods.rein),
    "adaptformer": Contender(methods.adaptformer),
    "vpt": Contender(methods.vpt_deep),
    "full": Contender(methods.full, figures=("training",)),
    "mgfc_last4": Contender(mgfc_late),
    "mgfc_adapter": Contender(mgfc_stages),
    **{f"mgfc_{s}": Contender(functools.partial(mgfc_stages, stages=(s,))) for s in STAGES},
}


@functools.lru_cache(maxsize=1)
def build_backbone(model: str, depth: int, device: str) -> nn.Module:
    """A DINOv2 of patch 14 with random weights. The last one is kept, for copies."""
    dim, _, heads = MODELS[model]
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=dim, num_hidden_layers=depth, num_attention_heads=heads, image_size=518, patch_size=PATCH)
    with torch.device(device):
        return Dinov2Model(config)


class Subject(nn.Module):
    """A backbone as a contender leaves it after some training, with a linear head on its patch tokens.

    Args:
        contender: how the backbone is adapted.
        backbone: stays as it is.
        figure: "inference" or "training".
        precision: "fp32"; "bf16" for weights in bf16; "autocast" for weights in float32 under bf16 autocast.

    Raises:
        NotAvailable: if this version of mgfc has no such form.
    """

    def __init__(self, contender: Contender, backbone: Any, figure: str, precision: str) -> None:
        super().__init__()
        self.vit: Any = copy.deepcopy(backbone)
        device = next(backbone.parameters()).device
        try:
            contender.adapt(self.vit)
        except (ConfigError, TypeError) as error:
            raise NotAvailable(str(error)) from error
        self.vit.to(device)
        self.head = nn.Linear(backbone.config.hidden_size, NUM_CLASSES, device=device)
        self.autocast = precision == "autocast"
        self.num_parameters = sum(p.numel() for p in self.vit.parameters() if p.requires_grad)
        self._pretend_training(device)
        self.train(figure == "training")
        if figure == "inference" and contender.finish is not None:
            contender.finish(self.vit)
        if precision == "bf16":
            self.to(torch.bfloat16)
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5) if figure == "training" else None
        self.forward_fn: Callable[[Tensor], Tensor] = self._predict

    @torch.no_grad()
    def _pretend_training(self, device: torch.device) -> None:
        """Moves what starts at zero away from it, and fills running statistics: without them stages do nothing."""
        for parameter in self.vit.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)
        self.train()
        for _ in range(3):
            self._predict(torch.randn(2, 3, 12 * PATCH, 16 * PATCH, device=device))

    def _predict(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.autocast):
            logits: Tensor = self.head(self.vit(images).last_hidden_state[:, 1:])
            return logits

    def compile_forward(self) -> None:
        """Later calls run what `torch.compile` makes of the forward.

        PyTorch keeps what it compiled by code object, and guards on no hook: of two subjects that differ by hooks alone,
        the second would run the first one's. So each has a code object of its own.
        """
        function = type(self)._predict
        own = types.FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__)
        self.forward_fn = torch.compile(types.MethodType(own, self), dynamic=False)

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Within it, calls run eagerly."""
        forward, self.forward_fn = self.forward_fn, self._predict
        try:
            yield
        finally:
            self.forward_fn = forward

    @torch.no_grad()
    def infer(self, images: Tensor) -> None:
        """One forward."""
        self.forward_fn(images)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Forward, losses, backward, optimiser step; `labels` (B, h, w) on the grid of the patches."""
        assert self.optimizer is not None, "step is for the figure training"
        loss = F.cross_entropy(self.forward_fn(images).float().flatten(0, 1), labels.flatten())
        if hasattr(self.vit, "calibration"):
            loss = loss + self.vit.calibration.loss(labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def own_bytes(self) -> int:
        """Bytes of parameters, buffers and the optimiser's state."""
        tensors = [*self.parameters(), *self.buffers()]
        if self.optimizer is not None:
            tensors += [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        return sum(tensor.nbytes for tensor in tensors)
