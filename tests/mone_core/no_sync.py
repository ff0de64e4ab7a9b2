"""A watch over operations that make the host wait for the device, for any code that runs in it.

A host that reads a value, or a shape that depends on values, stops a GPU's queue and breaks
graphs. Run on the CPU, where both look harmless, they are told from the operations dispatched.
`Tensor.tolist()` on a CPU tensor dispatches nothing: run on the meta device as well, which has
no values to read.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# By name: every overload of each, `out=` forms among them.
READS = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::is_nonzero",
    "aten::equal",
    "aten::allclose",
}
SHAPES_FROM_VALUES = {
    "aten::nonzero",
    "aten::nonzero_numpy",
    "aten::argwhere",
    "aten::masked_select",
    "aten::unique_dim",
    "aten::_unique",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim_consecutive",
    "aten::bincount",
}
BY_INDEX = {
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_unsafe_index",
    "aten::_index_put_impl_",
}
MASKS = (torch.bool, torch.uint8)


class NoSync(TorchDispatchMode):
    """Fails at the first operation that would make the host wait, forward and backward."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition(".")[0]
        assert name not in READS, f"{name} reads a value on the host"
        assert name not in SHAPES_FROM_VALUES, f"{name} has a shape that depends on values"
        if name in BY_INDEX:
            indices = [index for index in args[1] if index is not None]
            masked = [index for index in indices if index.dtype in MASKS]
            assert not masked, f"{name} by a mask has a shape that depends on values"
        if name == "aten::repeat_interleave":
            assert (kwargs or {}).get("output_size") is not None, f"{name} without output_size"
        return func(*args, **(kwargs or {}))
