"""Ollama's Modelfile: a chat template in Go's language is used only if it writes what the Jinja template writes."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import jinja2
import pytest

from fsdp_qlora.export.ollama import PROBES, SYSTEM, Turns, modelfile, read_turns, with_system

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe \"kind\".<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}<s>{% endif %}<|h|>{{ m.role }}<|/h|>\n\n{{ m.content }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|h|>assistant<|/h|>\n\n{% endif %}"
)
GEMMA = (
    "<bos>{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
    "{% for m in messages %}<t>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ first if loop.first }}{{ m.content }}</t>\n{% endfor %}{% if add_generation_prompt %}<t>model\n{% endif %}"
)
BRACES = "{% for m in messages %}{{ '{{' + m.role + '}}' }}{{ m.content }}\u00a0{% endfor %}"
NUMBERED = "{% for m in messages %}{{ loop.index }}. {{ m.content }}\n{% endfor %}"
TURNED = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"


def rendered(template: str, begin: str = "", system: bool = True) -> Turns | None:
    compiled = jinja2.Environment().from_string(template)
    texts = [
        [compiled.render(messages=[*head, *probe], add_generation_prompt=prompt) for probe in PROBES]
        for head in ((), (SYSTEM,))
        for prompt in (False, True)
    ]
    turns = read_turns(*texts[:2], begin)
    return with_system(turns, *texts[2:], begin) if turns and system else turns


CHAT = [
    {"role": "user", "content": 'a "b" {{c}}'}, {"role": "assistant", "content": "d\n"}, {"role": "user", "content": "e"},
]  # fmt: skip


@pytest.mark.parametrize(
    ("template", "begin", "system"),
    [(CHATML, "", True), (LLAMA3, "<s>", True), (GEMMA, "<bos>", False), (BRACES, "", True)],
)
def test_what_is_read_off_a_template_writes_what_it_writes(template, begin, system):
    turns = rendered(template, begin, system)
    assert turns is not None and ("system" in turns.around) == system
    compiled = jinja2.Environment().from_string(template)
    for messages in (CHAT, CHAT[:1], *([[{"role": "system", "content": "Short."}, *CHAT]] if system else [])):
        expected = compiled.render(messages=messages, add_generation_prompt=True)
        assert begin + turns.render(messages, True) == expected


def test_a_template_that_does_more_is_not_taken():
    assert rendered(NUMBERED) is None and rendered(TURNED) is None
    assert rendered(GEMMA, "<bos>", system=True) is None  # a system message is part of the first question


def test_what_a_text_begins_with_is_written_whether_or_not_there_is_a_system_message():
    turns = rendered(GEMMA, "", system=False)  # no program adds the first token
    assert turns is not None and turns.in_go().startswith("<bos>{{ range")


def test_a_modelfile_names_what_ollama_needs():
    turns = rendered(CHATML)
    text = modelfile("./model-f16.gguf", "./adapter.gguf", turns, ["<|im_end|>", 'a"b'], ["a note"])
    lines = text.splitlines()
    assert lines[:3] == ["# a note", "FROM ./model-f16.gguf", "ADAPTER ./adapter.gguf"]
    assert lines[-2:] == ['PARAMETER stop "<|im_end|>"', 'PARAMETER stop """a"b"""']
    assert text.count('"""') == 4 and 'Be {{ `"` }}kind{{ `"` }}.' in text


GO = """package main
import ("encoding/json"; "os"; "text/template")
type Message struct { Role, Content string }
type Asked struct { Template string; System string; Messages []*Message }
func main() {
	var asked []Asked
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil { panic(err) }
	for _, one := range asked {
		made := template.Must(template.New("").Option("missingkey=zero").Parse(one.Template))
		err := made.Execute(os.Stdout, map[string]any{"System": one.System, "Messages": one.Messages})
		if err != nil { panic(err) }
		os.Stdout.Write([]byte{0})
	}
}
"""


@pytest.mark.full
def test_gos_own_engine_writes_what_jinja_writes(tmp_path: Path):
    if shutil.which("go") is None:
        pytest.skip("Go is not installed (apt-get install golang-go)")
    (tmp_path / "main.go").write_text(GO)
    asked, expected = [], []
    for template, begin, system in (
        (CHATML, "", True),
        (LLAMA3, "<s>", True),
        (GEMMA, "<bos>", False),
        (BRACES, "", True),
    ):
        turns = rendered(template, begin, system)
        assert turns is not None
        compiled = jinja2.Environment().from_string(template)
        heads = [[], [{"role": "system", "content": "Short."}]] if system else [[]]
        for messages in (head + CHAT[:length] for head in heads for length in (1, 3)):
            said = "".join(m["content"] for m in messages if m["role"] == "system")
            asked.append({"template": turns.in_go(), "system": said, "messages": messages})
            expected.append(compiled.render(messages=messages, add_generation_prompt=True).removeprefix(begin))
    done = subprocess.run(
        ["go", "run", "main.go"], input=json.dumps(asked), cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PATH": "/usr/bin:/usr/local/go/bin", "HOME": str(tmp_path), "GOFLAGS": "-mod=mod", "GO111MODULE": "off"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\0")[:-1] == expected
