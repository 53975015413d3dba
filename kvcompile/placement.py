"""Where a model's parts are: heads that several processes hold, layers on several devices.

Takes a model as transformers has placed it; gives the processes that share its heads (`tp_plan`), and the device of
each layer's attention (`device_map`). Guarantees: what cannot be carried out is refused before anything is changed, by
every process if by one; processes that were given different policies say so instead of waiting for each other.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.kernels.ranks import Members
from kvcompile.passes.sites import AttentionSite

Scores = list[list[float]]  # [layer][KV head]

_KEYS = ("k_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv")  # projections that hold an attention's keys
_WHOLE = ("gather_output", "_rep")  # endings of plans under which every process gets all of a projection's output
_TOLD = 2048  # bytes of what processes tell each other


class Processes:
    """The processes of one tensor parallel group, as `kernels.ranks.Ranks`."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.all = dist.get_process_group_ranks(group)
        self.rank, self.world = dist.get_rank(group), len(self.all)
        self.exchanges = 0

    @property
    def key(self) -> str:
        """A name of these processes."""
        return "processes " + " ".join(map(str, self.all))

    def exchange(self, tensor: Tensor, members: Members) -> list[Tensor]:
        """As `Ranks.exchange`. KvCompileError where another process is gone, or fails to answer in the group's time."""
        found = [tensor if member == self.rank else torch.empty_like(tensor) for member in members]
        try:
            if len(members) == self.world:
                found[self.rank] = torch.empty_like(tensor)
                dist.all_gather(found, tensor, group=self.group)
            else:  # one by one: a group of some processes could be made only by all of them, at one point
                self._pass_round(tensor, found, members)
        except RuntimeError as error:
            raise KvCompileError(
                f"process {self.rank} of {self.world} could not reach those that hold the model's other heads: "
                f"{str(error).splitlines()[0]}. Some process has ended or failed: see its own error, then start all "
                "again"
            ) from error
        self.exchanges += 1
        return found

    def _pass_round(self, tensor: Tensor, found: list[Tensor], members: Members) -> None:
        """Send a tensor to the other members, and receive theirs in place."""
        calls = []
        for member, target in zip(members, found, strict=True):
            if member != self.rank:
                calls += [
                    dist.P2POp(dist.isend, tensor, self.all[member], self.group),
                    dist.P2POp(dist.irecv, target, self.all[member], self.group),
                ]
        for work in dist.batch_isend_irecv(calls):
            work.wait()

    def tell(self, text: str) -> list[str]:
        """What each process says here, by rank."""
        said = text.encode()[:_TOLD].ljust(_TOLD, b"\0")
        heard = self.exchange(
            torch.frombuffer(bytearray(said), dtype=torch.uint8).to(self.device), tuple(range(self.world))
        )
        return [bytes(part.tolist()).rstrip(b"\0").decode(errors="replace") for part in heard]


def processes_of(model: nn.Module, attention: nn.Module) -> Processes | None:
    """The processes over which the heads of a model are divided; None where each that there is has all of them.

    attention: one of the model's; transformers divides all layers alike.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    from torch.distributed.tensor import DTensor, Shard

    found = [(name, getattr(attention, name, None)) for name in _KEYS]
    weights = [(name, getattr(module, "weight", None)) for name, module in found if isinstance(module, nn.Module)]
    for name, weight in weights:
        if not isinstance(weight, DTensor) or _style(model, name).endswith(_WHOLE):
            continue
        dim = _parallel_dim(model, weight.device_mesh)
        if dim is None or not isinstance(weight.placements[dim], Shard) or weight.device_mesh.size(dim) == 1:
            continue
        return Processes(weight.device_mesh.get_group(dim), weight.to_local().device)
    return None


def _style(model: Any, name: str) -> str:
    """How transformers' plan divides a projection of the attention; empty where it says nothing."""
    plan = getattr(model, "tp_plan", None) or {}
    return next((str(style) for key, style in plan.items() if str(key).rsplit(".", 1)[-1] == name), "")


def _parallel_dim(model: Any, mesh: Any) -> int | None:
    """The dimension of a device mesh along which layers are divided; None where weights are only kept in parts."""
    names = mesh.mesh_dim_names
    if names is not None:
        return names.index("tp") if "tp" in names else None
    return 0 if mesh.ndim == 1 and (getattr(model, "_tp_size", None) or 1) > 1 else None


