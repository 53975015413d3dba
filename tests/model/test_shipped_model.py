"""The shipped recall model: a plain Hugging Face folder that remembers far, and forgets under a short window.

Guarantees checked without the compiler: it loads offline, is small, needs memory beyond any short window,
reads the same padded and alone, and its table of heads names the heads that carry the memory.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvcompile.evaluation import tales as data

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDER = EXAMPLES / "recall_model"


def example(name: str) -> ModuleType:
    """The example file `name` as a module; examples import each other by bare name, as when run as scripts."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


ablation = example("ablation")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def masked() -> PreTrainedModel:
    return ablation.load(FOLDER)


def whole(model: PreTrainedModel) -> torch.Tensor:
    return torch.zeros(model.config.num_hidden_layers, model.config.num_key_value_heads, dtype=torch.bool)


def test_the_folder_is_small_and_readable() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4_000_000
    assert {"config.json", "model.safetensors", "tokenizer.json", "heads.tsv"} <= {path.name for path in files}


def test_the_tokenizer_speaks_the_words_of_the_data(tokenizer: PreTrainedTokenizerBase) -> None:
    text = data.prompts(1, 100)[0].text
    ids = tokenizer(text)["input_ids"]
    assert ids == data.encode([data.BOS, *text.split()])
    assert len(ids) == 100
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer("zebra")["input_ids"][-1] == tokenizer.unk_token_id


@pytest.mark.parametrize(("length", "count"), [(512, 20), (640, 64)])
def test_untouched_it_recalls_and_with_a_short_window_it_does_not(
    masked: PreTrainedModel, length: int, count: int
) -> None:
    asked = data.prompts(count, length, seed=7)
    assert min(prompt.distance for prompt in asked) > length // 2
    _, right = ablation.recall(masked, asked, whole(masked))
    assert right >= 0.95
    _, right = ablation.recall(masked, asked, ~whole(masked), local_width=68)  # sink 4, window 64
    assert right <= 0.35


def test_generate_answers_a_padded_batch_of_different_lengths(tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True).eval()
    asked = [data.prompts(1, length, seed=9)[0] for length in (150, 300, 600)]
    inputs = tokenizer([prompt.text for prompt in asked], return_tensors="pt", padding=True)
    out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    answers = [tokenizer.decode(row[-2:]).split()[0] for row in out]
    assert answers == [prompt.answer for prompt in asked]


def test_the_table_names_the_heads_that_carry_the_memory(masked: PreTrainedModel) -> None:
    rows = [[float(x) for x in line.split("\t")] for line in (FOLDER / "heads.tsv").read_text().splitlines()]
    scores = torch.tensor(rows)
    assert scores.shape == whole(masked).shape
    assert scores.min() >= 0 and scores.max() == 1
    asked = data.prompts(20, 640, seed=8)
    keep = torch.zeros(scores.numel(), dtype=torch.bool)
    keep[scores.flatten().argsort(descending=True, stable=True)[: scores.numel() * 3 // 10]] = True
    _, right = ablation.recall(masked, asked, ~keep.view_as(scores))
    assert right >= 0.9
    _, right = ablation.recall(masked, asked, keep.view_as(scores))
    assert right <= 0.5


def test_prompts_are_the_same_for_the_same_seed_and_hold_one_fact_each() -> None:
    assert data.prompts(3, 200, seed=1) == data.prompts(3, 200, seed=1)
    assert data.prompts(3, 200, seed=1) != data.prompts(3, 200, seed=2)
    for prompt in data.prompts(20, 200, seed=3):
        words = prompt.text.split()
        place = words.index(prompt.name)
        assert words[place - 2 : place] == [prompt.answer, "suits"]
        assert words.count(prompt.name) == 2 and words[-1] == prompt.name
        assert len(words) - 1 - place == prompt.distance
