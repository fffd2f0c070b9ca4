"""The walls of the house: who may import whom."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

BELOW_TRAIN = {"configurator", "tokenizer", "dataloader", "distributed", "optimizers", "checkpoint",
               "metrics", "model", "options", "weights"}
ALLOWED = {
    "configurator": set(),
    "tokenizer": set(),
    "corpus": {"configurator", "tokenizer"},  # for what the prepare scripts share
    "model": set(),
    "options": {"configurator", "model"},
    "weights": {"checkpoint", "model", "options"},
    "sophia": set(),
    "dataloader": set(),
    "distributed": set(),
    "optimizers": {"configurator", "options", "sophia"},
    "checkpoint": {"distributed"},
    "metrics": set(),
    "dry_run": {"configurator", "dataloader", "metrics", "model", "optimizers", "options"},
    "train": BELOW_TRAIN | {"dry_run"},
    "bench": BELOW_TRAIN | {"sophia", "train"},
    "sample": {"configurator", "checkpoint", "model", "tokenizer", "distributed", "weights"},
    "superglue": {"configurator", "checkpoint", "model", "tokenizer", "distributed", "weights"},
    "huggingface": {"configurator", "checkpoint", "model", "options", "tokenizer", "weights"},
}
WITHOUT_TORCH = {"configurator", "tokenizer", "corpus"}
TORCH_ALONE = {"model", "sophia"}
# Missing packages must not stop training: these may only be imported where they are used.
LAZY = {"tiktoken", "datasets", "wandb", "transformers", "matplotlib", "pyarrow"}
SHADOWS = {"config", "data", "evaluate", "types", "logging", "random", "profile"}


def imports(path: Path) -> list[tuple[str, int, bool]]:
    """(top-level package, line, whether at module level) of every import in a file."""
    found = []
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [(name.partition(".")[0], node.lineno, node in tree.body) for name in names]
    return found


def own_modules() -> dict[str, Path]:
    return {path.stem: path for path in ROOT.glob("*.py")}


@pytest.mark.parametrize("module", sorted(own_modules()))
def test_each_module_imports_only_what_its_room_allows(module):
    assert module in ALLOWED, f"{module}.py has no row in the import table"
    for name, line, top_level in imports(own_modules()[module]):
        where = f"{module}.py:{line} imports {name}"
        if name in own_modules():
            assert name in ALLOWED[module], where
        elif module in TORCH_ALONE:
            assert name == "torch" or name in sys.stdlib_module_names, where
        assert not (module in WITHOUT_TORCH and name == "torch"), where
        assert not (name in LAZY and top_level), f"{where} at module level"


def test_no_root_file_shadows_a_folder_or_a_package():
    assert not SHADOWS & set(own_modules())
    assert not list(ROOT.glob("config/__init__.py")) + list(ROOT.glob("data/**/__init__.py"))


def test_the_loop_knows_no_optimizer_by_name():
    text = (ROOT / "train.py").read_text().lower()
    for name in ("adamw", "lion", "sophia(", "gauss_newton", "import sophia"):
        assert name not in text


def test_the_readme_names_every_root_file():
    readme = (ROOT / "README.md").read_text()
    assert not [f"{m}.py" for m in own_modules() if f"{m}.py" not in readme]
