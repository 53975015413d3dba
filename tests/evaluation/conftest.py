"""Tokenizers of three kinds for the tests of evaluation: the shipped words, words with topics, bytes joined by BPE."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kvcompile.evaluation import tales
from kvcompile.evaluation.suites.library_text import library_files

SHIPPED = Path(__file__).parents[2] / "examples" / "recall_model"


@pytest.fixture(scope="session")
def shipped_words() -> PreTrainedTokenizerBase:
    """The tokenizer of the shipped model: the words of tales without topics, a start token before them."""
    return AutoTokenizer.from_pretrained(SHIPPED, local_files_only=True)


@pytest.fixture(scope="session")
def topic_words() -> PreTrainedTokenizerBase:
    """The words of tales with topics, a start token before them."""
    words = Tokenizer(models.WordLevel(tales.INDEX, unk_token=tales.UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(f"{tales.BOS} $A", special_tokens=[(tales.BOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=tales.BOS, unk_token=tales.UNKNOWN, pad_token=tales.PAD
    )


@pytest.fixture(scope="session")
def sub_words() -> PreTrainedTokenizerBase:
    """A byte-level BPE of 1000 tokens, trained on a little of the standard library; no start token, nothing unknown."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=alphabet, special_tokens=["</s>"], show_progress=False
    )
    pieces.train_from_iterator([path.read_text(encoding="utf-8") for path in library_files()[:4]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="</s>")
