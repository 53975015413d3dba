"""Launch constants of kernels that nothing was tuned for.

Takes a model's facts, gives the facts that `tuning_space.KNOBS` may change. Guarantees: compiled by Triton 3.7.1 for
sm_80, sm_89, sm_90 and sm_100, no kernel spills at head sizes 64, 96, 128 and 256, but what `spans` and `blocks` say.
"""

from __future__ import annotations

from kvcompile.kernels.plan import ModelFacts
from kvcompile.kernels.spec import power_of_two

Facts = dict[str, int | str]
EVICT: Facts = {"warps": 4}
SELECT: Facts = {"warps": 8}
PACK: Facts = {"warps": 4}
KEYS: Facts = {"block_n": 64, "warps": 4}


def _row(facts: ModelFacts) -> int:
    """Bytes of one key in a tile, whose side is a power of two."""
    return power_of_two(facts.head_dim) * facts.entry_bytes // (2 * facts.head_dim)


def decode(facts: ModelFacts) -> Facts:
    """K and V of two tiles in flight within about 64 KiB of shared memory.

    In float32 there is no matrix instruction: operands stand in registers, so tiles are small and threads many.
    """
    rest: Facts = {"stages": 3, "min_chunk": 256}
    if facts.dtype == "float32":
        return {"block_n": 16, "warps": 4 if facts.head_dim <= 128 else 8} | rest
    most = 128 if facts.head_dim <= 32 else 64  # 128 of 64 channels spill on sm_100
    return {"block_n": max(16, min(most, 16384 // _row(facts))), "warps": 4} | rest


def spans(facts: ModelFacts) -> Facts:
    """Decode that finds its entries through a list holds their addresses, bits and positions beside all the rest. At
    256 channels some regions spill on sm_80 and sm_89, up to 80 bytes: twice the warps would not, but on Hopper one
    program would be left of three."""
    plain = decode(facts)
    return plain | {"block_n": max(16, int(plain["block_n"]) // 2)}


def prefill(facts: ModelFacts) -> Facts:
    """The largest tiles, lines by entries, that do not spill on any of them. In float32 a thread of 256 channels keeps
    what it has read of queries beside two tiles in flight, and spills: there is one tile, and twice the threads."""
    side = power_of_two(facts.head_dim)
    if facts.dtype == "float32":
        m, n, warps, stages = (64, 16, 8, 2) if side <= 64 else (16, 16, 8, 2) if side <= 128 else (32, 16, 16, 1)
    else:
        m, n, warps, stages = (128, 64, 8, 3) if side <= 64 else (128, 32, 8, 3) if side <= 128 else (64, 32, 8, 2)
    return {"block_m": m, "block_n": n, "warps": warps, "stages": stages}


def blocks(facts: ModelFacts) -> Facts:
    """Prefill by lists also holds what each query has chosen: at 64 channels half as many entries spill nothing, at 128
    a few addresses are put away outside the loops on sm_80, in float32 on others, too (up to 68 bytes)."""
    plain = prefill(facts)
    return plain | {"block_n": min(32, int(plain["block_n"]))}


def columns(facts: ModelFacts, window: int) -> Facts:
    """A tile of logits is [block_n, block_q]; window: 0 where all queries of a prefill are read.

    Rows of 256 bytes and more take twice the threads, as a tile of keys stays in registers; float32 as above.
    """
    wide = facts.dtype == "float32"
    most = 32 if wide or _row(facts) > 256 else 64
    block_q = min(most, max(16, power_of_two(window))) if window else most
    return {"block_n": 32 if wide else 64, "block_q": block_q, "warps": 8 if wide or _row(facts) >= 256 else 4}


def marks(facts: ModelFacts) -> Facts:
    """A tile of keys [block_n, head_dim] stands in registers, in float32."""
    return {"block_n": max(16, min(64, 8192 // power_of_two(facts.head_dim))), "warps": 4}


def units(facts: ModelFacts) -> Facts:
    """A tile of products [units, query heads, channels] stands in registers, in float32."""
    of_unit = power_of_two(facts.group) * power_of_two(facts.head_dim)
    return {"block_n": max(1, min(64, 8192 // of_unit)), "warps": 8}


def chosen(facts: ModelFacts) -> Facts:
    """A tile of scores is [block_m queries and query heads, block_n units]. Several programs share a multiprocessor
    (`signatures.programs`). In float32 a thread keeps what it has read of queries for all products of a formula, so
    more of them would spill.
    """
    if facts.dtype == "float32":
        return {"block_m": 16, "block_n": 16, "warps": 8}
    return {"block_m": 64, "block_n": 32 if power_of_two(facts.head_dim) <= 128 else 16, "warps": 4}
