"""`pumer report`."""

from __future__ import annotations

import pumer
from pumer._options import Count
from pumer.lab.bench.settings import ReducerSettings
from pumer.lab.commands.common import open_model
from pumer.lab.tasks.prompts import is_generative
from pumer.models.sizes import longest_text


def report_(
    model: str,
    reducer: ReducerSettings = None,
    text: Count | None = None,
    image: Count | None = None,
) -> None:
    """Tokens and FLOPs per layer.

    Args:
        model: folder of a saved model, or a shipped one's name.
        reducer: a preset's or a reducer's name (`pumer list`), or a file of settings; single
            settings are given as --reducer.SETTING VALUE; the model's own if not given.
        text: text tokens; a full-length text if not given.
        image: image tokens; those of an image of the configured size if not given.
    """
    net = open_model(model, reducer)
    longest = (
        net.config.get_text_config().max_position_embeddings
        if is_generative(net)
        else longest_text(net.config)
    )
    if text is not None and text > longest:
        raise ValueError(
            f"--text is {text}, the model takes texts of up to {longest} tokens: give no more"
        )
    print(pumer.report(net, text=text, image=image))
