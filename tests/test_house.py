"""The architecture as rules: what is public, documented, and imported from where."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import nicefast as nf

ROOT = Path(__file__).parent.parent


def modules():
    return [
        importlib.import_module(m.name)
        for m in pkgutil.walk_packages(nf.__path__, "nicefast.")
        if not m.name.startswith(("nicefast.cli", "nicefast.kernels", "nicefast.__main__"))
    ]


def test_kernels_import_only_torch_and_triton():
    standard = {"contextlib", "functools", "itertools", "math", "typing"}
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            for name in names:
                assert name.split(".")[0] in {"torch", "triton", *standard}, (path.name, name)


def test_examples_in_docstrings_run():
    for package in ("safetensors", "sklearn", "matplotlib"):
        pytest.importorskip(package, reason=f"needs {package}")
    attempted = 0
    for module in modules():
        result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
        assert result.failed == 0, module.__name__
        attempted += result.attempted
    assert attempted > 100


def test_public_things_have_docstrings_with_an_example():
    missing = []
    for name in nf.__all__:
        thing = getattr(nf, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            doc = inspect.getdoc(thing) or ""
            if ">>>" not in doc and name != "load":  # save's example loads
                missing.append(name)
    for module in (nf.functional, nf.reference):
        for name, thing in vars(module).items():
            public = inspect.isfunction(thing) and not name.startswith("_")
            if public and thing.__module__ == module.__name__ and not inspect.getdoc(thing):
                missing.append(f"{module.__name__}.{name}")
    assert not missing


PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_of_the_pages_run(page, tmp_path, monkeypatch):
    pytest.importorskip("safetensors", reason="needs safetensors")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert len(blocks) >= (3 if page == "README.md" else 0)
    for block in blocks:
        exec(compile(block, page, "exec"), {})
