"""Entities, words and their tokens, masks, and contrast: arithmetic of the objectives on tokens and vectors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig

from fsdp_qlora.config.schema import DataSettings, ObjectiveSettings
from fsdp_qlora.data.encoder import Counts, Stored
from fsdp_qlora.data.lines import Row
from fsdp_qlora.data.masked import Masking
from fsdp_qlora.data.words import NO_WORD, WordTokenizer
from fsdp_qlora.errors import ModelError
from fsdp_qlora.objectives import build_objective
from fsdp_qlora.objectives.contrast import Texts, losses, retrieval
from fsdp_qlora.objectives.entities import entities, names_entities, of_entities
from fsdp_qlora.objectives.pooling import pool, pooling_of
from tests.tiny import make_tokenizer, sentence
from tools.minilm import MINILM


def test_entities_of_bio_labels():
    labels = ["B-PER", "I-PER", "O", "I-LOC", "B-LOC", "I-PER", "I-PER"]
    assert entities(labels) == {("PER", 0, 2), ("LOC", 3, 4), ("LOC", 4, 5), ("PER", 5, 7)}
    assert entities(["S-A", "B-A", "E-A", "I-A"]) == {("A", 0, 1), ("A", 1, 3), ("A", 3, 4)}
    assert names_entities(["O", "B-A", "I-A"]) and not names_entities(["O", "COMMA"]) and not names_entities(["O"])
    scores = of_entities([["B-A", "I-A", "O"], ["B-A"]], [["B-A", "O", "O"], ["B-A"]])
    assert scores == {"precision": 0.5, "recall": 0.5, "f1": 0.5}


@pytest.mark.full
def test_entities_are_those_of_seqeval():
    seqeval = pytest.importorskip("seqeval.metrics", reason="seqeval is no dependency: entities.py counts as it does")
    labels = ["O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in ("A", "B"))]
    random = np.random.default_rng(0)
    for names in (labels, labels[:5]):
        texts = [[[str(x) for x in random.choice(names, 1 + n % 9)] for n in range(400)] for _ in range(2)]
        texts[1] = [theirs[:1] * len(ours) for ours, theirs in zip(*texts, strict=True)]
        for number, ours in enumerate(texts[0]):
            if number % 2:
                texts[1][number] = [*ours[:-1], str(random.choice(names))]
        scores = of_entities(*texts)
        wanted = (seqeval.precision_score, seqeval.recall_score, seqeval.f1_score)
        assert [scores[key] for key in ("precision", "recall", "f1")] == pytest.approx(
            [score(texts[1], texts[0]) for score in wanted], abs=1e-12
        )


@pytest.fixture
def tokenizer(tmp_path):
    make_tokenizer(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def test_first_tokens_of_words(tokenizer):
    words = ["The", "quick", "§x", "ships"]
    made = WordTokenizer(tokenizer, 64, "right")(words, Counts())
    assert made is not None
    text = tokenizer.convert_ids_to_tokens(made.tokens.ids.tolist())
    assert [text[at] for at in made.first] == ["T", "Ġquick", "Ġ", "Ġships"]
    assert tokenizer.decode(made.tokens.ids) == " ".join(words)
    counts = Counts()
    cut = WordTokenizer(tokenizer, 4, "right")(words, counts)
    assert cut is not None
    assert counts.truncated == 1 and cut.word.tolist() == made.word[:4].tolist()


@pytest.mark.full
@pytest.mark.parametrize("kind", ["byte-level, a space before each word", "WordPiece"])
def test_words_have_the_tokens_that_upstream_gives_them(tokenizer, tmp_path, kind):
    if kind == "WordPiece":
        if not MINILM.is_dir():
            pytest.skip("no tokenizer: python -m tools.minilm")
        tokenizer = AutoTokenizer.from_pretrained(MINILM)
    else:
        state = json.loads((tmp_path / "tokenizer.json").read_text())
        state["pre_tokenizer"]["add_prefix_space"] = True
        (tmp_path / "tokenizer.json").write_text(json.dumps(state))
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for words in ([*sentence(3, 7).split(), "Straße!", "don't", "§", "naïve"], ["U.S.", "B-52s", "a"]):
        made = WordTokenizer(tokenizer, 64, "right")(words, Counts())
        assert made is not None
        wanted = tokenizer(words, is_split_into_words=True)
        assert made.tokens.ids.tolist() == wanted["input_ids"]
        assert made.word.tolist() == [NO_WORD if word is None else word for word in wanted.word_ids()]


BAD = {
    "no labels": ({"tokens": ["a"]}, "no 'labels'"),
    "lengths differ": ({"tokens": ["a", "b"], "labels": ["O"]}, "2 'tokens' but 1 'labels'"),
    "unknown label": ({"tokens": ["a"], "labels": ["X"]}, "unknown label 'X'"),
    "out of range": ({"tokens": ["a"], "labels": [2]}, "out of range"),
    "no list": ({"tokens": "a b", "labels": ["O"]}, "'tokens' is no list but str"),
    "empty token": ({"tokens": ["a", " "], "labels": ["O", "O"]}, "token 2 of 2 is empty"),
    "a list in a list": ({"tokens": ["a"], "labels": [["O"]]}, "expected text, got list"),
}


def test_rows_that_cannot_be_labelled_are_named(tokenizer):
    settings = ObjectiveSettings(
        name="token_classification", labels=["O", "B-A"], problem_type="single_label_classification"
    )
    encoder = build_objective(settings).encoder(DataSettings(), tokenizer, LlamaConfig())
    assert encoder is not None
    rows = [(0, Row(f"rows.jsonl, line {n}", row)) for n, (row, _) in enumerate(BAD.values())]
    for (_, where, problem), (_, words) in zip(encoder.encode(rows), BAD.values(), strict=True):
        assert words in str(problem), (where, problem)
    fine = Row("rows.jsonl, line 9", {"tokens": ["quick", "fox", "home"], "labels": [1, None, "O"]})
    ((_, _, stored),) = encoder.encode([(0, fine)])
    assert isinstance(stored, Stored)
    assert [label for label in stored.items[0]["labels"] if label != -100] == [1, 0]


def test_masks_are_drawn_from_seed_position_and_row():
    word = np.array([-1, *np.repeat(np.arange(300), 3), -1], dtype=np.int32)
    ids = np.arange(len(word), dtype=np.int32)
    masking = Masking(0.15, False, mask=5000, num_ids=4000, pad=0, seed=3)
    read, labels = masking.draw(ids, word, 7, 11)
    chosen = np.flatnonzero(labels != -100)
    assert len(chosen) == masking.count(word) == 135 and (labels[chosen] == ids[chosen]).all()
    assert (np.delete(read, chosen) == np.delete(ids, chosen)).all() and not {0, len(word) - 1} & set(chosen.tolist())
    assert [part.tolist() for part in masking.draw(ids, word, 7, 11)] == [read.tolist(), labels.tolist()]
    assert labels.tolist() not in [masking.draw(ids, word, *at)[1].tolist() for at in ((8, 11), (7, 12))]
    fates = np.concatenate([np.stack(masking.draw(ids, word, 0, row), 1) for row in range(60)])
    fates = fates[fates[:, 1] != -100]
    masked, kept = (fates[:, 0] == 5000).mean(), (fates[:, 0] == fates[:, 1]).mean()
    assert masked == pytest.approx(0.8, abs=0.02) and kept == pytest.approx(0.1, abs=0.02)


def test_whole_words_are_masked_whole():
    word = np.array([-1, *np.repeat(np.arange(40), np.arange(40) % 4 + 1), -1], dtype=np.int32)
    masking = Masking(0.2, True, mask=1, num_ids=9, pad=0)
    for row in range(20):
        chosen = masking.chosen(word, masking.random(0, row))
        assert 0 < len(chosen) <= masking.count(word)
        assert all(set(np.flatnonzero(word == word[at])) <= set(chosen.tolist()) for at in chosen)
    long = np.array([-1, 0, 0, 0, -1], dtype=np.int32)
    assert masking.chosen(long, masking.random(0, 0)).tolist() == [1, 2, 3]


def test_contrast_and_retrieval():
    draw = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(7, 5, generator=draw), dim=1)
    wanted = []
    for row in range(3):
        similar = [float(vectors[row] @ vectors[3 + other]) / 0.1 for other in range(4)]
        wanted.append(float(np.log(np.exp(similar).sum()) - similar[row]))
    assert losses(Texts(*vectors.split([3, 3, 1])), 0.1).tolist() == pytest.approx(wanted, rel=1e-5)
    first, reciprocal = retrieval(torch.eye(3), torch.eye(3)[[0, 2, 1]])
    assert first == [True, False, False] and reciprocal[0] == 1 and reciprocal[1] == 0.5


def test_pooling(tmp_path):
    hidden = torch.tensor([[[3.0, 4.0], [5.0, 12.0], [9.0, 9.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert pool(hidden, mask, "cls")[0].tolist() == pytest.approx([0.6, 0.8])
    assert pool(hidden, mask, "lasttoken")[0].tolist() == pytest.approx([5 / 13, 12 / 13])
    assert pool(hidden, mask, "mean")[0].tolist() == pytest.approx([1 / 5**0.5, 2 / 5**0.5])
    (tmp_path / "1_Pooling").mkdir()
    assert pooling_of(tmp_path, LlamaConfig()) == "lasttoken"
    file = tmp_path / "1_Pooling/config.json"
    file.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    assert pooling_of(tmp_path, LlamaConfig()) == "cls"
    file.write_text(json.dumps({"pooling_mode": ["mean", "max"]}))
    with pytest.raises(ModelError, match=r"objective\.pooling.*mean \+ max"):
        pooling_of(tmp_path, LlamaConfig())
