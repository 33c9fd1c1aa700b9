"""Rules on tracking."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from fsdp_qlora.config import choices
from fsdp_qlora.config.choices import nearest
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.shown import has_password, shown_source


def _known(config: RunConfig) -> Iterator[str]:
    for name in config.track.to:
        if name not in choices.TRACKERS:
            known = ", ".join(choices.TRACKERS)
            yield f"track.to: {name!r} is not one of {known}.{nearest(name, choices.TRACKERS)}"


def _address(config: RunConfig) -> Iterator[str]:
    if config.track.mlflow_uri is not None and has_password(config.track.mlflow_uri):
        yield (
            f"track.mlflow_uri: {shown_source(config.track.mlflow_uri)} contains a password, which would be stored "
            "with the settings. Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the whole address in "
            "MLFLOW_TRACKING_URI."
        )


def trackers_needs(config: RunConfig) -> Iterator[str]:
    """Yield which packages of the chosen trackers are missing here."""
    for name in config.track.names:
        if missing := [p for p in choices.TRACKER_PACKAGES.get(name, ()) if find_spec(p) is None]:
            yield (
                f"track: {name} needs {' and '.join(missing)}, not installed here; run `pip install "
                f"'fsdp-qlora[{name}]'`, or leave it out."
            )


TRACK_RULES = (_known, _address)
