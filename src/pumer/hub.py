"""Models on disk: our own folders, and the checkpoints that were published with PuMer.

Weights are read from safetensors files, or from `.bin` files in torch's weights-only mode; code in a file never runs.
"""

from __future__ import annotations

import importlib
import json
import pickle
import shutil
import uuid
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pumer._version import __version__
from pumer.api import active, apply
from pumer.reducers import Reducer, from_dict, to_dict

FORMAT = 1
"""Version of what `pumer.json` holds."""
_SETTINGS = "pumer.json"
_OWN = {"ViltForVisualEntailment": "pumer.models.vilt.entailment"}
_LISTED = 12


def save(model: Any, path: str | Path) -> None:
    """Write a model with the reduction in force: what `save_pretrained` writes, and `pumer.json`.

    The folder appears complete or not at all. A model that nothing reduces may be saved too.

    Args:
        model: any Hugging Face model.
        path: a folder that does not exist yet, or is empty.

    Raises:
        ValueError: if the folder holds files already, or the model is none of Hugging Face's.
    """
    if not hasattr(model, "save_pretrained"):
        raise ValueError(f"{type(model).__name__} is not a Hugging Face model: save the one inside it")
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not an empty folder: give another one, or delete it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    patch = active(model)
    settings = {
        "format": FORMAT,
        "pumer": __version__,
        "reducer": None if patch is None else to_dict(patch.reducer),
        "attention": "sdpa" if patch is None else patch.attention,
        "trim": True if patch is None else patch.trim,
    }
    # A sibling, so that the last step is a rename within one file system.
    folder = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    folder.mkdir()
    try:
        model.save_pretrained(folder)
        (folder / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        if path.exists():
            path.rmdir()
        folder.rename(path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def load(path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> Any:
    """Read what `save` wrote: the model in eval mode, with the same reduction in force.

    Args:
        path: the folder.
        dtype: of the weights; as they were saved if not given.
        device: where the model goes; the CPU if not given.

    Raises:
        ValueError: if a file is missing or damaged, or was written by a newer pumer.
    """
    path = Path(path)
    settings = _read_json(
        path / _SETTINGS, "pumer.save writes it; for other folders use from_pretrained and pumer.apply"
    )
    reducer = _read_settings(settings, path / _SETTINGS)
    config = _read_json(path / "config.json", "save the model again")
    kind = _model_class(config.get("architectures"), path)
    try:
        model, info = kind.from_pretrained(
            path, dtype=dtype, local_files_only=True, weights_only=True, output_loading_info=True
        )
    except Exception as error:  # whatever safetensors, torch and transformers make of a damaged file
        raise ValueError(f"the model in {path} cannot be read, save it again: {error}") from error
    if info["missing_keys"]:
        raise ValueError(f"the weights in {path} lack {_some(info['missing_keys'])}: save the model again")
    if device is not None:
        model.to(device)
    if reducer is not None:
        apply(model, reducer, attention=settings["attention"], trim=settings["trim"])
    return model


def load_official(directory: str | Path) -> Any:
    """A released PuMer ViLT checkpoint, as transformers' model with the published reduction in force.

    Reads `config.json` and `model.safetensors` (or `pytorch_model.bin`, in torch's weights-only mode) with the
    published names, and for VQA the list of answers in `vqa2_label2ans.json` if there is one. Which task it is, is
    told by the head; visual entailment gets a class of ours, the others transformers' own. Inputs have transformers'
    names. To get the published results pad text to the length the checkpoint was trained with: the published code
    counts padded text.

    The head for image-text matching of retrieval checkpoints has no place in transformers and is left out.

    Args:
        directory: the folder. Sizes that the published code has fixed may be given in `config.json`, as `pos_grid`
            ([12, 12]); those that weights show are read off them.

    Raises:
        ValueError: if a file is missing or damaged or holds pickled code, if weights are missing or have wrong
            shapes, and for checkpoints with learned pruning.
    """
    from pumer.models.vilt import published

    directory = Path(directory)
    settings = _read_json(directory / "config.json", "a released checkpoint has one")
    state = _read_weights(directory)
    published.check_support(settings, state)
    unknown = published.unknown_settings(settings)
    if unknown:
        _warn(f"config.json in {directory} has settings that are unknown and ignored: {', '.join(unknown)}")
    head = published.find_head(state)
    kind = _model_class([published.CLASSES[head]], directory)
    config = published.model_config(settings, state)
    _name_answers(config, head, directory)

    with torch.device("meta"):
        expected = kind(config).state_dict()
    _check_weights(published.from_transformers(expected, head), state, directory)
    converted = published.to_transformers(state)
    model = kind.from_pretrained(
        None, config=config, state_dict={name: converted[name] for name in expected}, dtype=torch.float32
    )
    # The published dropout is that of the text embeddings alone. It is no setting of transformers' configuration,
    # so it does not survive `save`.
    model.vilt.embeddings.text_embeddings.dropout.p = float(settings.get("drop_rate", 0.1))
    return apply(model.eval(), published.reducer(settings))


def _read_json(file: Path, hint: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no {file}: {hint}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}): get it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged, it should hold a JSON object: get it again")
    return content


def _read_settings(settings: dict[str, Any], file: Path) -> Reducer | None:
    version = settings.get("format")
    if not isinstance(version, int) or version < 1:
        raise ValueError(f"{file} is damaged, its format is {version!r}: save the model again")
    if version > FORMAT:
        raise ValueError(
            f"{file} has format {version}, written by pumer {settings.get('pumer')}; this is pumer {__version__}, "
            f"which reads format {FORMAT}: upgrade pumer"
        )
    names = {"format", "pumer", "reducer", "attention", "trim"}
    if set(settings) != names:
        raise ValueError(f"{file} should have the entries {sorted(names)}, not {sorted(settings)}")
    if settings["reducer"] is None:
        return None
    try:
        return from_dict(settings["reducer"])
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"the reducer in {file} cannot be made: {error}") from error


def _model_class(names: Any, where: Path) -> Any:
    """The model class named in a configuration's `architectures`: ours or transformers'."""
    import transformers

    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    module = importlib.import_module(_OWN[name]) if name in _OWN else transformers
    kind = getattr(module, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(
            f"config.json in {where} names the model class {names!r}, which neither transformers nor pumer has: read "
            "it with its own class, then call pumer.apply"
        )
    return kind


def _read_weights(directory: Path) -> dict[str, Tensor]:
    files = [directory / name for name in ("model.safetensors", "pytorch_model.bin")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ValueError(f"{directory} has neither model.safetensors nor pytorch_model.bin: download one of them")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is damaged, or holds pickled code, which is never run: get it again, or as safetensors ({error})"
        ) from error
    except Exception as error:  # a cut-off file fails in as many ways as there are places to cut
        raise ValueError(f"{file} is damaged, get it again: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{file} holds something else than named weights: save the model's state_dict() alone")
    return state


def _check_weights(expected: dict[str, Tensor], state: dict[str, Tensor], directory: Path) -> None:
    from pumer.models.vilt.published import POSITION_IDS

    needed = set(expected) - {POSITION_IDS}
    problems = []
    if missing := needed - set(state):
        problems.append(f"missing: {_some(missing)}")
    wrong = [
        f"{name} is {list(state[name].shape)}, not {list(expected[name].shape)}"
        for name in needed & set(state)
        if state[name].shape != expected[name].shape
    ]
    if wrong:
        problems.append(f"wrong shapes: {_some(wrong)}")
    if problems:
        hint = (
            " (give the grid of position embeddings as pos_grid in config.json)" if "pos_embed is" in str(wrong) else ""
        )
        raise ValueError(f"the weights in {directory} do not fit, {'; '.join(problems)}{hint}")
    if extra := set(state) - needed - {POSITION_IDS}:
        _warn(f"weights in {directory} that have no place in the model are left out: {_some(extra)}")


def _name_answers(config: Any, head: str, directory: Path) -> None:
    from pumer.models.vilt.published import set_label_names

    file = directory / "vqa2_label2ans.json"
    if head != "vqa_classifier" or not file.exists():
        return
    try:
        answers = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}): get it again, or delete it") from error
    if not isinstance(answers, list) or len(answers) != config.num_labels:
        raise ValueError(f"{file} should be a list of the {config.num_labels} answers: get it again, or delete it")
    set_label_names(config, [str(answer) for answer in answers])


def _some(names: Any) -> str:
    names = sorted(names)
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)
