"""The operators on a CUDA device, for tests written with tensors on the CPU."""

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import svdq.ops.registered
from svdq.ops.fakes import HOST_TABLES


def stored_bytes(tensor: Tensor) -> Tensor:
    """The whole memory that a tensor is a view of."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


class OnCuda:
    """Stands for ``torch.ops.svdq``: runs every operator on copies of its tensors on a device.

    Copies have the strides of their originals and share memory where those do; what an operator
    has written is copied back.
    """

    def __init__(self) -> None:
        self.operators = torch.ops.svdq

    def __getattr__(self, name: str):
        schema = getattr(self.operators, name).default._schema

        def stays(argument: str) -> bool:
            return argument == "page_table" and name in HOST_TABLES

        def call(*args, **kwargs):
            given = dict(zip((x.name for x in schema.arguments), args, strict=False)) | kwargs
            memory: dict[int, tuple[Tensor, Tensor]] = {}

            def upload(x: Tensor) -> Tensor:
                key = x.untyped_storage().data_ptr()
                if key not in memory:
                    memory[key] = (stored_bytes(x), stored_bytes(x).to("cuda"))
                there = torch.empty(0, dtype=x.dtype, device="cuda")
                storage = memory[key][1].untyped_storage()
                return there.set_(storage, x.storage_offset(), x.shape, x.stride())

            moved = {
                argument: upload(x) if isinstance(x, Tensor) and not stays(argument) else x
                for argument, x in given.items()
            }
            out = getattr(self.operators, name)(**moved)
            for argument in schema.arguments:
                x, alias = given.get(argument.name), argument.alias_info
                if x is not None and alias is not None and alias.is_write:
                    here, there = memory[x.untyped_storage().data_ptr()]
                    here.copy_(there)
            return tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, out)

        return call


def runs_on_cuda() -> bool:
    """Do the operators of this test run on a device?"""
    return isinstance(svdq.ops.registered.OPERATORS, OnCuda)
