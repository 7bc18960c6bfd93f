"""Models on the client's side: checked and saved before anything is sent, loaded when they come back.

A `.keras` file is a zip with a `config.json`, which is read here without Keras. Only a keras.Model needs Keras, which its maker
has already imported. Files of other formats are sent as they are, and the nodes check them.
"""

from __future__ import annotations

import json
import sys
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from potluck import extras, savedmodels
from potluck.client.arguments import checked, shown
from potluck.client.formats import SUFFIXES, WORDS, format_of
from potluck.errors import InvalidModel, InvalidRequest
from potluck.wire.values import ImageOptions, ModelFormat, Positive

SUFFIX = SUFFIXES["keras"]
MODEL_FIRST = "the model comes first and then the data, train(model, data) (potluck train MODEL DATA)"
_KNOWN_PACKAGES = ("builtins", "keras", "keras_hub", "keras_cv", "keras_nlp")
"""Packages whose classes Keras finds by itself."""


@dataclass(frozen=True)
class ModelFile:
    """A file to send. `input_shape`: of the only input; None where the model has several inputs or the file does not say.

    `source` tells people where the model came from. `room`: how many classes it can learn; None where its last layer and loss do not
    tell.
    """

    path: Path
    name: str
    input_shape: tuple[int | None, ...] | None
    format: ModelFormat = "keras"
    source: str = ""
    room: int | None = None


def is_keras_model(value: object) -> bool:
    """Whether it is a keras.Model: that is only possible where Keras has been imported."""
    keras = sys.modules.get("keras")
    return keras is not None and isinstance(value, keras.Model)


def is_model_path(value: object) -> bool:
    """Whether it names a file rather than a registered model."""
    return isinstance(value, Path) or (
        isinstance(value, str) and (value.endswith(tuple(SUFFIXES.values())) or "/" in value)
    )


def is_model(value: object) -> bool:
    """Whether it can only be a model: a keras.Model, or the path of a `.keras` file."""
    return is_keras_model(value) or (isinstance(value, str | Path) and Path(value).suffix == SUFFIX)


def model_file(model: object, folder: Path) -> ModelFile:
    """The file of a keras.Model (saved in `folder`) or at a path; packs a SavedModel's folder into `folder`. Raises InvalidModel. Blocks."""
    if is_keras_model(model):
        return keras_file(model, folder, compiled=False)
    path = _path(model)
    found, source = format_of(path), f"imported from {path.resolve().name}"[:256]
    if found == "keras":
        return replace(keras_file(path, folder, compiled=False), source=source)
    if found == "savedmodel":
        tar = folder / "savedmodel.tar"
        savedmodels.pack(path, tar)
        return ModelFile(tar, path.resolve().name, None, found, source)
    return ModelFile(path, path.stem, None, found, source)


def keras_file(model: object, folder: Path, *, compiled: bool) -> ModelFile:
    """The file for training, evaluating and predicting: of a keras.Model, or a `.keras` file. Raises InvalidModel. Blocks."""
    if is_keras_model(model):
        path, source = save_model(model, folder), "a keras.Model"
    else:
        path, source = _path(model), ""
        if (found := format_of(path)) != "keras":
            raise InvalidModel(
                f"{path} is a {WORDS[found]}, but this takes a {SUFFIX} file: load it with Keras and save it as one, or register "
                "and deploy it as it is"
            )
    config = _read_config(path)
    name = str((config.get("config") or {}).get("name") or path.stem) if is_keras_model(model) else path.stem
    if compiled and not config.get("compile_config"):
        raise InvalidModel(
            f"model {name!r} is not compiled: call model.compile(optimizer=..., loss=...) before sending it"
        )
    if own := _unregistered(config):
        raise InvalidModel(
            f"model {name!r} has its own class {own!r}, which is not registered, so no node could load it: decorate it with "
            "@keras.saving.register_keras_serializable(), and name its module in allow_code in the nodes' settings"
        )
    return ModelFile(path, name, _input_shape(config), source=source, room=_room(config))


def _path(model: object) -> Path:
    if isinstance(model, str | Path):
        return Path(model)
    raise InvalidModel(
        f"model must be a keras.Model, a {SUFFIX} file, or a name of the registry, not {shown(model)}: {MODEL_FIRST}"
    )


def save_model(model: Any, folder: Path) -> Path:
    """Save `model` as a `.keras` file in `folder`; returns the path. Raises InvalidModel."""
    if not model.built:
        raise InvalidModel(
            f"model {model.name!r} has no weights yet: give it an input shape (keras.Input) or call it once before sending it"
        )
    path = folder / f"model-{id(model):x}{SUFFIX}"
    try:
        model.save(path)
    except (ValueError, TypeError, OSError, NotImplementedError) as error:
        raise InvalidModel(f"model {model.name!r} cannot be saved: {error}") from error
    return path


