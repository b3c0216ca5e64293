"""The README's commands, links, map of the paper and example are true.

python -m pytest -q tests/test_readme.py
"""
import re
import shlex

import pytest

import data
import evaluate
import model
import train
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = {"model.py": model, "data.py": data, "train.py": train, "evaluate.py": evaluate}
PASS_ON = ("ablate.py", "check_data.py", "describe.py", "variants.py")          # flags on

def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]

def commands():
    """[(program, words after it)] of the code in the README that runs a file of ours."""
    code = re.findall(r"```bash\n(.*?)```", README, re.DOTALL) + re.findall(r"`([^`\n]+)`", README)
    found = []
    for line in "\n".join(code).splitlines():
        line = re.sub(r"\$\w+", "", line)               # a variable of the shell
        for program, words in re.findall(r"((?:scripts/|tests/stress/)?\w+\.py)\b([^&|>]*)", line):
            if re.search(rf"(python\S*|torchrun.*) {program}", line):
                found.append((program, shlex.split(words, comments=True)))
    return found

def test_every_command_has_a_program_and_its_flags():
    assert len(commands()) >= 10
    for program, words in commands():
        source = (ROOT / program).read_text(encoding="utf-8")
        if program.endswith(PASS_ON):
            for name in "train.py", "evaluate.py":
                source += (ROOT / name).read_text(encoding="utf-8")
        for word in words:
            if word.startswith("--"):
                flag = re.sub("^--(no-)?", "", word)
                assert f'"--{flag}"' in source, f"README: {program} has no {word}"

@pytest.mark.parametrize("program, get_args", [("train.py", train.get_args),
                                               ("evaluate.py", evaluate.get_args)])
def test_commands_of_training_and_evaluation_are_parsed(program, get_args):
    found = [words for name, words in commands() if name == program]
    assert found
    for words in found:
        if "..." not in words and (program == "train.py" or words):
            get_args(words)                             # it exits if a value is wrong

def test_every_link_leads_somewhere():
    links = re.findall(r"\]\(([^)\s]+)\)", README)
    headings = [re.sub(r"[^\w\s-]", "", heading).lower().replace(" ", "-")
                for heading in re.findall(r"^#+ (.+)$", README, re.MULTILINE)]
    assert len(links) > 5
    for link in links:
        if link.startswith("#"):
            assert link[1:] in headings, link
        elif not link.startswith("http"):
            assert (ROOT / link.split("#")[0]).exists(), link

def test_the_map_of_the_paper_names_what_is_there():
    """A name belongs to the last file that was named."""
    names = set()
    module = model
    table = section("From the paper to the code")
    for name, file in re.findall(r"`([\w.]+)`(?: in (\w+\.py))?", table):
        if name not in MODULES:
            module = MODULES.get(file, module)
            found = module
            for part in name.split("."):
                found = getattr(found, part)
            names.add(name)
    assert names >= {"STDFormer", "Block", "PTM", "DPE", "PTMConv", "CTM", "CPE", "STDM", "SMEM"}

def test_the_example_of_single_modules_runs():
    code = section("Use one module elsewhere").split("```python\n")[1].split("```")[0]
    assert "\nassert " in code                          # what it claims
    exec(code, {})
