"""Quick start: a Hugging Face model generates under a cache policy; the report says what was kept."""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import kvcompile
from kvcompile.evaluation.tales import prompts

FOLDER = Path(__file__).parent / "recall_model"


def main() -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
    asked = prompts(1)[0]  # 640 words; the fact stands in the first 40 %
    kvcompile.optimize(model, "snapkv", budget=128, observe=16)
    out = model.generate(**tokenizer(asked.text, return_tensors="pt"), max_new_tokens=8, do_sample=False)
    print(f"... {asked.text[-60:]} -> {tokenizer.decode(out[0, -8:])}   (right: {asked.answer})")
    print(kvcompile.report(model))


if __name__ == "__main__":
    main()
