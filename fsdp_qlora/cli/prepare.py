"""`prepare`: fetch what is embedded if the settings use it, and tokenize the data, without any process group."""

from __future__ import annotations

from fsdp_qlora.api import cache_folder, prepare_tokens
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.data.embedded import fetch_embedded
from fsdp_qlora.data.sources import names_of


def run(config: RunConfig) -> int:
    """Prepare; return the exit code."""
    names = [config.model.name, *names_of(config.data.train or []), *names_of(config.data.eval or [])]
    if any(name.startswith(str(cache_folder() / "embedded")) for name in names):
        fetch_embedded(cache_folder())
    if config.data.train is None:
        print("data.train is not set: there is nothing to tokenize.")
        return 0
    data = prepare_tokens(config)
    train, held_out = data.train_counts, data.eval_counts
    print(
        f"ready: {train.kept} training sequences ({train.tokens} tokens, {train.target_tokens} supervised), "
        f"{held_out.kept} held out; model {config.model.name}"
    )
    return 0
