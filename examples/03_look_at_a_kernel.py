"""Looking at what was made: the policy's IR after a pass, the kernels, their files, and the code of one."""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import kvcompile
from kvcompile.evaluation.tales import prompts

FOLDER = Path(__file__).parent / "recall_model"


def main() -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
    kvcompile.optimize(model, "h2o", heavy=64, local=64)
    asked = prompts(1)[0]
    model.generate(**tokenizer(asked.text, return_tensors="pt"), max_new_tokens=4, do_sample=False)

    made = kvcompile.inspect(model)
    print("the policy in the compiler's own words, as lowered:")
    print(made.ir(after="lower"))
    print("its kernels, each a file that stands alone; the Triton ones check themselves (python FILE.py --check):")
    for name, kernel in made.kernels.items():
        print(f"  {name}\n    {kernel.path}")
    name, kernel = next(iter(made.kernels.items()))
    print(f"the first of them, {name}, to its first function:")
    print(kernel.source.split("\ndef ")[0])


if __name__ == "__main__":
    main()
