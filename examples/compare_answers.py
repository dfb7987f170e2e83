"""Ask a model about an image with several reducers, side by side.

    python examples/compare_answers.py llava-hf/llava-1.5-7b-hf cats.jpg "How many cats?" \
        --reducers fastv '{"reducer": "divprune", "keep": 0.25}'

The model is a folder, a name on the Hub, or one that comes with pumer, such as `scenes-vilt`: a
classifier answers with its likeliest label, a language model writes. Reducers are whatever
`pumer.apply` takes; settings are given as JSON.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

import pumer
from pumer.lab.commands.common import open_model
from pumer.lab.tasks.inputs import Inputs, load_inputs


def answer(model: Any, inputs: Inputs, image: str, question: str) -> str:
    """What the model says, with whatever reduces it at the moment."""
    batch = inputs(question, image)
    with torch.inference_mode():
        if model.can_generate():
            written = model.generate(**batch, max_new_tokens=20, do_sample=False)
            new_tokens = written[0, batch["input_ids"].shape[1] :]
            return inputs.tokenizer.decode(new_tokens, skip_special_tokens=True).strip()
        label = model(**batch).logits[0].argmax().item()
        return model.config.id2label[label]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("image")
    parser.add_argument("question")
    parser.add_argument("--reducers", nargs="+", default=["pumer", "random"])
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    model = pumer.remove(open_model(options.model, None, options.device))
    inputs = load_inputs(options.model, model)
    print(f"unreduced: {answer(model, inputs, options.image, options.question)}")
    for name in options.reducers:
        reducer = json.loads(name) if name.startswith("{") else name
        with pumer.reduced(model, reducer):
            reply = answer(model, inputs, options.image, options.question)
            ratio = pumer.report(model).ratio
        print(f"{name}: {reply} ({ratio:.2f} times fewer FLOPs)")


if __name__ == "__main__":
    main()
