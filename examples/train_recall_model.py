"""Trains the shipped recall model from nothing, on one CPU thread, and writes it as a Hugging Face folder.

The texts grow, 14 -> 32 -> 64 -> 128 -> 256 -> 512 -> 640 tokens, and a stage ends when the answers are right, not
after a number of steps: looking far back is learned all at once after hundreds of steps, and only where the text
is short. A seed that has not learned it by `GIVE_UP` steps is dropped for the next one.

    python examples/train_recall_model.py --out examples/recall_model
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvcompile.evaluation import tales as data

LEARNING_RATE = 2e-3
WARM_UP = 100  # steps
GIVE_UP = 1500  # steps of the first stage, in which recall must appear
LOOK_EVERY = 50  # steps between two looks at the accuracy


@dataclass(frozen=True, slots=True)
class Stage:
    """One text length of the curriculum.

    `texts`: texts in a step; `facts`, `mentions`: fewest and most of a text; `goal`: share of right answers that
    ends the stage, not before `least` nor after `most` steps; `rate`: factor on the learning rate.
    """

    length: int
    texts: int
    facts: tuple[int, int]
    goal: float
    least: int
    most: int
    rate: float = 1.0
    mentions: tuple[int, int] = (0, 0)


CURRICULUM = (
    Stage(14, 72, (2, 2), 0.95, 0, GIVE_UP),
    Stage(32, 32, (2, 4), 0.95, 50, GIVE_UP),
    Stage(64, 24, (2, 8), 0.96, 50, GIVE_UP),
    Stage(128, 16, (4, 16), 0.97, 100, 600),
    Stage(256, 8, (4, 24), 0.98, 100, 400, 0.7),
    Stage(512, 4, (4, 32), 0.99, 50, 300, 0.4),
    Stage(640, 4, (4, 40), 0.995, 50, 300, 0.15),
)


def new_model(seed: int, words: tuple[str, ...] = data.VOCABULARY) -> LlamaForCausalLM:
    """A small Llama with random weights: 3 layers, 8 query heads over 4 KV heads of 32 channels."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        initializer_range=0.05,
        max_position_embeddings=1024,
        # Slow rotations: most channels hardly turn within 640 tokens, so a name matches itself at any distance.
        rope_parameters={"rope_type": "default", "rope_theta": 10_000_000.0},
        tie_word_embeddings=False,
        pad_token_id=data.INDEX[data.PAD],
        bos_token_id=data.INDEX[data.BOS],
        eos_token_id=None,  # the text has no end: generation stops at its token limit
    )
    model = LlamaForCausalLM(config)
    # Large against what the first layer adds: else a name is drowned before the next layer could find it again.
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    return model


def new_tokenizer(words: tuple[str, ...] = data.VOCABULARY) -> PreTrainedTokenizerFast:
    """Text is split at spaces; each word is one token; the start token is put in front; padding goes left."""
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=data.UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{data.BOS} $A", special_tokens=[(data.BOS, data.INDEX[data.BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=data.BOS,
        unk_token=data.UNKNOWN,
        pad_token=data.PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        model_input_names=["input_ids", "attention_mask"],
    )


def batch(rng: random.Random, stage: Stage) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights [texts, length] of one step; all texts of a batch have as many facts and mentions."""
    n_facts = rng.randint(*stage.facts)
    mentions = rng.randint(*stage.mentions) if stage.mentions[1] else 0
    texts = [data.training_text(rng, stage.length, n_facts, mentions) for _ in range(stage.texts)]
    ids = torch.tensor([data.encode(words) for words, _ in texts])
    return ids, torch.tensor([weights for _, weights in texts])


def step(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The weighted loss, and the share of answers (the words of weight `data.ANSWER`) that came out right."""
    logits = model(ids, use_cache=False).logits[:, :-1]
    target, weight = ids[:, 1:], weights[:, 1:]
    loss = functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
    answers = weight == data.ANSWER
    right = (logits.argmax(-1) == target)[answers].float().mean().item()
    return (loss * weight).sum() / weight.sum(), right


def train(
    seed: int,
    show: Callable[[Stage, int, float, float], None],
    curriculum: tuple[Stage, ...] = CURRICULUM,
    words: tuple[str, ...] = data.VOCABULARY,
) -> LlamaForCausalLM | None:
    """A trained model, or None if this seed did not learn to recall. `show(stage, step, loss, accuracy)` is told."""
    model, rng = new_model(seed, words), random.Random(f"train {seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    done = 0
    for stage in curriculum:
        recent: list[float] = []
        reached = False
        for i in range(1, stage.most + 1):
            done += 1
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * stage.rate * min(1.0, done / WARM_UP)
            loss, right = step(model, *batch(rng, stage))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            recent = [*recent[-(LOOK_EVERY - 1) :], right]
            if i % LOOK_EVERY == 0:
                accuracy = sum(recent) / len(recent)
                show(stage, i, loss.item(), accuracy)
                reached = accuracy >= stage.goal
                if reached and i >= stage.least:
                    break
        if stage is curriculum[0] and not reached:
            return None
    return model.eval()


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, length: int, count: int = 64, seed: int = 1) -> float:
    """Share of right first words over `count` prompts of `length` tokens that training never saw."""
    asked = data.prompts(count, length, seed=seed)
    right = 0
    for prompt in asked:
        ids = torch.tensor([data.encode([data.BOS, *prompt.text.split()])])
        right += int(model(ids, use_cache=False, logits_to_keep=1).logits[0, -1].argmax() == data.INDEX[prompt.answer])
    return right / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "recall_model")
    parser.add_argument("--seed", type=int, default=0, help="first seed to try")
    parser.add_argument("--tries", type=int, default=4, help="seeds to try before giving up")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are small: more threads only wait for each other
    start = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    model = None
    for seed in range(options.seed, options.seed + options.tries):
        with Progress(*columns) as progress:
            bars = {s: progress.add_task(f"{s.length} tokens", total=s.most) for s in CURRICULUM}

            def show(stage: Stage, i: int, loss: float, right: float) -> None:
                progress.update(bars[stage], completed=i)  # noqa: B023
                seconds = time.perf_counter() - start
                progress.console.print(
                    f"{seconds:6.0f} s  length {stage.length:4d}  step {i:5d}  loss {loss:.3f}  right {right:.3f}"
                )

            model = train(seed, show)
        if model is not None:
            break
        print(f"seed {seed} did not learn to recall in {GIVE_UP} steps; next seed")
    if model is None:
        raise SystemExit(f"none of {options.tries} seeds learned to recall; try another --seed")
    model.save_pretrained(options.out)
    new_tokenizer().save_pretrained(options.out)
    print(f"trained in {time.perf_counter() - start:.0f} s with seed {seed}, written to {options.out}")
    for length in (128, 256, 512, 640):
        print(f"right answers on 64 new prompts of {length} tokens: {accuracy(model, length):.3f}")


if __name__ == "__main__":
    main()
