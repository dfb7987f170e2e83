"""`pumer report`."""

from __future__ import annotations

import pumer
from pumer._options import Count
from pumer.commands.common import ReducerSettings, open_model


def report_(model: str, reducer: ReducerSettings = None, text: Count | None = None, image: Count | None = None) -> None:
    """Tokens and FLOPs per layer.

    Args:
        model: folder of a saved model, or a shipped one's name.
        reducer: a preset, a reducer's name, or `{"reducer": ..., setting: value}`; the model's own if not given.
        text: text tokens; a full-length text if not given.
        image: image tokens; those of a picture of the configured size if not given.
    """
    print(pumer.report(open_model(model, reducer), text=text, image=image))
