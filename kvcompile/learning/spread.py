"""One training on several processes, as the standard launcher (torchrun) starts them.

Takes the launcher's environment and a model; gives a group that sums and shares, and a copy of the model whose decoder
layers are sharded over it (FSDP2). Guarantees: with one process nothing of torch.distributed is touched; the model
itself is left alone; a group that is there already is used and stays.
"""

from __future__ import annotations

import atexit
import copy
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kvcompile.kernels.errors import KvCompileError


@dataclass(frozen=True)
class Group:
    """The processes of a training: this one's rank, how many there are, and the device that it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def rows(self, batch: int) -> slice:
        """This process's sequences of a batch; the same number for each, because their collectives must pair up."""
        part = batch // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def check(self, batch: int) -> None:
        if batch % self.size:
            raise KvCompileError(
                f"batch={batch} cannot be shared evenly by {self.size} processes: give a multiple of {self.size}"
            )

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Add tensors up over all processes, in place."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1).double() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def share(self, data: bytes | None) -> bytes | None:
        """What the first process has, on all."""
        if self.size == 1:
            return data
        length = torch.tensor([-1 if data is None else len(data)], device=self.device)
        dist.broadcast(length, 0)
        if int(length) < 0:
            return None
        held = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.first and data:
            held.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(held, 0)
        return held.cpu().numpy().tobytes()


def group_of(device: torch.device) -> Group:
    """The group that the launcher's environment describes; of one process where it says nothing.

    device: of the model. With several processes each takes the GPU of its local rank where there are GPUs. A group
    that has to be made lasts as long as the process: a second one at the same address could meet the first one's end.
    """
    size = dist.get_world_size() if _running() else int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Group(0, 1, device)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if not _running():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_end)
    return Group(dist.get_rank(), size, device)


def _end() -> None:
    if _running():
        dist.destroy_process_group()


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()


def sharded(model: nn.Module, layers: Iterable[str], group: Group) -> nn.Module:
    """A copy of a model on the group's device, its decoder layers sharded, its other weights whole. Frozen.

    layers: qualified names of the decoder layers. One layer at a time is whole on the device while this runs, so a
    model that lies on the host needs no more of the device than its share.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if "_kvcompile" in vars(model):
        raise KvCompileError("each process needs a copy of the model, and this one is optimised: restore it first")
    # The copy starts with the very parameters of the model, so that no second model is ever held.
    shared: dict[int, object] = {id(parameter): parameter for parameter in model.parameters()}
    ours = copy.deepcopy(model, shared)
    mesh = init_device_mesh(group.device.type, (group.size,))
    moved: dict[int, nn.Parameter] = {}
    names = tuple(layers)
    for name in names:
        layer = ours.get_submodule(name)
        _move(layer, group.device, {})
        fully_shard(layer, mesh=mesh)
    inside = {id(module) for name in names for module in ours.get_submodule(name).modules()}
    for module in ours.modules():
        if id(module) not in inside:
            _move_own(module, group.device, moved)
    # As one tree, so that the next layer's weights are gathered while a layer computes.
    fully_shard(ours.base_model, mesh=mesh, ignored_params=set(moved.values()))  # type: ignore[arg-type]
    return ours


def _move(module: nn.Module, device: torch.device, moved: dict[int, nn.Parameter]) -> None:
    for part in module.modules():
        _move_own(part, device, moved)


def _move_own(module: nn.Module, device: torch.device, moved: dict[int, nn.Parameter]) -> None:
    """Give a module parameters and buffers of its own on a device; what was one parameter in two places stays one."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if id(parameter) not in moved:
            moved[id(parameter)] = nn.Parameter(parameter.detach().to(device), requires_grad=False)
        module.register_parameter(name, moved[id(parameter)])
    for name, buffer in list(module.named_buffers(recurse=False)):
        persistent = name not in module._non_persistent_buffers_set
        module.register_buffer(name, buffer.to(device), persistent=persistent)
