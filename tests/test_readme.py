"""README.md: its Python runs, its commands and files exist, its options are real."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed.launcher import runner

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    (page.name, language, block)
    for page in PAGES
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)
]
COMMANDS = sorted(
    {
        (name, command.split("#")[0].strip())
        for name, language, block in BLOCKS
        if language in ("", "bash", "sh")
        for command in re.sub(r"\\\n\s*", " ", block).splitlines()
        if re.match(r"(python|deepspeed|make) ", command)
    }
)


@pytest.mark.parametrize(
    "code", [code for page, language, code in BLOCKS if (page, language) == ("README.md", "python")]
)
def test_the_python_runs(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}-{c[:40]}" for page, c in COMMANDS])
def test_the_commands_are_real(page: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every module, sub-command, option and file of ours that a command names."""
    words = command.split()
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
        return
    for word in words:
        if re.match(r"(configs/|assets/|bench/|radllama/|qlora\.json)", word):
            assert (ROOT / word).exists(), word
    asked = [word.split("=")[0] for word in words if word.startswith("--")]
    if words[0] == "deepspeed":  # what stands before the script is the launcher's own
        launcher = Path(str(runner.__file__)).read_text(encoding="utf-8")
        script = words.index("radllama/train.py") if "radllama/train.py" in words else len(words)
        theirs = [word for word in words[:script] if word.startswith("--")]
        assert not [option for option in theirs if f'"{option}"' not in launcher]
        asked = asked[len(theirs) :]
    if words[1] == "-m" or words[0] == "deepspeed":
        name = words[2] if words[1] == "-m" else "radllama.train"
        module = importlib.import_module(name)
        subcommands = "add_subparsers" in Path(str(module.__file__)).read_text(encoding="utf-8")
        for chosen in words[3].split("|") if subcommands else [""]:
            with pytest.raises(SystemExit) as ended:
                module.main([*filter(None, [chosen]), "--help"])
            assert ended.value.code == 0
            printed = capsys.readouterr().out
            assert not [option for option in asked if option not in printed]
