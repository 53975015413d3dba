"""A policy of one's own: written as text, explained before it runs, run, and what a mistake in it looks like."""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import kvcompile
from kvcompile.evaluation.tales import prompts

FOLDER = Path(__file__).parent / "recall_model"

# Half of the budget for the newest tokens; the rest for those that the newest queries read most, with
# the first tokens never given up. No library policy says this; nothing but this text is needed.
POLICY = """
policy sharp(budget=128, observe=16):
    score s = maxpool(max[g] max[q in last(observe)] attn, 5)
    keep sink(4) | recent(budget / 2) | top(budget / 2 - 4) by s per head
    at prefill.end, step
"""

# The axis d is left open: `sum[d] q * k` means `(sum[d] q) * k`, and a score must end in one number per entry.
MISTAKE = """
policy wrong(budget=128):
    score s = mean[q in last(16)] sum[d] q * k
    keep recent(64) | top(budget - 64) by s per head
    at prefill.end
"""


def main() -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
    print(kvcompile.explain(POLICY, model, prompt=640, generate=7))

    asked = prompts(1)[0]
    with kvcompile.use(model, POLICY):
        out = model.generate(**tokenizer(asked.text, return_tensors="pt"), max_new_tokens=8, do_sample=False)
    print(f"... {asked.text[-60:]} -> {tokenizer.decode(out[0, -8:])}   (right: {asked.answer})")

    try:
        kvcompile.explain(MISTAKE, model, prompt=640)
    except kvcompile.PolicyError as error:
        print(error)
        print("codes:", *(finding.code for finding in error.diagnostics))


if __name__ == "__main__":
    main()
