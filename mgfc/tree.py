"""The modules of a backbone that carry this library's hooks, and what became of them since."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from mgfc.errors import CalibrationError


class HookedModules:
    """The modules that carry hooks, and the ways to them from a backbone.

    Args:
        root: the backbone.
        owners: whose methods the hooks are.
    """

    def __init__(self, root: nn.Module, owners: Collection[object]) -> None:
        self._owners = list(owners)
        self._modules = {name: m for name, m in root.named_modules() if any(self._own(m))}
        links = {(id(parent), key): (parent, key, child) for name in self._modules for parent, key, child in _way(root, name)}
        self._links = list(links.values())

    def check(self, root: nn.Module) -> None:
        """Sees whether all of them are where they were; quick where nothing changed.

        A module that another one now wraps, or that took its hooks along, works as before.

        Raises:
            CalibrationError: naming one that was replaced by another without hooks.
        """
        if all(parent._modules.get(key) is child for parent, key, child in self._links):
            return
        present = {id(module) for module in root.modules()}
        names = dict(root.named_modules())
        for name, module in self._modules.items():
            now = names.get(name)
            if id(module) not in present and now is not None and not any(self._own(now)):
                raise CalibrationError(
                    f"{type(root).__name__}: expected {name} as it was wrapped, found another {type(now).__name__} in its "
                    "place, which calibrators do not reach. Save the adapter, call unwrap_backbone, and wrap the model as it "
                    "is now with what you saved."
                )
        self.__init__(root, self._owners)  # type: ignore[misc]

    def remove(self, root: nn.Module) -> None:
        """Removes the hooks, also those that a module took over from the one that it replaced."""
        for module in {*root.modules(), *self._modules.values()}:
            for hooks, key in list(self._own(module)):
                del hooks[key]
                for options in (module._forward_hooks_with_kwargs, module._forward_pre_hooks_with_kwargs):
                    options.pop(key, None)

    def _own(self, module: nn.Module) -> Iterator[tuple[dict[int, Any], int]]:
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in hooks.items():
                owner = getattr(getattr(hook, "func", hook), "__self__", None)
                if any(owner is own for own in self._owners):
                    yield hooks, key


def _way(root: nn.Module, name: str) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Each step from a backbone to a module in it: the parent, the child's name, the child."""
    parent = root
    for key in name.split(".") if name else []:
        child = parent.get_submodule(key)
        yield parent, key, child
        parent = child
