"""The shipped method files: well-formed, documented, named as their files, and unknown to the code."""

import pathlib
import re

import longspan
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "deploy" / "methods").glob("*.txtpb"))
# Dense attention is the one method that the code itself can name: it is what roles fall back to.
KNOWN_TO_THE_CODE = {"dense"}


def test_there_are_methods():
    assert len(FILES) >= 10


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file(path):
    method = longspan.load_method(path)
    assert method.name == path.stem
    assert method.description
    assert method.branches
    assert all(branch.name for branch in method.branches)
    text = path.read_text()
    assert text.startswith("# ")
    assert "suits" in text.lower() or "for models trained" in text.lower() or path.stem == "dense"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_documented(path):
    assert f"`{path.stem}`" in (ROOT / "docs" / "methods.md").read_text()


def test_a_misspelt_field_is_an_error():
    with pytest.raises(Exception):
        longspan.parse_method('name: "x" branchs { name: "y" }')


@pytest.mark.parametrize("folder", ["kernels", "comm", "worker", "coordinator"])
def test_the_code_names_no_method(folder):
    names = {path.stem for path in FILES} - KNOWN_TO_THE_CODE
    literal = re.compile('"(' + "|".join(sorted(names)) + ')"')
    for source in (ROOT / folder).rglob("*"):
        if source.suffix in {".h", ".cc", ".cu"}:
            found = literal.search(source.read_text())
            assert not found, f"{source} names {found.group(0)}"
