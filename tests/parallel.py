"""A small model whose heads two or more gloo processes hold, each on the CPU, and what optimised runs of it left.

`together` starts processes that run one function of (model, rank); results come back by rank.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM, PreTrainedModel

import kvcompile
from kvcompile.kernels import ranks
from tests.driving import Positions, kept, padded
from tests.models import random_model, tokens

SHAPE = {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4}
LENGTHS = (37, 24)  # of the prompts of a batch
NEW = 33  # tokens: a prefill and 32 steps


def save_model(folder: Path, **changes: object) -> None:
    random_model("llama64", **{**SHAPE, **changes}).save_pretrained(folder)


def one(folder: Path) -> PreTrainedModel:
    """The whole model in this process."""
    return _quiet(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def divided(folder: Path) -> PreTrainedModel:
    """This process's part, as transformers divides it. Its loader needs accelerate; without that, the same plan is
    applied to a model that is loaded whole."""
    if importlib.util.find_spec("accelerate"):
        from transformers.distributed import DistributedConfig

        config = DistributedConfig(tp_plan="auto")
        return _quiet(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=config))
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    model = one(folder)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model._tp_size = dist.get_world_size()
    if len(inspect.signature(apply_tensor_parallelism).parameters) == 2:
        return apply_tensor_parallelism(model, mesh)
    styles = model.tp_plan
    plan = {}
    for name, module in model.named_modules():
        key = re.sub(r"\.\d+\.", ".*.", name)
        style = styles.get(key)
        if style is not None:
            own = [weight for weight, _ in module.named_parameters(recurse=False)]
            plan |= {f"{name}.{weight}": styles.get(f"{key}.{weight}", style) for weight in own} | {name: style}
    return apply_tensor_parallelism(model, mesh, plan)


def _quiet(model: PreTrainedModel) -> PreTrainedModel:
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.eval()


def generated(model: PreTrainedModel, policy: str, options: dict[str, Any]) -> tuple[list[list[int]], list[Positions]]:
    """As `run`, of a model that is optimised for it alone."""
    with kvcompile.use(model, policy, **options):
        return run(model)


def run(model: PreTrainedModel) -> tuple[list[list[int]], list[Positions]]:
    """New tokens of a padded batch, and the positions kept at the end, of each sequence."""
    new, found, _ = answers(model)
    return new, found


def answers(
    model: PreTrainedModel, lengths: Sequence[int] = LENGTHS
) -> tuple[list[list[int]], list[Positions], torch.Tensor]:
    """As `run`, of prompts of these lengths, and the logits of each forward, [NEW, batch, vocabulary]."""
    ids, mask = padded([tokens(n, seed=n) for n in lengths], "left")
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    found = [kept(out.past_key_values, model.config.num_hidden_layers, row) for row in range(len(ids))]
    return out.sequences[:, ids.shape[1] :].tolist(), found, torch.stack(out.logits)


def exchanges(model: PreTrainedModel) -> int:
    """How often this process has exchanged something with those that hold an optimised model's other heads."""
    return ranks._known[kvcompile.inspect(model).plan.shard.key].exchanges


def together(work: Callable[..., Any], world: int, *args: Any, folder: Path) -> list[Any]:
    """What `work(rank, *args)` gives in each of `world` processes, as JSON; an error is its text. Ends after 300 s."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.start_processes(
        _process, (world, port, str(folder), work, args), nprocs=world, join=False, start_method="spawn"
    )
    until = time.monotonic() + 300
    while not context.join(max(1.0, until - time.monotonic())) and time.monotonic() < until:
        pass
    alive = [p for p in context.processes if p.is_alive()]
    for process in alive:
        process.kill()
    assert not alive, f"{len(alive)} of {world} processes wait for each other"
    found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]
    failed = [text for text in found if isinstance(text, str) and text.startswith("Traceback")]
    assert not failed, "\n".join(failed)
    return found


def _process(rank: int, world: int, port: int, folder: str, work: Callable[..., Any], args: Sequence[Any]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        found = work(rank, *args)
    except Exception:
        found = traceback.format_exc()
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
