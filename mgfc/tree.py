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
        blocks: names of its blocks. What is inside of one may be replaced, since its hooks follow.
        owners: whose methods the hooks are.
    """

    def __init__(self, root: nn.Module, blocks: Collection[str], owners: Collection[object]) -> None:
        self._owners = list(owners)
        inside = tuple(f"{name}." for name in blocks)
        self._modules = {n: m for n, m in root.named_modules() if any(self._own(m)) and not n.startswith(inside)}
        self._problem: str | None = None
        self.relink(root)

    def has_moved(self) -> bool:
        """Whether one of them is no longer where it was, by a quick look."""
        return any(parent._modules.get(key) is not child for parent, key, child in self._links)

    def relink(self, root: nn.Module) -> None:
        """Notes where all of them are now, and whether another module took the place of one."""
        present, names = {id(module) for module in root.modules()}, dict(root.named_modules())
        hooked = [name for name, module in names.items() if any(self._own(module))]
        links = {(id(parent), key): (parent, key, child) for name in hooked for parent, key, child in _way(root, name)}
        self._links = list(links.values())
        self._problem = None
        for name, module in self._modules.items():
            now = names.get(name)
            if id(module) not in present and now is not None and not any(self._own(now)):
                self._problem = (
                    f"{type(root).__name__}: expected {name} as it was wrapped, found another {type(now).__name__} in its "
                    "place, which calibrators do not reach. Save the adapter, call unwrap_backbone, and wrap the model as it "
                    "is now with what you saved."
                )
                return

    def require_present(self) -> None:
        """Raises `CalibrationError`, naming a module that was replaced by another without hooks."""
        if self._problem is not None:
            raise CalibrationError(self._problem)

    def remove(self, root: nn.Module) -> None:
        """Removes the hooks, also those that a module took over from the one that it replaced."""
        for module in {*root.modules(), *self._modules.values()}:
            for hooks, key in list(self._own(module)):
                remove_hook(module, hooks, key)

    def _own(self, module: nn.Module) -> Iterator[tuple[dict[int, Any], int]]:
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in hooks.items():
                if any(owner_of(hook) is own for own in self._owners):
                    yield hooks, key


def owner_of(hook: Any) -> object:
    """Whose method a hook is; None for a function."""
    return getattr(getattr(hook, "func", hook), "__self__", None)


def remove_hook(module: nn.Module, hooks: dict[int, Any], key: int) -> None:
    """Removes one of a module's hooks, with what PyTorch notes of it."""
    del hooks[key]
    options: Any
    for options in (module._forward_hooks_with_kwargs, module._forward_pre_hooks_with_kwargs):
        options.pop(key, None)


def _way(root: nn.Module, name: str) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Each step from a backbone to a module in it: the parent, the child's name, the child."""
    parent = root
    for key in name.split(".") if name else []:
        child = parent.get_submodule(key)
        yield parent, key, child
        parent = child
