"""Keras callbacks for training on the cluster: they are called as epochs end, in the process that follows the job."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from potluck.errors import InvalidRequest
from potluck.wire.jobs import EpochMetrics

CALLED = ("set_params", "set_model", "on_train_begin", "on_epoch_begin", "on_epoch_end", "on_train_end")


class Elsewhere:
    """The `model` of a callback: it can end training (`stop_training = True`), as in Keras, and has nothing else."""

    def __init__(self) -> None:
        self.stop_training = False

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"the model trains on the cluster: a callback cannot use its {name!r} here, only logs and stop_training"
        )


class Callbacks:
    """Callbacks as `keras.Model.fit` takes them; a missing method is skipped. Raises InvalidRequest for an object that is no callback."""

    def __init__(self, callbacks: object) -> None:
        many = callbacks if isinstance(callbacks, Iterable) else (callbacks,)
        self._callbacks = tuple(many)
        for one in self._callbacks:
            if isinstance(one, type) or not any(callable(getattr(one, name, None)) for name in CALLED):
                raise InvalidRequest(
                    f"callbacks: expected objects with methods such as on_epoch_end (keras.callbacks), got {one!r:.80}"
                )
        self._model = Elsewhere()
        self._stopped = False
        self._logs: dict[str, float] = {}

    def begin(self, epochs: int) -> None:
        """Call this when training begins, with the number of epochs."""
        self._call("set_params", {"epochs": epochs, "steps": None, "verbose": 0})
        self._call("set_model", self._model)
        self._call("on_train_begin", {})

    def epoch(self, epoch: EpochMetrics) -> bool:
        """Call this when an epoch has ended (callbacks count from 0); True once, when a callback wants training to stop."""
        self._logs = epoch.metrics
        self._call("on_epoch_begin", epoch.epoch - 1, {})
        self._call("on_epoch_end", epoch.epoch - 1, dict(self._logs))
        before, self._stopped = self._stopped, self._stopped or bool(self._model.stop_training)
        return self._stopped and not before

    def end(self) -> None:
        """Call this when training has ended, in any way."""
        self._call("on_train_end", dict(self._logs))

    def _call(self, name: str, *arguments: Any) -> None:
        for callback in self._callbacks:
            method = getattr(callback, name, None)
            if method is not None:
                method(*arguments)
