"""Tokenizes the rows of a run, or checks its images, once per node."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fsdp_qlora.checks.verdict import Verdict
from fsdp_qlora.config.rules import check
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.data.encoder import RowEncoder
from fsdp_qlora.data.limits import require_rows_fit
from fsdp_qlora.data.prepare import PreparedData, prepare_data
from fsdp_qlora.distributed.reduce import on_every
from fsdp_qlora.errors import DataError, ModelError
from fsdp_qlora.files.home import cache_folder
from fsdp_qlora.model.config import load_config
from fsdp_qlora.model.folder import resolve_folder
from fsdp_qlora.model.processor import (
    build_image_processor,
    build_image_text_processor,
    build_speech_processor,
    tokenizer_of,
)
from fsdp_qlora.model.tokenizer import add_special_tokens, build_tokenizer, stored_template
from fsdp_qlora.objectives import Objective, build_objective
from fsdp_qlora.run.build import OpenedModel
from fsdp_qlora.run.images import settle_images
from fsdp_qlora.run.labels import labels_of, require_metrics
from fsdp_qlora.run.world import World
from fsdp_qlora.shapes.linears import ModelShapes
from fsdp_qlora.track.bars import Bar

TOKENIZING = "tokenizing rows"

if TYPE_CHECKING:
    from fsdp_qlora.model.processor import Processor


def tokenize(
    config: RunConfig, folder: Path, opened: OpenedModel, verdict: Verdict, world: World
) -> tuple[Processor, PreparedData | None]:  # fmt: skip
    """Return the tokenizer or image processor, and the stored rows if data is given; one process per node makes them.

    Raises:
        DataError: if the rows cannot be read or do not suit the model.
        ModelError: if the model has no such processor, or cannot take what it makes.
    """
    ranks = world.ranks
    on_every(lambda: require_metrics(opened.config), ranks)  # only now is it known what the model reads
    objective, model_config = build_objective(opened.config.objective), opened.base.config
    processor = on_every(lambda: _processor(config, folder, objective), ranks)
    if config.data.train is None:
        return processor, None
    ranks.phases.enter("preparing the data")
    encoder = on_every(lambda: _encoder(objective, config, processor, opened.base, model_config), ranks)
    bar = Bar(TOKENIZING) if ranks.is_main else None

    def tell(rows: int) -> None:
        ranks.phases.sign()
        if bar is not None:
            bar(rows, 0)

    data = prepare_data(
        config.data, config.run.seed, tokenizer_of(processor), cache_folder(), world.share, tell,
        ranks.phases.by_itself, encoder,
    )  # fmt: skip
    if bar is not None:
        bar.close()
    if not objective.of_tokens:
        return processor, data
    assert isinstance(processor, PreTrainedTokenizerBase)
    limit = _longest_row(opened.shapes, verdict)
    num_ids = known_ids(config, opened.shapes, processor)
    on_every(lambda: require_rows_fit(data, config.data, processor, num_ids, limit), ranks)
    return processor, data


def _encoder(
    objective: Objective, config: RunConfig, processor: Processor, base: PreTrainedModel, model_config: PreTrainedConfig
) -> RowEncoder | None:
    encoder = objective.encoder(config.data, processor, model_config)
    if encoder is not None:
        objective.require_fit(encoder, base)
    return encoder


def known_ids(config: RunConfig, shapes: ModelShapes, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of token ids that the model has rows for: with added tokens, those of the tokenizer."""
    return len(tokenizer) if config.model.add_tokens else shapes.embedding_rows


def first_added(config: RunConfig, shapes: ModelShapes, tokenizer: Processor) -> int | None:
    """Return the id of the first added token, or None if none was added.

    Raises:
        ModelError: if the model lacks rows even for the tokens before it.
    """
    if not config.model.add_tokens:
        return None
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    first = len(tokenizer) - len(config.model.add_tokens)
    if first > shapes.embedding_rows:
        raise ModelError(
            f"model.add_tokens: the tokenizer has {first} tokens without the added ones, but the model's embedding has "
            f"only {shapes.embedding_rows} rows. Use the tokenizer that came with the model."
        )
    return first


def _longest_row(shapes: ModelShapes, verdict: Verdict) -> int | None:
    """Return the maximum number of positions in a row, or None if there is no limit."""
    unusable = verdict.unusable_positions
    return shapes.max_positions - unusable if unusable is not None and shapes.max_positions else None


def prepare_tokens(config: RunConfig) -> PreparedData:
    """Tokenize the data without a model or process group."""
    check(config)
    folder = resolve_folder(config.model.name, config.model.revision)
    config = settle_images(config, folder)
    objective = build_objective(labels_of(config, folder))
    if objective.of_tokens:
        processor, encoder = _processor(config, folder, objective), None
    else:
        model_config = load_config(folder, config.model.trust_remote_code, config.model.config_overrides)
        objective = build_objective(objective.settled(folder, model_config))
        objective.configure(model_config)
        processor = _processor(config, folder, objective)
        encoder = objective.encoder(config.data, processor, model_config)
    bar = Bar(TOKENIZING)
    data = prepare_data(
        config.data, config.run.seed, tokenizer_of(processor), cache_folder(), progress=lambda rows: bar(rows, 0),
        encoder=encoder,
    )  # fmt: skip
    bar.close()
    return data


def _processor(config: RunConfig, folder: Path, objective: Objective) -> Processor:
    trusted = config.model.trust_remote_code
    if objective.reads == "images":
        return build_image_processor(folder, config.objective.image_size, trusted)
    if objective.reads == "recordings":
        return build_speech_processor(folder, config.objective.language, config.objective.task, trusted)
    tokenizer = open_tokenizer(config, folder)
    if objective.reads == "texts with images":
        return build_image_text_processor(folder, tokenizer, config.data.template is None, trusted)
    return tokenizer


def open_tokenizer(config: RunConfig, folder: Path) -> PreTrainedTokenizerBase:
    """Load a model folder's tokenizer, with the added tokens and the chat template of the settings.

    Raises:
        DataError: if the template cannot be read.
    """
    tokenizer = build_tokenizer(folder, config.model.trust_remote_code)
    add_special_tokens(tokenizer, config.model.add_tokens)
    if config.data.template is not None:
        try:
            tokenizer.chat_template = stored_template(Path(config.data.template).expanduser())
        except OSError as error:
            raise DataError(f"data.template: {config.data.template} cannot be read: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise DataError(f"data.template: {config.data.template} is not valid UTF-8.") from error
        except ValueError as error:
            raise DataError(f"data.template: {config.data.template} cannot be read: {error}.") from error
        if tokenizer.chat_template is None:
            raise DataError(f"data.template: {config.data.template} holds no chat template.")
    return tokenizer
