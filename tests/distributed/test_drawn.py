"""A benchmark's model is drawn on its ranks: the same bytes on any number of them, and gathered as loaded."""

from __future__ import annotations

from pathlib import Path

from benchmarks.drawn import DrawnWeights
from benchmarks.gpu.shapes import write_shape
from fsdp_qlora.checks.gather import verify_gather
from fsdp_qlora.quant.packing import tensor_sha256
from fsdp_qlora.run.prepare import prepare
from tests.build import config_of, whole, world_of


def _digests(ranks, folder: str, quant: str) -> tuple[dict[str, str], int, int, int]:
    config = config_of(folder, quant={"name": quant})
    prepared = prepare(config, world_of(ranks), weights=DrawnWeights)
    digests = {name: tensor_sha256(whole(p)) for name, p in prepared.model.named_parameters()}
    files = prepared.load.file_bytes
    return digests, prepared.load.bytes_read, files, verify_gather(prepared.model, ranks)


def test_any_number_of_ranks_draws_the_same_model(pool, tmp_path: Path):
    shape = write_shape("moe", tmp_path / "model", small=True)
    ((alone, read, files, nothing),) = pool.run(1, _digests, str(shape.folder), "nf4")
    assert nothing == 0, "a lone rank gathers nothing"
    assert read >= 2 * shape.weights and read - files < 100_000
    for num_ranks in (2, 3):
        of_ranks = pool.run(num_ranks, _digests, str(shape.folder), "nf4")
        for digests, part, _, gathered in of_ranks:
            assert digests == alone
            assert part < 0.75 * read
            assert gathered > shape.weights // 2 // 4, "at least the bytes of the codes of one of two layers"
    assert len(set(alone.values())) > len(alone) // 2
