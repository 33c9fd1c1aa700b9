"""Metrics of predictions, by kept libraries (scikit-learn, rouge-score, sacrebleu, jiwer), imported where used."""

from __future__ import annotations

from collections.abc import Sequence


def of_labels(predicted: Sequence[Sequence[int]], wanted: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return accuracy and macro-averaged F1 of one label for each row."""
    from sklearn.metrics import accuracy_score, f1_score

    ours, theirs = [int(row[0]) for row in predicted], [int(row[0]) for row in wanted]
    return {
        "accuracy": float(accuracy_score(theirs, ours)),
        "f1": float(f1_score(theirs, ours, average="macro", zero_division=0)),  # type: ignore[arg-type]
    }


def of_sets(predicted: Sequence[Sequence[int]], wanted: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return the share of rows with exactly the right labels, and micro-averaged F1 of all labels."""
    from sklearn.metrics import accuracy_score, f1_score

    theirs = [[int(value) for value in row] for row in wanted]
    return {
        "accuracy": float(accuracy_score(theirs, list(predicted))),
        "f1": float(f1_score(theirs, list(predicted), average="micro", zero_division=0)),  # type: ignore[arg-type]
    }


def of_numbers(predicted: Sequence[Sequence[float]], wanted: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return the mean squared error and R squared."""
    from sklearn.metrics import mean_squared_error, r2_score

    ours, theirs = [row[0] for row in predicted], [row[0] for row in wanted]
    return {"mse": float(mean_squared_error(theirs, ours)), "r2": float(r2_score(theirs, ours))}


def of_speech(written: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Return word and character error rates of texts as they are, and of their words alone.

    A rate is substitutions, deletions and insertions over the words, or characters, that were wanted, of all texts
    together; 0 is best, and it may exceed 1. For ``wer_words``, texts are in lower case and without punctuation, as
    Whisper's own ``BasicTextNormalizer`` makes them.
    """
    import jiwer
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    plain = BasicTextNormalizer()
    ours, theirs = ([plain(text).strip() for text in texts] for texts in (written, wanted))
    return {
        "wer": float(jiwer.wer(list(wanted), list(written))),
        "wer_words": float(jiwer.wer(theirs, ours)),
        "cer": float(jiwer.cer(list(wanted), list(written))),
    }


def of_texts(written: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Return the mean F-measures of ROUGE-1, ROUGE-2 and ROUGE-L (0 to 1), and BLEU of the whole corpus (0 to 100)."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds, use_stemmer=True)
    scores = [scorer.score(right, ours) for ours, right in zip(written, wanted, strict=True)]
    means = {kind: sum(score[kind].fmeasure for score in scores) / len(scores) for kind in kinds}
    return means | {"bleu": float(sacrebleu.corpus_bleu(list(written), [list(wanted)]).score)}
