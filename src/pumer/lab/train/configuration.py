"""`model.config` of a recipe, checked against the model's configuration class."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from pumer._settings import check_settings
from pumer._suggest import did_you_mean

WHAT = "model.config"


def check_config(
    config_class: Any, settings: Mapping[str, Any], what: str = WHAT
) -> dict[str, Any]:
    """Check settings of a configuration class, those of its sub-configurations included.

    Args:
        config_class: the configuration class.
        settings: by name; `text_config` and the like hold those of a sub-configuration.
        what: names the settings in errors.

    Raises:
        ValueError: for unknown settings and wrong types.
    """
    parts: dict[str, Any] = getattr(config_class, "sub_configs", {})
    default = config_class()
    setting_names = {
        name
        for name in dir(default)
        if not name.startswith("_") and not callable(getattr(default, name, None))
    }
    setting_names |= set(inspect.signature(config_class).parameters) - {"kwargs"} | set(parts)
    if unknown := [name for name in settings if name not in setting_names]:
        hint = did_you_mean(unknown[0], setting_names)
        raise ValueError(
            f"{what}: {config_class.__name__} has no setting {', '.join(unknown)}.{hint}"
        )
    plain_settings = {name: value for name, value in settings.items() if name not in parts}
    checked = check_settings(
        config_class.__init__, check_settings(config_class, plain_settings, what), what
    )
    for name, value in settings.items():
        if name in parts and isinstance(value, Mapping):
            part = _class_of(parts[name], value)
            checked[name] = (
                dict(value) if part is None else check_config(part, value, f"{what}.{name}")
            )
        elif name in parts:
            raise ValueError(
                f"{what}: {name} is {value!r}; expected settings such as {{hidden_size: 64}}"
            )
    return {name: checked[name] for name in settings}


def _class_of(config_class: type, settings: Mapping[str, Any]) -> type | None:
    """The class of a sub-configuration; None if any is allowed."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    name = settings.get("model_type")
    if name is not None:
        return CONFIG_MAPPING.get(name)
    return (
        config_class
        if isinstance(config_class, type) and issubclass(config_class, PreTrainedConfig)
        else None
    )


def new_model(model_class: Any, config: Any) -> Any:
    """Create a model from a configuration, or from settings for one; raises ValueError if they do
    not fit each other."""
    try:
        return model_class(
            model_class.config_class(**config) if isinstance(config, Mapping) else config
        )
    except Exception as error:  # whatever torch and transformers make of them
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{WHAT} makes no {model_class.__name__} ({reason}): change its sizes"
        ) from error
