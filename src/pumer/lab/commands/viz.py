"""`pumer viz`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from transformers import PreTrainedModel

import pumer
from pumer._files import check_file, replacing
from pumer._options import Index, OutputFile
from pumer._terminal import visible
from pumer.lab.bench.settings import ReducerSettings
from pumer.lab.commands.common import open_model, open_task
from pumer.lab.data.images import open_image
from pumer.lab.evaluate import answer, model_inputs
from pumer.lab.scenes.tasks import Scenes
from pumer.lab.tasks.base import Collator, Example
from pumer.lab.tasks.prompts import is_generative
from pumer.viz import TokenMap, draw, to_image, token_map, token_maps


def viz_(
    out: OutputFile,
    model: str = "scenes-vilt-pumer",
    image: str | None = None,
    question: str | None = None,
    example: Index = 0,
    reducer: ReducerSettings = None,
) -> None:
    """Draw which tokens were kept, merged and dropped for one image and question.

    Args:
        out: PNG file to write; the same map as JSON goes beside it.
        model: folder of a saved model, or a shipped one's name.
        image: file of an image; a generated one if not given.
        question: about that image.
        example: which generated image and question, where no image is given.
        reducer: a preset's or a reducer's name (`pumer list`), or a file of settings; single
            settings go as --reducer.SETTING VALUE; the model's own if not given.
    """
    check_file(Path(out).with_suffix(".json"))
    format = Image.registered_extensions().get(Path(out).suffix.lower())
    if format is None:
        raise ValueError(f"{out} is no name of an image: end it in .png")
    if (image is None) != (question is None):
        raise ValueError(
            "an image of your own and its question go together: give --image and --question"
        )
    net = open_model(model, reducer)
    if pumer.active(net) is None:
        raise ValueError(f"nothing reduces {model}: give --reducer")
    collator = open_task(model, net, {"name": "scenes"})
    if image is not None and question is not None:
        chosen = Example(0, question, (open_image(image),), None, 0)
    else:
        chosen = Scenes(questions=example + 1, seed=7).examples("test")[example]
    ((shown, drawn_on, title),) = shown_images(net, collator, chosen)
    with replacing(out, "wb") as file:
        draw(shown, drawn_on, title).save(file, format)
    with replacing(Path(out).with_suffix(".json")) as file:
        file.write(shown.to_json())
    print(f"{visible(title)}\n{out} and {Path(out).with_suffix('.json')}")


def shown_images(
    net: PreTrainedModel, collator: Collator, example: Example
) -> list[tuple[TokenMap, Image.Image, str]]:
    """Token map, image and title of every image of an example; decoders may have several."""
    if not is_generative(net):
        return [show(net, collator, example)]
    batch = model_inputs(collator([example]))
    tokenizer: Any = collator.text.tokenizer
    words = [tokenizer.decode([token]) for token in batch["input_ids"][0].tolist()]
    maps = token_maps(net, batch, words)
    (written,) = answer(net, batch, collator, 1)
    title = _title(collator, example, written)
    images = [
        open_image(image) if isinstance(image, str) else image
        for image in collator.load_images([example])
    ]
    return [(shown, _plain(image), title) for shown, image in zip(maps, images, strict=True)]


def _plain(image: Any) -> Image.Image:
    """What the model looked at: an image, or its pixels as a transform gives them."""
    return image if isinstance(image, Image.Image) else to_image(image)


def _title(collator: Collator, example: Example, written: Any) -> str:
    title = f"{example.text}  {written}"
    if example.target is not None:
        title += (
            "  (right)"
            if collator.task.score(written, example)
            else f"  (wrong: {example.meta['answer']})"
        )
    return title


def show(
    net: PreTrainedModel, collator: Collator, example: Example
) -> tuple[TokenMap, Image.Image, str]:
    """Token map, image and a title with question and answer, of one example."""
    batch = model_inputs(collator([example]))
    tokenizer: Any = collator.text.tokenizer
    words = tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    shown = token_map(net, batch, words)
    chosen = net.config.id2label[int(net(**batch).logits.argmax(-1))]
    return shown, to_image(batch["pixel_values"][0]), _title(collator, example, chosen)
