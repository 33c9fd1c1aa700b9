"""What lies beside data in a folder is not learned, and what `datasets` saved is read as `datasets` means it."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset, DatasetDict, Image

from fsdp_qlora.data.sources import expand, hub_parts, hub_refusal, is_file, not_read, read_source, streamed_rows
from fsdp_qlora.errors import DataError

ROW = json.dumps({"text": "a row"}) + "\n"


def _write(folder, *names, text=ROW):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def _names(folder, source=None):
    return [file.removeprefix(f"{folder}/") for file in expand(str(source or folder))]


BESIDE = [
    "README.md", "readme.txt", "README_zh.md", "README.de.md", "LICENSE.txt", "LICENCE.md", "LICENSE-MIT.txt",
    "license.apache2.txt", "COPYING.txt", "NOTICE.md", "CHANGELOG.md", "CONTRIBUTING.md", "CODE_OF_CONDUCT.md",
    "CITATION.md", "dataset_card.md", "DATASHEET.md", "requirements.txt", "requirements-dev.txt", "dev_requirements.txt",
    "sha256sums.txt", "dataset_info.json", "dataset_infos.json", "state.json", "package-lock.json", "croissant.json",
    "config.json", "tokenizer.json", "vocab.txt", ".hidden.jsonl", "._train.jsonl", ".DS_Store", "desktop.ini",
    "~$train.csv", ".ipynb_checkpoints/train-checkpoint.jsonl", ".git/config.json", ".cache/huggingface/x.json",
    "__MACOSX/._train.jsonl", "__MACOSX/train.jsonl", "__pycache__/x.json", "node_modules/a/package.json",
    "part/_delta_log/0001.json", "x.incomplete/part.parquet", "data/cache-0123456789abcdef.arrow", "train.jsonl.lock",
    "my.egg-info/SOURCES.txt", "data/.part-0.parquet.crc", "_SUCCESS",
]  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("data", ["data/rows.jsonl", "corpus.txt", "notes.md"])
def test_what_lies_beside_data_is_not_data(tmp_path, name, data):
    _write(tmp_path, data, name)
    assert _names(tmp_path) == [data]
    assert _names(tmp_path, tmp_path / "**" / "*") == [data]


@pytest.mark.parametrize("name", [
    "license_plates.txt", "reading.txt", "history.txt", "news.md", "citations.txt", "notice-board.txt", "stateful.json",
])  # fmt: skip
def test_names_that_only_resemble_them_are_data(tmp_path, name):
    _write(tmp_path, name)
    assert _names(tmp_path) == [name]


def test_a_cloned_repository_gives_its_rows_alone(tmp_path):
    _write(
        tmp_path, "README.md", "LICENSE.txt", "requirements.txt", "docs/how_it_was_made.md", text="do not train on me\n"
    )
    _write(tmp_path, ".ipynb_checkpoints/train-checkpoint.jsonl", text=json.dumps({"text": "an old copy"}) + "\n")
    _write(tmp_path, "data/train.jsonl")
    assert [row.values for row in read_source(str(tmp_path))] == [{"text": "a row"}]


@pytest.mark.parametrize("rows", ["rows.json", "rows.csv", "rows.parquet", "rows.jsonl.gz"])
def test_texts_are_never_mixed_with_rows(tmp_path, rows):
    _write(tmp_path, rows, "story.txt", "more/story.md.gz")
    assert _names(tmp_path) == [rows]
    assert _names(tmp_path, tmp_path / "*") == [rows]
    (tmp_path / rows).unlink()
    assert _names(tmp_path) == ["more/story.md.gz", "story.txt"]


def test_a_file_that_is_named_is_read_whatever_its_name(tmp_path):
    _write(tmp_path, "README.md", ".hidden.jsonl", "state.json")
    assert _names(tmp_path, tmp_path / "README.md") == ["README.md"]
    assert _names(tmp_path, tmp_path / "*.md") == ["README.md"]
    assert _names(tmp_path, tmp_path / ".hidden.jsonl") == [".hidden.jsonl"]


def test_a_folder_without_data_says_so(tmp_path):
    _write(tmp_path, "README.md", ".hidden.jsonl")
    with pytest.raises(DataError, match="holds no data"):
        expand(str(tmp_path))


@pytest.mark.parametrize(("names", "train", "test"), [
    (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], [0], [1]),
    (["train.jsonl", "dev.jsonl", "test.jsonl"], [0], [2]),
    (["train/0.jsonl", "train/1.jsonl", "test/0.jsonl", "validation/0.jsonl"], [0, 1], [2]),
    (["rows.train.jsonl", "eval_rows.jsonl", "extra.jsonl"], [2, 0], [1]),
])  # fmt: skip
def test_held_out_files_are_not_trained_on(tmp_path, names, train, test):
    _write(tmp_path, *names)
    assert _names(tmp_path) == [names[i] for i in train]
    assert _names(tmp_path, f"{tmp_path}:test") == [names[i] for i in test]


def test_without_a_training_split_all_files_are_data(tmp_path):
    _write(tmp_path, "test_cases.jsonl", "more.jsonl")
    assert _names(tmp_path) == ["more.jsonl", "test_cases.jsonl"]
    with pytest.raises(DataError, match="no split 'train'; the splits found are: test"):
        expand(f"{tmp_path}:train")


def _saved(count, name):
    return Dataset.from_list([{"text": f"{name} {n}"} for n in range(count)])


def test_what_datasets_saved_is_known_as_such(tmp_path):
    _saved(12, "row").save_to_disk(str(tmp_path / "one"), num_shards=11)
    _write(tmp_path / "one", "data-99999-of-99999.arrow", "notes.txt", text="left over by an older save")
    texts = [(row.values or {})["text"] for row in read_source(str(tmp_path / "one"))]
    assert texts == [f"row {n}" for n in range(12)]  # also in its order: data-00010 comes after data-00009


def test_of_saved_splits_one_is_read(tmp_path):
    folder = tmp_path / "both"
    DatasetDict(train=_saved(3, "train"), test=_saved(2, "test"), odd=_saved(1, "odd")).save_to_disk(str(folder))
    for source, count, name in ((f"{folder}", 3, "train"), (f"{folder}:test", 2, "test"), (f"{folder}:odd", 1, "odd")):
        assert is_file(source)
        assert [row.values for row in read_source(source)] == [{"text": f"{name} {n}"} for n in range(count)]
    with pytest.raises(DataError, match="with the splits train, test, odd; 'dev' is not one of them"):
        expand(f"{folder}:dev")
    (folder / "test" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00000-of-00001.arrow is missing, although .*state.json names it"):
        expand(f"{folder}:test")


def test_splits_without_a_training_split_are_named(tmp_path):
    DatasetDict(validation=_saved(1, "a"), test=_saved(1, "b")).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(
        DataError, match=r"splits validation, test; 'train' is not one of them\. Select one with .*:SPLIT"
    ):
        expand(str(tmp_path / "d"))


@pytest.mark.parametrize("state", ['{"_data_files": [{"filename": "../../secret.arrow"}]}', "{}", "[]", "{broken"])
def test_a_broken_record_of_datasets_is_refused(tmp_path, state):
    _write(tmp_path, "state.json", text=state)
    _write(tmp_path, "dataset_info.json", text="{}")
    with pytest.raises(DataError, match=r"state\.json"):
        expand(str(tmp_path))


def test_hub_names():
    assert hub_parts("owner/name") == ("owner/name", None, "train")
    assert hub_parts("owner/name:test") == ("owner/name", None, "test")
    assert hub_parts("owner/name/main:test") == ("owner/name", "main", "test")
    assert hub_parts("name") == ("name", None, "train")


def test_a_hub_data_set_that_needs_a_configuration_says_how_to_name_one():
    raised = ValueError("Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']")
    said = str(hub_refusal("openai/gsm8k:test", raised))
    assert "openai/gsm8k/CONFIG:test" in said and "['main', 'socratic']" in said
    assert "configuration main," in str(hub_refusal("openai/gsm8k/main", ConnectionError("no network")))


def test_what_could_be_data_and_is_not_read_is_said(tmp_path):
    _write(tmp_path, "rows.jsonl", "README.md", ".hidden.jsonl", "notes.txt", *(f"{n}.md" for n in range(4)))
    (line,) = not_read([str(tmp_path), "owner/name", str(tmp_path / "rows.jsonl"), "s3://bucket/rows"])
    assert "skipped 0.md, 1.md, 2.md and 2 more (" in line and str(tmp_path) in line
    _write(tmp_path / "split", "train.jsonl", "test.jsonl")
    assert not_read([f"{tmp_path}/split"])[0].count("skipped test.jsonl (") == 1
    assert not_read([f"{tmp_path}/split:test"])[0].count("skipped train.jsonl (") == 1
    assert not_read([f"{tmp_path}/split", f"{tmp_path}/split:test"]) == []
    _write(tmp_path / "clean", "a.jsonl", "b.jsonl", "LICENSE.txt")
    assert not_read([f"{tmp_path}/clean"]) == []


def test_images_of_a_streamed_data_set_are_not_decoded():
    columns = {"text": ["a", "b"], "scan": [b"no image", None], "extra": [{"a": 1}, {"b": 2}]}
    rows = Dataset.from_dict(columns).cast_column("scan", Image()).to_iterable_dataset()
    with pytest.raises(Exception, match="image"):
        list(rows)
    found = [row.values for row in streamed_rows(rows, "owner/name")]
    assert found == [{"text": "a", "extra": {"a": 1}}, {"text": "b", "extra": {"b": 2}}]


@pytest.mark.parametrize(("content", "said"), [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "is a Git LFS pointer, not the file itself; `git lfs pull`"),
    ("prompt,completion\na,b\n".encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet", "rows.txt"])
def test_a_file_that_is_not_what_it_looks_like_says_so(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        list(read_source(str(tmp_path)))


def test_a_json_file_may_be_one_object_over_many_lines(tmp_path):
    (tmp_path / "row.json").write_text(json.dumps({"text": "a\nb", "more": {"c": [1]}}, indent=2))
    (row,) = read_source(str(tmp_path / "row.json"))
    assert row.values == {"text": "a\nb", "more": {"c": [1]}}


CARDS = {
    "patterns by split": "data_files: {train: 'a/*.jsonl', test: b.jsonl}",
    "a list of splits": "data_files: [{split: train, path: a/*.jsonl}, {split: test, path: [b.jsonl]}]",
    "below a folder": "data_dir: a\n    data_files: [{split: train, path: '*.jsonl'}]",
    "one pattern": "data_files: a/**/*.jsonl",
}


@pytest.mark.parametrize("card", CARDS)
def test_a_card_that_lists_files_is_taken_at_its_word(tmp_path, card):
    _write(tmp_path, "a/one.jsonl", "a/two.jsonl", "b.jsonl", "train.jsonl", "notes.txt")
    text = f"---\nlicense: mit\nconfigs:\n  - config_name: main\n    {CARDS[card]}\n---\n# Data\n"
    (tmp_path / "README.md").write_text(text)
    assert _names(tmp_path) == _names(tmp_path, f"{tmp_path}:train") == ["a/one.jsonl", "a/two.jsonl"]
    if "test" in CARDS[card]:
        assert _names(tmp_path, f"{tmp_path}:test") == ["b.jsonl"]
    with pytest.raises(DataError, match=r"lists the splits train.*; 'odd' is not one of them"):
        expand(f"{tmp_path}:odd")


def test_a_card_with_several_configurations_names_them(tmp_path):
    _write(tmp_path, "a.jsonl", "b.jsonl")
    configs = "configs:\n- config_name: first\n  data_files: a.jsonl\n- config_name: second\n  data_files: b.jsonl\n"
    (tmp_path / "README.md").write_text(f"---\n{configs}---\n")
    with pytest.raises(DataError, match=r"several configurations: first, second\. Name the files of one, .*/a\.jsonl"):
        expand(str(tmp_path))
    (tmp_path / "README.md").write_text(f"---\n{configs}  default: true\n---\n")
    assert _names(tmp_path) == ["b.jsonl"]


@pytest.mark.parametrize("card", [
    "no front matter", "---\n: [broken\n---\n", "---\nconfigs: 3\n---\n", "---\nconfigs: [1, {config_name: x}]\n---\n",
    "---\n- a list\n---\n",
])  # fmt: skip
def test_a_card_that_lists_nothing_changes_nothing(tmp_path, card):
    _write(tmp_path, "a.jsonl")
    (tmp_path / "README.md").write_text(card)
    assert _names(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize("pattern", ["gone.jsonl", "../out.jsonl", "/etc/hosts.txt", "README.rst"])
def test_a_card_lists_only_files_that_are_there(tmp_path, pattern):
    _write(tmp_path, "out.jsonl", "repo/a.jsonl", "repo/README.rst")
    (tmp_path / "repo" / "README.md").write_text(f"---\nconfigs:\n- data_files: {pattern}\n---\n")
    with pytest.raises(DataError, match="but there is no such data file"):
        expand(str(tmp_path / "repo"))


SECRET = '{"text": "CANARY"}\n'


@pytest.fixture
def beside(tmp_path):
    """A file outside of the folder of data, and a folder with it and a link back into itself."""
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "rows.jsonl").write_text(SECRET)
    _write(tmp_path / "data", "rows.jsonl", text='{"text": "good"}')
    return tmp_path


def _texts(source):
    return [(row.values or {})["text"] for row in read_source(str(source))]


@pytest.mark.parametrize("link", ["link.jsonl", "a/link.jsonl", "link"])
@pytest.mark.parametrize("source", ["data", "data/*.jsonl", "data/**/*.jsonl", "data/**"])
def test_links_that_leave_a_folder_are_passed_over_and_said(beside, link, source):
    """S13: a file, and a folder that a pattern with ``**`` would go into."""
    (beside / "data" / "a").mkdir()
    target = beside / "private" / ("rows.jsonl" if "." in link else "")
    (beside / "data" / link).symlink_to(target)
    assert _texts(beside / source) == ["good"]
    said = [line for line in not_read([str(beside / source)]) if "links" in line]
    found = {"link": "**" in source, "link.jsonl": True, "a/link.jsonl": source != "data/*.jsonl"}[link]
    assert len(said) == found and (not found or f"skipped {beside / 'data' / link}" in said[0])


@pytest.mark.parametrize("how", ["by a folder of `datasets`", "by a card", "by a split", "alone"])
def test_links_that_are_listed_leave_a_folder_no_more_than_others(beside, how):
    """S13"""
    folder = beside / "data"
    (folder / "rows.jsonl").unlink()
    (folder / "train.jsonl").symlink_to(beside / "private" / "rows.jsonl")
    source = str(folder)
    if how == "by a card":
        (folder / "README.md").write_text("---\nconfigs:\n- data_files: train.jsonl\n---\n")
    elif how == "by a split":
        source += ":train"
    elif how == "by a folder of `datasets`":
        (folder / "data.jsonl").symlink_to(beside / "private" / "rows.jsonl")
        (folder / "state.json").write_text('{"_data_files": [{"filename": "data.jsonl"}]}')
        (folder / "dataset_info.json").write_text("{}")
    with pytest.raises(DataError, match=r"holds only links to files outside it .* name those files themselves"):
        expand(source)


def test_links_within_a_folder_the_hubs_cache_and_a_file_that_is_named_are_followed(beside):
    (beside / "data" / "again.jsonl").symlink_to("rows.jsonl")
    (beside / "whole").symlink_to(beside / "data")
    assert _texts(beside / "data") == _texts(beside / "whole") == ["good", "good"]
    (beside / "named.jsonl").symlink_to(beside / "private" / "rows.jsonl")
    assert _texts(beside / "named.jsonl") == ["CANARY"], "who names it wants it"
    repository = beside / "hub" / "datasets--a--b"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / "1234").write_text('{"text": "blob"}')
    (repository / "snapshots" / "main").mkdir(parents=True)
    (repository / "snapshots" / "main" / "rows.jsonl").symlink_to("../../blobs/1234")
    (repository / "snapshots" / "main" / "other.jsonl").symlink_to(beside / "private" / "rows.jsonl")
    assert _texts(repository / "snapshots" / "main") == ["blob"]


def test_names_of_files_are_shown_without_what_a_terminal_obeys(tmp_path):
    """S14: whoever made the folder has chosen them."""
    _write(tmp_path, "rows.jsonl", "\x1b[2J\x1b]0;owned\x07.txt", "a\nfsdp-qlora: finished.txt")
    (line,) = not_read([str(tmp_path)])
    assert "\\x1b[2J\\x1b]0;owned\\x07.txt" in line and "a\\nfsdp-qlora: finished.txt" in line
    assert not {"\x1b", "\x07", "\n"} & set(line)
