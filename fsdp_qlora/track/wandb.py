"""Weights & Biases as a sink: rank 0 only, offline if it cannot be reached, the same run after a resume."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from fsdp_qlora.config.track import TrackSettings
from fsdp_qlora.errors import first_line
from fsdp_qlora.files.home import home_folder
from fsdp_qlora.shown import shown_source
from fsdp_qlora.track.sink import Ended, Sink, State, numbers

_log = logging.getLogger(__name__)

_KEY = "WANDB_API_KEY"
_REACH_SECONDS = 30
"""How long to wait for the server if WANDB_INIT_TIMEOUT is not set."""


def open_wandb(
    folder: Path, name: str, settings: TrackSettings, config: dict[str, Any], warn: Callable[[str], None] = _log.warning
) -> Sink | None:
    """Start a W&B run, or resume the one whose id is in the run folder.

    Without a key the run is offline. If the key is malformed or the server does not answer, the run is offline and one
    warning is logged. If W&B does not start at all, returns None and logs a warning.
    """
    problem, left_out = "", _workspace_settings()
    if left_out:
        warn(
            f"track=wandb: {left_out[0]} is ignored, because others may have put it there. What you need from it can "
            "be set in your own settings (~/.config/wandb/settings) or in the environment (WANDB_BASE_URL, "
            "WANDB_ENTITY)."
        )
    for mode in (None, "offline") if _has_key() else ("offline",):
        try:
            with _without_key() if mode else nullcontext():
                server = _load_settings(leave_here=bool(left_out))
                if server and mode is None:
                    warn(
                        f"W&B: API key and metrics go to {shown_source(server)}, as set in your environment or "
                        "settings."
                    )
                sink = WandbSink(folder, name, settings, config, mode)
        except Exception as error:  # from W&B, its HTTP library or its service process
            problem = problem or first_line(error).rstrip(".")
            _end_service()
            continue
        if problem:
            warn(f"track=wandb: {problem}. This run is logged offline in {folder / 'wandb'} (`wandb sync` sends it).")
        return sink
    warn(f"track=wandb: {problem}. This run is not logged there; metrics.jsonl has everything.")
    return None


def _workspace_settings() -> list[Path]:
    """Return the settings files in the current folder, which W&B would prefer to the user's own."""
    return [file for name in ("wandb", ".wandb") if (file := Path.cwd() / name / "settings").exists()]


def _load_settings(leave_here: bool) -> str | None:
    """Make W&B load its settings, which it does only once; return the server if it is not the default one.

    Settings in the current folder could name a server that would then receive the key. W&B has no option to ignore
    them, so load from the root folder, which only root can write to.
    """
    import wandb

    with chdir("/") if leave_here else nullcontext():
        settings = wandb.setup().settings
    usual = settings.mode in ("offline", "disabled") or settings.base_url == wandb.Settings().base_url
    return None if usual else settings.base_url


def _end_service() -> None:
    """End W&B's service process, which would otherwise consider the run still in use."""
    with suppress(Exception):
        import wandb

        wandb.teardown(1)


@contextmanager
def _without_key() -> Iterator[None]:
    """Hide the key: W&B reads it even offline, and fails if it is malformed."""
    key = os.environ.pop(_KEY, None)
    try:
        yield
    finally:
        if key is not None:
            os.environ[_KEY] = key


class WandbSink(Sink):
    """Sends metrics to one W&B run, whose id is kept in the run folder."""

    def __init__(
        self, folder: Path, name: str, settings: TrackSettings, config: dict[str, Any], mode: str | None
    ) -> None:
        import wandb

        id_file = folder / "wandb_run_id"
        if not id_file.is_file():
            id_file.write_text(secrets.token_hex(4), encoding="utf-8")
        # x_disable_meta, save_code: by default W&B records the command line and the code.
        own: dict[str, Any] = {"x_disable_meta": True, "save_code": False, "console": "off", "silent": True}
        if "WANDB_INIT_TIMEOUT" not in os.environ:
            own["init_timeout"] = _REACH_SECONDS
        self._run = wandb.init(
            project=settings.wandb_project,
            entity=settings.wandb_entity,
            id=id_file.read_text(encoding="utf-8").strip(),
            name=name,
            group=settings.wandb_group,
            tags=settings.wandb_tags or None,
            notes=settings.wandb_notes,
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            dir=str(folder),
            config=config,
            settings=wandb.Settings(**own),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._sends_adapter = settings.wandb_adapter

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Send the values of a step."""
        self._run.log({"step": step, **values})

    def rewind(self, step: int) -> None:
        """W&B cannot delete logged steps; repeated ones appear twice, with the same ``step``."""

    def close(self) -> None:
        """Do nothing: W&B sends what is pending by itself, and `end` waits for it."""

    def end(self, ended: Ended) -> None:
        """Send the summary and, if asked to, the adapter; raise an alert if the run failed; end the run."""
        import wandb

        self._run.summary.update({f"final/{name}": value for name, value in numbers(ended.summary).items()})
        if self._sends_adapter and ended.adapter is not None:
            artifact = wandb.Artifact(f"adapter-{self._run.id}", type="model", metadata=numbers(ended.summary))
            artifact.add_dir(str(ended.adapter))
            self._run.log_artifact(artifact)
        if ended.state is State.FAILED:
            self._run.alert(f"{self._run.name} failed", ended.message, level="ERROR")
        self._run.finish(exit_code=1 if ended.state is State.FAILED else 0)


def _has_key() -> bool:
    if os.environ.get(_KEY, "").strip() or os.environ.get("WANDB_MODE"):
        return True
    home = home_folder()
    netrc = Path(os.environ.get("NETRC") or (home or Path("/")) / ".netrc")
    try:
        return "wandb" in netrc.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
