"""Several adapters of one backbone by name, of which one is active."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from mgfc.active import Active
from mgfc.adapter import Adapter
from mgfc.config import AdapterConfig
from mgfc.errors import CalibrationError, ConfigError

_PREFIX = "adapter_"


class Adapters(nn.Module):
    """Adapters by name. The active one is used by the backbone's hooks, and its parameters alone require gradients.

    In a state dict the keys of an adapter NAME begin with `adapter_NAME`.

    Args:
        name: of the first adapter, which is active.
        adapter: the first one.

    Attributes:
        active: the active adapter, as the hooks are handed it.
        active_adapter: its name.
    """

    def __init__(self, name: str, adapter: Adapter) -> None:
        super().__init__()
        self.active = Active(adapter)
        self.active_adapter = name
        self._put(name, adapter)

    @property
    def adapters(self) -> dict[str, Adapter]:
        """All adapters by name."""
        return {name.removeprefix(_PREFIX): child for name, child in self.named_children() if isinstance(child, Adapter)}

    @property
    def adapter(self) -> Adapter:
        """The active adapter."""
        return self.active.adapter

    @property
    def config(self) -> AdapterConfig:
        """Configuration of the active adapter."""
        return self.adapter.config

    @property
    def layers(self) -> nn.ModuleDict:
        """Calibrators of the active adapter by block index."""
        return self.adapter.layers

    @property
    def num_parameters(self) -> int:
        """Trainable parameters of the active adapter."""
        return self.adapter.num_parameters

    @property
    def num_batches(self) -> int | None:
        """Training batches in the active adapter's running statistics; None if no stage has any."""
        return self.adapter.num_batches

    @property
    def enabled(self) -> bool:
        """Whether the backbone uses its calibrators."""
        return self.active.enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        if not enabled:
            self._require_unfused("disabling them")
        self.active.enabled = enabled

    def set_adapter(self, name: str) -> None:
        """Makes an adapter the active one: the backbone uses it, and its parameters alone require gradients.

        Raises:
            ConfigError: if there is none of this name.
        """
        self._check_known(name)
        self._activate(name)
        for other, adapter in self.adapters.items():
            adapter.requires_grad_(other == name)

    def delete_adapter(self, name: str) -> None:
        """Removes an adapter that is not active.

        Raises:
            ConfigError: if there is none of this name, or it is the active one.
        """
        self._check_known(name)
        if name == self.active_adapter:
            raise ConfigError(
                f"Adapter {name!r} is active. Activate another with set_adapter first, or remove all with unwrap_backbone."
            )
        delattr(self, _PREFIX + name)

    def merge_adapters(self, names: Sequence[str], weights: Sequence[float] | None = None, *, name: str = "merged") -> None:
        """Adds an adapter whose parameters and statistics are the weighted mean of others'. The active one stays active.

        A mean of weights computes something sensible for adapters trained from one start, such as one adapter tuned
        further for several domains; not for adapters trained apart.

        Args:
            names: of adapters with one configuration.
            weights: one for each, divided by their sum; None for equal ones.
            name: of the new adapter.

        Raises:
            ConfigError: if a name is unknown or the new one taken, the configurations differ, or the weights do not fit.
        """
        if not names:
            raise ConfigError("merge_adapters: expected names of adapters, found none.")
        for known in names:
            self._check_known(known)
        self._check_new(name)
        merged = _average([self.adapters[known] for known in names], [1.0] * len(names) if weights is None else weights)
        self._put(name, merged)

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Within it, another adapter is active.

        Raises:
            ConfigError: if there is none of this name.
        """
        before, flags = self.active_adapter, [(p, p.requires_grad) for p in self.parameters()]
        self.set_adapter(name)
        try:
            yield
        finally:
            if before in self.adapters:  # it may have been deleted meanwhile
                self._activate(before)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it, the backbone computes what it would without calibrators."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def _put(self, name: str, adapter: Adapter) -> None:
        adapter.train(self.training)
        self.add_module(_PREFIX + name, adapter)
        if name != self.active_adapter:
            adapter.requires_grad_(False)

    def _activate(self, name: str) -> None:
        self._require_unfused("switching adapters")
        self.active_adapter, self.active.adapter = name, self.adapters[name]

    def _require_unfused(self, what: str) -> None:
        if self.active.fused:
            raise CalibrationError(f"The low-rank adapters are fused into the weights. Call unfuse() before {what}.")

    def _check_new(self, name: str) -> None:
        if not isinstance(name, str) or not name or "." in name or name in self.adapters:
            raise ConfigError(
                f"Adapter's name: expected a new one without dots beside {', '.join(self.adapters)}, found {name!r}."
            )

    def _check_known(self, name: str) -> None:
        if name not in self.adapters:
            raise ConfigError(f"Adapter {name!r}: expected one of {', '.join(self.adapters)}. add_adapter adds others.")


@torch.no_grad()
def _average(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """A new adapter whose parameters and statistics are weighted means of the given ones'.

    Args:
        adapters: of one configuration, for one backbone.
        weights: one for each, divided by their sum.

    Raises:
        ConfigError: if the configurations differ, or the weights do not fit.
    """
    if len(weights) != len(adapters) or not weights or not sum(weights) > 0 or min(weights) < 0:
        raise ConfigError(
            f"weights: expected {len(adapters)} numbers of at least 0 whose sum is above 0, found {list(weights)}."
        )
    first = adapters[0]
    for other in adapters[1:]:
        if other.config != first.config:
            raise ConfigError(
                f"Adapters of different configurations cannot be averaged: expected {first.config}, found {other.config}."
            )
    states = [adapter.state_dict() for adapter in adapters]
    shares = [weight / sum(weights) for weight in weights]
    merged = copy.deepcopy(first)
    merged.load_state_dict(
        {
            key: sum((share * state[key] for share, state in zip(shares, states, strict=True)), start=torch.zeros_like(value))
            for key, value in states[0].items()
        }
    )
    return merged