def load_model(path: Path, *, safe_mode: bool = True) -> Any:
    """The keras.Model in a file; in `safe_mode`, no code in the file runs. Raises InvalidModel."""
    try:
        import keras
    except ImportError as error:
        raise InvalidModel(
            f"Keras is not installed here, so the model cannot be loaded: {extras.install('engine')}, or save it with model(path)"
        ) from error
    # Keras chooses the format by the suffix, and a blob has none.
    named = path.with_name(f"{path.name}{SUFFIX}")
    if not named.exists():
        named.hardlink_to(path)
    try:
        with warnings.catch_warnings():
            # Results have the optimizer's settings, but not its state.
            warnings.filterwarnings("ignore", message="Skipping variable loading for optimizer")
            return keras.saving.load_model(named, safe_mode=safe_mode)
    except (ValueError, TypeError, OSError, KeyError) as error:
        raise InvalidModel(f"the model cannot be loaded here: {error}") from error
    finally:
        named.unlink(missing_ok=True)


def image_argument(image: object) -> ImageOptions | tuple[int, ...] | None:
    """The argument `image`, checked. Raises InvalidRequest."""
    takes = "(height, width), (height, width, channels) with 1, 3 or 4 channels, or ImageOptions"
    found: ImageOptions | tuple[int, ...] | None
    found = checked("image", image, ImageOptions | tuple[Positive, ...] | None, takes)
    if isinstance(found, tuple) and (len(found) not in (2, 3) or found[2:] not in ((), (1,), (3,), (4,))):
        raise InvalidRequest(f"image must be {takes}, not {shown(image)}")
    return found


def image_options(
    image: ImageOptions | tuple[int, ...] | None, shape: tuple[int | None, ...] | None
) -> ImageOptions | None:
    """How images become the model's input: as given, with `(height, width[, channels])` completed from the input shape.

    None stays None: the nodes then read it from the model. Raises InvalidRequest, also for a size that the model does not take.
    """
    image = image_argument(image)
    if image is None:
        return None
    if isinstance(image, ImageOptions):
        return _fitting(image, shape)
    channels = shape[3] if shape is not None and len(shape) == 4 else None
    asked = image[2] if len(image) == 3 else channels if channels in (1, 3, 4) else 3
    return _fitting(ImageOptions(height=image[0], width=image[1], channels=asked), shape)  # type: ignore[arg-type]


def _fitting(image: ImageOptions, shape: tuple[int | None, ...] | None) -> ImageOptions:
    """`image`, checked. Raises InvalidRequest for a size that the model does not take."""
    if shape is not None and len(shape) == 4:
        wanted = shape[1:3]
        if any(
            want is not None and want != have for want, have in zip(wanted, (image.height, image.width), strict=True)
        ):
            raise InvalidRequest(
                f"image: the model takes images of {_size(wanted)}, not of {image.height}x{image.width}: leave out image "
                "(--image), and images are resized to that"
            )
    return image


def _size(sizes: Sequence[int | None]) -> str:
    return "x".join("any" if size is None else str(size) for size in sizes)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            config = json.loads(archive.read("config.json"))
    except OSError as error:
        raise InvalidModel(f"the model file {path} cannot be read: {error.strerror}") from error
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise InvalidModel(
            f"{path} is not a {SUFFIX} file ({error}): save the model with model.save('name{SUFFIX}')"
        ) from error
    if not isinstance(config, dict):
        raise InvalidModel(f"{path} is not a {SUFFIX} file: its config.json is not a map")
    return config


def _unregistered(config: Any) -> str | None:
    """The first class in a model's configuration that is neither from Keras's own packages nor registered (`package>name`).

    For a class of `__main__`, Keras writes no module.
    """
    if isinstance(config, list):
        return next((found for item in config if (found := _unregistered(item))), None)
    if not isinstance(config, dict):
        return None
    module, name, registered = (config.get(key) for key in ("module", "class_name", "registered_name"))
    if "module" in config and isinstance(registered, str) and isinstance(name, str):
        package = str(module).partition(".")[0]
        if package not in _KNOWN_PACKAGES and ">" not in registered:
            return name
    return _unregistered(list(config.values()))


def _input_shape(config: dict[str, Any]) -> tuple[int | None, ...] | None:
    """The only input's shape with its batch axis, as Keras recorded it when the model was built."""
    build = config.get("build_config")
    shape = build.get("input_shape") if isinstance(build, dict) else None
    if shape is None:
        layers = (config.get("config") or {}).get("layers") or []
        inputs = [layer["config"].get("batch_shape") for layer in layers if layer.get("class_name") == "InputLayer"]
        shape = inputs[0] if len(inputs) == 1 else None
    if not isinstance(shape, list) or not all(size is None or isinstance(size, int) for size in shape):
        return None
    return tuple(shape)


def _room(config: dict[str, Any]) -> int | None:
    """How many classes a model can learn: the units of its last layer, if that is a Dense and the compiled loss is for classes."""
    loss, inner = (config.get("compile_config") or {}).get("loss"), config.get("config") or {}
    if isinstance(loss, dict):  # a Loss object, or the name of a function
        loss = loss["config"] if loss.get("class_name") == "function" else loss.get("class_name")
    last, outputs = (inner.get("layers") or [{}])[-1], inner.get("output_layers")
    name, units = (last.get("config") or {}).get("name"), (last.get("config") or {}).get("units")
    alone = outputs is None or outputs in ([name, 0, 0], [[name, 0, 0]])
    if not isinstance(loss, str) or last.get("class_name") != "Dense" or not isinstance(units, int) or not alone:
        return None
    kind = loss.replace("_", "").lower()
    if kind in ("sparsecategoricalcrossentropy", "categoricalcrossentropy"):
        return units
    return 2 if kind == "binarycrossentropy" and units == 1 else None
