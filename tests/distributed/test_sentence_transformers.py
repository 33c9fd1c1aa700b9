"""An adapter of `objective=embedding` loads in sentence-transformers, with the vectors of plain PEFT."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, AutoTokenizer

from fsdp_qlora.objectives.pooling import pool as pooled
from tests.build import run_fit
from tests.objectives import CASES
from tests.tiny import sentence

pytestmark = pytest.mark.full


@pytest.mark.parametrize("kind", ["bert, pairs", "llama, pairs"])
def test_sentence_transformers_make_the_same_vectors(pool, tmp_path, kind):
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is no dependency")
    model, groups = CASES[kind].write(tmp_path)
    pool.run(2, run_fit, model, str(tmp_path), "run", groups)
    adapter = tmp_path / "run/adapter"
    texts = [sentence(number, 3 + number % 5) for number in range(6)]
    kinds = {"dtype": torch.float32}
    loaded = library.SentenceTransformer(str(adapter), device="cpu", model_kwargs=kinds)
    vectors = loaded.encode(texts, convert_to_tensor=True)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    inputs = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    mode = {"bert, pairs": "mean", "llama, pairs": "lasttoken"}[kind]

    def vectors_of(plain):
        with torch.no_grad():
            return pooled(plain.eval()(**inputs).last_hidden_state, inputs["attention_mask"], mode)

    bare = vectors_of(AutoModel.from_pretrained(model, **kinds))
    wanted = vectors_of(PeftModel.from_pretrained(AutoModel.from_pretrained(model, **kinds), str(adapter)))
    assert torch.allclose(vectors, wanted, atol=1e-5) and not torch.allclose(vectors, bare, atol=1e-4)
