"""How much memory tensors take at most while something is computed, also of what is computed on the meta device.

There nothing has a place and nothing is multiplied, so what the largest models would hold is counted in a second.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Peak(TorchDispatchMode):
    """A context that adds up the bytes of all tensors made in it, as long as they live: `now`, and at most `most`.

    What an operation holds in itself, such as the workspace of a convolution, is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most = 0, 0
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {id(x.untyped_storage()) for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for made in tree_iter(out):
            if isinstance(made, torch.Tensor):
                storage = made.untyped_storage()
                if id(storage) not in given and id(storage) not in self._seen:
                    self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def gone(_: object) -> None:
            del self._seen[key]
            self.now -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)
