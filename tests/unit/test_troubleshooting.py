"""docs/troubleshooting.md: its messages and keys are those of the code, and messages find its sections."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fsdp_qlora.config.convert import field_types
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.run.exit import guarded
from fsdp_qlora.run.troubleshooting import NOT_OURS, PAGE, SECTIONS, printed, section_of

ROOT = Path(__file__).parents[2]
_FENCE = "```"


def _sections() -> dict[str, str]:
    """Return the page's sections by anchor, as GitHub makes it of a heading."""
    parts = re.split(r"^## (.*)\n", (ROOT / PAGE).read_text(), flags=re.MULTILINE)
    slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in parts[1::2]]
    assert len(set(slugs)) == len(slugs)
    return dict(zip(slugs, parts[2::2], strict=True))


def _quoted(text: str) -> list[str]:
    return re.findall(rf"^{_FENCE}text\n(.*?)\n{_FENCE}$", text, flags=re.MULTILINE | re.DOTALL)


def _code() -> str:
    """Return the code, with the parts of a text that stand on several lines joined."""
    files = [*(ROOT / "fsdp_qlora").rglob("*.py"), *(ROOT / "launch").glob("*.s*")]
    code = "\n".join(file.read_text() for file in files if file.name != "troubleshooting.py")
    return re.sub(r"\"\n\s*f?\"", "", code)


def test_the_page_quotes_the_code_and_messages_find_their_sections():
    code, sections = _code(), _sections()
    for anchor, words in SECTIONS.items():
        assert anchor in sections, anchor
        missing = [w for w in words if w not in code and w not in NOT_OURS]
        assert not missing, missing
        shown = [message for message in _quoted(sections[anchor]) if section_of(message) == anchor]
        assert shown, f"no message that is quoted in {anchor} is about it"
    for anchor, text in sections.items():
        for message in _quoted(text):
            assert section_of(message) in (None, anchor), (anchor, message)
            pieces = [piece for piece in message.split("...") if piece.strip(" .:(")]
            if any(words in message for words in NOT_OURS):
                continue
            said = r"[^\n]*?".join(re.escape(piece) for piece in pieces)
            assert len("".join(pieces)) > 10 and re.search(said, code), f"{anchor}: nothing says {message!r}"


def test_keys_on_the_page_exist():
    known = {name for name, kind in field_types(RunConfig).items()}
    for name, kind in field_types(RunConfig).items():
        if hasattr(kind, "__dataclass_fields__"):
            known |= {f"{name}.{key}" for key in field_types(kind)}
    text = re.sub(rf"{_FENCE}text.*?{_FENCE}", "", (ROOT / PAGE).read_text(), flags=re.DOTALL)
    keys = set(re.findall(r"[`' \[]([a-z][a-z_]*(?:\.[a-z_0-9]+)*)=", text)) - {"once", "to"}
    odd = [key for key in keys if key not in known and not key.startswith("data.columns.")]
    assert len(keys) > 40 and not odd, odd


def test_a_message_names_its_section_on_the_same_line(capsys: pytest.CaptureFixture[str]):
    def full() -> int:
        raise OSError(28, "No space left on device", "/runs/x")

    assert guarded(full) == 74
    assert re.fullmatch(
        rf"fsdp-qlora: .*No space left on device.*free up space\) See {PAGE}#no-space-left\n", capsys.readouterr().err
    )
    assert printed("adapter: x has no adapter_config.json: it is not a PEFT adapter folder").endswith(
        f"folder. See {PAGE}#the-adapter-does-not-fit"
    )
    assert printed("lora.r: must be above 0.") == "lora.r: must be above 0."
