"""Settings by name: the paper's, per model and task (Cao et al., 2023, released configurations)."""

from __future__ import annotations

from pumer.reducers import PuMer, Reducer

PRESETS: dict[str, Reducer] = {
    "vilt-vqav2": PuMer(prune=0.1, merge=0.3, merge_text=0.2, layers=(2, 5, 8)),
    "vilt-nlvr2": PuMer(prune=0.1, merge=0.3, merge_text=0.2, layers=(2, 5, 8)),
    "vilt-snli-ve": PuMer(prune=0.1, merge=0.3, merge_text=0.2, layers=(2, 4, 6, 8)),
    "vilt-retrieval": PuMer(prune=0.1, merge=0.3, merge_text=0.2, layers=(2, 4, 6, 8)),
}


def preset(name: str) -> Reducer:
    """The reducer of that name; raises ValueError listing the known ones."""
    if name not in PRESETS:
        raise ValueError(f"no preset is named {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
