"""Is this exactly what PyTorch ships? What is known of a class holds where its code is kept."""

from __future__ import annotations

from torch import nn


def runs_forward_of(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Say whether calling a module computes what one of these classes computes.

    A subclass counts as long as neither it nor the module itself replaces a method that the class
    has of its own, such as ``forward`` or ``_conv_forward``. Hooks are not looked at.

    Example:
        >>> class Doubled(nn.Linear):
        ...     def forward(self, x):
        ...         return 2 * super().forward(x)
        >>> runs_forward_of(nn.Linear(1, 1), nn.Linear), runs_forward_of(Doubled(1, 1), nn.Linear)
        (True, False)
    """
    mine = type(module)
    for shipped in classes:
        if isinstance(module, shipped):
            names = [
                name for name in ("__call__", "forward", "_conv_forward") if hasattr(shipped, name)
            ]
            kept = all(getattr(mine, name) is getattr(shipped, name) for name in names)
            return kept and not any(name in vars(module) for name in names)
    return False
