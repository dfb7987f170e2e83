"""The model card of a reduced model: the README.md that the Hub shows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from pumer._files import replacing
from pumer.hub.sources import is_hub_name
from pumer.reducers import Reducer, to_dict

CARD = "README.md"
_TAGS = ("pumer", "token-reduction")
_NAME = "OWNER/NAME"
"""Placeholder in the card for a name that is not known yet."""
_AUTOMATIC = "This model card has been automatically generated."
"""A line of the card that transformers writes by default."""
_PEFT = ("### Framework versions", "- PEFT ")
"""Prefixes of the lines that PEFT adds to any card."""

_TEXT = """\
# {kind} with {title}

This model runs with token reduction: [pumer](https://aclanthology.org/2023.acl-long.721/) drops or
merges part of its image and text tokens while it runs.

## How to load it

```sh
pip install pumer
```

```python
import pumer

model = pumer.load("{name}")  # reduced, in eval mode
```

## Reduction

Method: `{method}`. Settings, which `pumer.json` holds too:

```json
{settings}
```

## Without pumer

{without}
"""
_UNREDUCED = (
    "the model then runs unreduced. It computes more, and weights that were trained with this "
    "reducer answer differently without it."
)
_WITHOUT = f"`from_pretrained` reads the same weights, and {_UNREDUCED}"
_OURS = f"transformers alone has no such model. Read by its class in pumer, {_UNREDUCED}"
_ADAPTER = f"`PeftModel.from_pretrained` puts the same adapter on the base model, and {_UNREDUCED}"
_LEARNED = " What the reducer itself has learned, in `reducer.safetensors`, is missing then."
_PATTERN = re.compile(
    r"# (?P<kind>\w+) with (?P<title>\w+)\n.*"
    r'pumer\.load\("(?P<name>[^"]*)"\).*'
    r"Method: `(?P<method>[^`]*)`.*"
    r"```json\n(?P<settings>.*?)\n```.*"
    r"## Without pumer\n\n(?P<without>[^\n]*)",
    re.DOTALL,
)
"""Finds the values of the placeholders of `_TEXT` in a card."""


def write_card(folder: Path, model: Any, reducer: Reducer, name: str | None = None) -> None:
    """Write a model's card into its folder, unless there is one that somebody wrote or edited.

    Args:
        folder: of the model, already written.
        model: the Hugging Face model inside any wrapper.
        reducer: its active reducer.
        name: of the model on the Hub, if known.
    """
    file = folder / CARD
    content = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    if content and not _is_automatic(content):
        return
    data: Any = ModelCard(content).data if content else ModelCardData()
    before = _PATTERN.search(content)
    adapter = data.library_name == "peft"
    data.library_name = "peft" if adapter else "pumer"
    old = {before["method"]} if before else set()
    tags = [tag for tag in data.tags or () if tag not in old and not _names_path(tag)]
    tags += [*_TAGS, reducer.name, model.config.model_type]
    if _is_stock(model):
        tags.append("transformers")
    data.tags = list(dict.fromkeys(tags))
    data.pipeline_tag = data.pipeline_tag or _task(model)
    data.base_model = _base(model)
    without = _ADAPTER if adapter else _WITHOUT if _is_stock(model) else _OURS
    text = _TEXT.format(
        kind=type(model).__name__,
        title=type(reducer).__name__,
        name=name or _NAME,
        method=reducer.name,
        settings=json.dumps(to_dict(reducer), indent=2),
        without=without + (_LEARNED if reducer.traits.learned else ""),
    )
    with replacing(file) as stream:
        stream.write(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _is_automatic(content: str) -> bool:
    """Whether a card is unedited, as written by pumer, transformers or PEFT."""
    text = content.partition("\n---\n")[2] if content.startswith("---\n") else content
    lines = [line for line in text.splitlines() if not line.startswith(_PEFT)]
    empty = ModelCard.from_template(ModelCardData()).text.splitlines()
    if lines and all(line in empty or _AUTOMATIC in line for line in lines):
        return True
    filled = _PATTERN.search(text)
    if filled is None or filled["without"].removesuffix(_LEARNED) not in (
        _WITHOUT,
        _OURS,
        _ADAPTER,
    ):
        return False
    return _TEXT.format(**filled.groupdict()).strip() == "\n".join(lines).strip()


def _names_path(tag: str) -> bool:
    """Whether a tag is PEFT's for a base model's local path, which is useless elsewhere."""
    start, _, base = tag.partition(":adapter:")
    return start == "base_model" and not is_hub_name(base)


def _is_stock(model: Any) -> bool:
    return type(model).__module__.startswith("transformers.")


def _task(model: Any) -> str | None:
    """The Hub's name of the model's task, None if unclear."""
    if model.can_generate():
        return "image-text-to-text"
    return "visual-question-answering" if "QuestionAnswering" in type(model).__name__ else None


def _base(model: Any) -> str | None:
    """The Hub name of the model that this one was loaded from; None without one."""
    name = getattr(model.config, "_name_or_path", None)
    if not name or not is_hub_name(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return str(name)
