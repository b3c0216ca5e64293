"""The figure carries names that exist, and what docs/walkthrough.md shows is what comes out: its code runs, its shapes and lines are true.

    python -m pytest tests/test_docs.py
"""
import importlib.util
import re
import sys
import xml.etree.ElementTree as ET

import pytest
import torch

import model
from conftest import ROOT

SVG = "{http://www.w3.org/2000/svg}"


# ----------------------------------------------------------------------------------------------------
# docs/architecture.svg
# ----------------------------------------------------------------------------------------------------


def architecture():
    spec = importlib.util.spec_from_file_location("architecture", ROOT / "scripts" / "architecture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def groups():
    root = ET.parse(ROOT / "docs" / "architecture.svg").getroot()
    return {g.get("id"): g for g in root.iter(SVG + "g")}


def names(group):
    """What is set as code in the boxes of a group."""
    return {e.text for e in group.iter() if e.tag in (SVG + "text", SVG + "tspan") and "code" in (e.get("class") or "").split()}


def test_figure_is_the_one_that_the_script_draws():
    drawn = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    assert drawn == architecture().draw(), "docs/architecture.svg is old: python scripts/architecture.py"


def test_figure_names_exist_in_the_model():
    with torch.device("meta"):
        whole = model.build_model("b16")
    assert set(groups()) == {"STDFormer", "PTM", "CTM", "STDM", "SMEM"}
    for owner, group in groups().items():
        found = names(group)
        part = next(m for m in whole.modules() if type(m).__name__ == owner)
        assert owner in found and len(found) >= 4
        unknown = {name for name in found if not isinstance(getattr(model, name, None), type) and not hasattr(part, name)}
        assert not unknown, f"in the box of {owner}: {unknown} is neither a class of model.py nor a part of {owner}"


def test_figure_shows_every_module_where_b16_has_it():
    c = model.ModelConfig(**model.MODELS["b16"])
    cells = [e.text for e in groups()["STDFormer"].iter(SVG + "text") if e.get("font-size") == "11"]
    want = {"Block": c.depth - len(c.ptm_layers), "PTM": len(c.ptm_layers), "CTM": c.depth, "STDM": len(c.stdm_layers), "SMEM": len(c.smem_layers)}
    assert {name: cells.count(name) for name in want} == want


def test_figure_stands_alone_in_light_and_dark():
    """An image in a README may load nothing; it has its own background, and both sets of colours."""
    text = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    assert not re.search(r"(?:href|src|url\(|@import|foreignObject|<script)", text)
    assert "@media (prefers-color-scheme: dark)" in text
    root = ET.fromstring(text)
    first = root.find(SVG + "rect")
    assert first.get("class") == "paper" and float(first.get("width")) >= float(root.get("width")) - 1
