"""Two policies in one: SnapKV on the heads that look far back, a window that folds its losers on all others.

Which heads are which is read from a table in the layout that DuoAttention and PruLong publish: a row per layer, a
number per KV head. This one was measured for the shipped model by `ablation.py`; the best 30 % of its heads are taken.
"""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

import kvcompile
from kvcompile.evaluation.tales import prompts

FOLDER = Path(__file__).parent / "recall_model"

# The head classes, n_sink and window are those of the library's prulong; its clauses for both classes are replaced.
POLICY = """
policy composed(budget=96, observe=16, n_sink=4, window=32) extends prulong:
    retrieval:
        score s = maxpool(mean[g] sum[q in last(observe)] attn, 7)
        keep recent(observe) | top(budget - observe) by s per head
        at prefill.end
    local:
        keep sink(n_sink) | recent(window) else fold mean weight count
        at prefill.end, step
"""


def main() -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
    options: dict[str, Any] = {"tables": {"retrieval": FOLDER / "heads.tsv"}}
    plan = kvcompile.explain(POLICY, model, prompt=640, generate=7, **options)
    print(plan)
    for name, facts in plan.to_dict()["classes"].items():
        print(f"{name}: {facts['heads']} KV heads")

    asked = prompts(1)[0]
    ids = tokenizer(asked.text, return_tensors="pt")
    with kvcompile.use(model, POLICY, **options):
        out = model.generate(**ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        for layer in range(model.config.num_hidden_layers):
            # A folded entry has no position, so it does not count here.
            kept = [len(positions) for positions in out.past_key_values.positions(layer)]
            print(f"layer {layer}: positions kept per KV head {kept}")
        answer = tokenizer.decode(out.sequences[0, -8:])
        print(f"... {asked.text[-60:]} -> {answer}   (right: {asked.answer})")
        print(kvcompile.report(model))


if __name__ == "__main__":
    main()
