"""What a GPU would launch, by name and in order: torch's calls, and our kernels' launches."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Launches(TorchDispatchMode):
    """Names torch's calls while it is entered, but for views, allocations and what fills them.

    `tests/interpreter/conftest.py` adds our kernels' launches, with their arguments but tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.kernels: list[tuple[str, dict[str, Any]]] = []
        self.tiles: set[tuple[str, str | int | None]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        # The suite's fixture fills what is allocated; nobody else calls fill_.
        if not func.is_view and not any(word in name for word in ("empty", "fill_", "detach")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))

    def add(self, kernel: str, arguments: dict[str, Any], row: str | None) -> None:
        """Note the launch of a kernel of ours, and where its tile is from: a row, or its BLOCK.

        A test that launches a kernel itself has no row.
        """
        self.names.append(kernel)
        self.tiles.add((kernel, row or arguments.get("BLOCK")))
        kept = {name: value for name, value in arguments.items() if not isinstance(value, Tensor)}
        self.kernels.append((kernel, kept))
