"""The shape of the project: public names, arrows between packages, light imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tracer

ROOT = Path(__file__).parents[1]

BASE = ("errors", "files")
# What each part may import of the others (DESIGN.md, "One-way flow"); everything may import the base.
ALLOWED = {
    "trace": set(),
    "tasks": {"trace"},
    "engines": {"trace"},
    "store": {"trace"},
    "agents": {"trace", "engines", "tasks"},
    "export": {"trace", "store"},
    "integrations": {"trace"},
    "replay": {"trace", "engines"},
    "explain": {"trace", "engines", "replay", "store"},
    "console": {"trace", "engines"},
    "doctor": {"engines", "store"},
    "token_texts": {"trace", "engines"},
    "demo": {"trace", "engines", "agents", "store", "tasks", "console"},
    "commands": {"trace", "engines", "store", "agents", "console", "explain", "replay"},
    "jobs": {"trace", "engines", "store", "agents", "explain", "console"},
    "cli": {"trace", "engines", "store", "export", "commands", "console", "demo", "doctor", "ui"},
}

# What the app may import, all of it light.
PUBLIC = ("trace", "store", "errors", "jobs", "doctor", "token_texts")
LIGHT = {"tracer.explain.methods", "tracer.explain.citations", "tracer.explain.cited"}


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def test_arrows_between_packages_point_one_way() -> None:
    wrong: list[str] = []
    for path in sorted((ROOT / "tracer").rglob("*.py")):
        part = path.relative_to(ROOT / "tracer").parts[0].removesuffix(".py")
        if part in ("__init__", "__main__", *BASE):
            continue
        for name in imports(path):
            root, _, rest = name.partition(".")
            target = rest.split(".")[0] if root == "tracer" else root if root == "ui" else None
            if target and target not in (*BASE, part) and target not in ALLOWED[part]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_the_trace_knows_no_model_library() -> None:
    for path in (ROOT / "tracer" / "trace").rglob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & {"torch", "transformers", "langchain", "langchain_core", "vllm", "streamlit"}, path


def test_the_app_imports_no_torch_and_only_what_is_public() -> None:
    for path in (ROOT / "ui").rglob("*.py"):
        for name in imports(path):
            assert name.split(".")[0] not in ("torch", "transformers", "vllm"), path
            if name.startswith("tracer.") and name not in LIGHT:
                assert name.split(".")[1] in PUBLIC, f"{path} imports {name}"


def test_public_names_are_sorted_and_there() -> None:
    assert tracer.__all__ == sorted(tracer.__all__)
    for name in tracer.__all__:
        assert getattr(tracer, name).__module__.startswith("tracer")
    with pytest.raises(AttributeError, match="nothing"):
        tracer.nothing  # noqa: B018


@pytest.mark.parametrize(
    "statement", ["import tracer", "import tracer.cli", "import tracer.jobs", "from tracer import Trace, Store, record"]
)
def test_imports_are_light(statement: str) -> None:
    heavy = ["torch", "transformers", "langchain", "langchain_core", "streamlit", "vllm"]
    code = f"{statement}\nimport sys\nprint([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_app_loads_no_model_library() -> None:
    code = (
        "import importlib, pathlib, sys\n"
        "for path in sorted(pathlib.Path('ui/app_pages').glob('*.py')):\n"
        "    importlib.import_module(f'ui.app_pages.{path.stem}')\n"
        "print([name for name in ('torch', 'transformers', 'vllm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_no_file_of_ours_uses_what_is_forbidden() -> None:
    forbidden = {"pickle", "dill", "cloudpickle", "shelve", "marshal"}
    for folder in ("tracer", "ui", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert not {name.split(".")[0] for name in imports(path)} & forbidden, path
            assert "trust_remote_code=True" not in text, path