def home_of(sites: Sequence[AttentionSite]) -> torch.device:
    """Where a cache lies: on the device of the first layer's attention. Layers on other devices send queries, keys
    and values there.

    KvCompileError for a layer without weights: on `meta`, with no hook of accelerate's that would bring them in.
    """
    devices = [attends_on(site.attention) for site in sites]
    for site, device in zip(sites, devices, strict=True):
        if device is None:
            raise KvCompileError(
                f"{site.name} has its weights on meta, and nothing brings them in: load the model's weights, or let "
                "accelerate offload them (device_map with `cpu` or `disk`)"
            )
        if isinstance(sinks := getattr(site.attention, "sinks", None), Tensor) and sinks.is_meta:
            raise KvCompileError(
                f"{site.name} has its sinks offloaded, and a cache has to hold them: keep this layer on a device"
            )
    assert devices[0] is not None
    return devices[0]


def attends_on(module: nn.Module) -> torch.device | None:
    """The device on which a module runs: that of its weights, of offloaded ones what accelerate's hook brings them to;
    None where there is neither."""
    weights = list(module.parameters())
    here = next((p.device for p in weights if not p.is_meta), None)
    if here is not None:
        return here
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            device = getattr(one, "execution_device", None)
            if device is not None and getattr(one, "offload", False):
                return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return None


def spoken(plan: PolicyPlan, backend: str, inner: str) -> list[str]:
    """What processes must agree on before they decide anything together, a line each; parts may differ in bytes."""
    bare = replace(plan, digest="", facts=replace(plan.facts, weight_bytes=0))
    digest = hashlib.sha256(repr(bare).encode()).hexdigest()[:16]
    return [f"policy {plan.name}", f"backend {backend}, compile {inner}", f"a plan of {plan.name} with digest {digest}"]


def of_all_processes(processes: Processes | None, probes: dict[str, Scores]) -> dict[str, Scores]:
    """Scores of this process's KV heads as scores of all heads, [layer][KV head] each."""
    if processes is None:
        return probes
    everyone = tuple(range(processes.world))
    found = {}
    for name, scores in probes.items():
        own = torch.tensor(scores, dtype=torch.float64, device=processes.device)
        found[name] = torch.cat(processes.exchange(own, everyone), 1).tolist()
    return found


def heads_here(plan: PolicyPlan) -> str:
    """For a report: which heads its figures are of; empty where all are here."""
    if plan.shard is None:
        return ""
    last = plan.first_head + plan.facts.kv_heads - 1
    heads = f"KV heads {plan.first_head} to {last} of {plan.whole.facts.kv_heads}"
    return f"; figures are of {heads}, which process {plan.shard.rank} of {plan.shard.world} holds"


def local_bytes(model: nn.Module) -> int:
    """Bytes of the parameters that this process holds."""
    parts = (p.to_local() if hasattr(p, "to_local") else p for p in model.parameters())
    return sum(p.numel() * p.element_size() for p in parts)


def local(tensor: Tensor) -> Tensor:
    """A parameter's part that this process holds."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@contextlib.contextmanager
def agreed(processes: Processes | None) -> Iterator[list[str]]:
    """A block that all processes pass, or none: the lines that it is given must be the same in each.

    KvCompileError in every process where one has failed, or has said something else; in the one that failed its own.
    """
    said: list[str] = []
    if processes is None:
        yield said
        return
    try:
        yield said
    except Exception as error:
        processes.tell(f"!{str(error) or type(error).__name__}")
        raise
    heard = processes.tell("\n".join(said))
    for rank, text in enumerate(heard):
        if text.startswith("!"):
            raise KvCompileError(f"process {rank} of {processes.world} could not optimise its heads: {text[1:]}")
    other = next((rank for rank, text in enumerate(heard) if text != heard[0]), None)
    if other is None:
        return
    pairs = zip(heard[0].split("\n"), heard[other].split("\n"), strict=False)
    here, there = next(((a, b) for a, b in pairs if a != b), (heard[0], heard[other]))
    raise KvCompileError(
        f"the processes of one model were told different things: process 0 has {here}, process {other} has {there}. "
        "Call optimize with the same policy, parameters, tables and backend in each of them"
    )
