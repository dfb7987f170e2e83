"""Measure whether the text attends to the objects that a question is about.

    python benchmarks/scripts/saliency.py MODEL...

Scores the patches of scenes images in every layer as PuMer does, without reducing. Prints for each
layer how often a patch with an object scores above a plain one (area under the ROC curve; 50 % is
chance), how often a patch that the question asks about scores above the others, and the accuracy
with a fifth of the patches pruned in that layer alone, by the text and at random, without training.
"""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

import pumer
from pumer.adapters import find
from pumer.lab.commands.common import open_model, open_task
from pumer.lab.evaluate import evaluate, model_inputs, take
from pumer.reducers import Plan
from pumer.reducers.base import Reducer
from pumer.reducers.ops.matching import rank
from pumer.reducers.ops.saliency import text_saliency
from pumer.reducers.tokens import Tokens, TokenShape


@dataclass(frozen=True)
class SaliencyRecorder(Reducer):
    """Reduces nothing and records each layer's saliency."""

    name = "saliency-recorder"
    layers: tuple[int, ...] = ()
    scores: tuple[list[Tensor], ...] = ()

    def lengths(self, shape: TokenShape) -> tuple[int, int]:
        return shape.unchanged

    def plan(self, tokens: Tokens) -> Plan:
        self.scores[tokens.layer].append(text_saliency(tokens)[:, tokens.num_prefix_tokens :])
        return Plan.identity(tokens.mask_BN)


def above(score_BP: Tensor, of_BP: Tensor) -> float:
    """Mean over samples of how often one of the marked patches is scored above one of the others,
    percent."""
    marked, others = of_BP.sum(1), (~of_BP).sum(1)
    ranks_BP = score_BP.shape[1] - rank(score_BP)  # 1 for the lowest
    wins = (ranks_BP * of_BP).sum(1) - marked * (marked + 1) / 2
    both = (marked > 0) & (others > 0)
    return float(100 * (wins / (marked * others))[both].mean())


def main(model: str, questions: int = 1024, batch: int = 64) -> None:
    net = pumer.remove(open_model(model, None))
    depth = find(net).depth(net)
    collator = open_task(
        model, net, {"name": "scenes", "questions": questions, "seed": 31, "patch_size": 8}
    )
    examples = collator.task.examples("test")
    recorder, labels = SaliencyRecorder(tuple(range(depth)), tuple([] for _ in range(depth))), []
    with pumer.reduced(net, recorder), torch.inference_mode():
        for start in range(0, questions, batch):
            inputs = collator(take(examples, range(len(examples))[start : start + batch]))
            labels.append(inputs["patch_labels"])
            net(**model_inputs(inputs, torch.device("cpu")))
    colour, _, asked = torch.cat(labels)[..., :3].unbind(-1)

    def accuracy(reducer: Reducer) -> float:
        with pumer.reduced(net, reducer):
            return evaluate(net, examples, collator, batch_size=batch).metric["accuracy"]

    print(f"{model}, unreduced {accuracy(pumer.Unreduced()):.1f} %")
    print(
        "layer  object above plain  asked about above others  a fifth pruned by the text  at random"
    )
    for layer, scores in enumerate(recorder.scores):
        score = torch.cat(scores)
        by_text = accuracy(pumer.PuMer(prune=0.2, merge=0.0, merge_text=0.0, layers=(layer,)))
        at_random = accuracy(pumer.Random(prune=0.2, layers=(layer,)))
        print(
            f"{layer:5d} {above(score, colour > 0):17.1f} % {above(score, asked > 0):23.1f} %"
            f" {by_text:25.1f} % {at_random:8.1f} %"
        )


for model in sys.argv[1:]:
    main(model)
