"""A callback for transformers' Trainer that saves the reducer in every checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pumer.api import active
from pumer.hub.reduction import SETTINGS, trained_parts
from pumer.hub.saving import follow, write_beside


class PumerCallback(TrainerCallback):
    """Save the reducer in every checkpoint of transformers' Trainer, for `pumer.load`.

    Only needed for a model that was wrapped after `apply`, by PEFT for example; otherwise the
    model's own `save_pretrained` does it. From the start of training, the wrapper's
    `save_pretrained` and `push_to_hub` do so too.

    Example:
        >>> callbacks = [pumer.PumerCallback()]  # for Trainer(..., callbacks=callbacks)
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Patch the wrappers around the model to save the reducer too."""
        patch = active(model)
        if patch is not None:
            follow(model, patch)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Complete the checkpoint that was just written."""
        patch = active(model)
        folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if patch is not None and args.should_save and not (folder / SETTINGS).is_file():
            write_beside(folder, model, patch, trained_parts(patch))
