"""The walls of the house: who may import whom."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "nanosophia"

# Modules at the root, then those of the package, each with the modules of ours it may import.
ALLOWED = {
    "model": set(),
    "sophia": set(),
    "train": {"model", "checkpoint", "chunked_loss", "command", "configurator", "dataloader",
              "distributed", "dry_run", "estimators", "evaluation", "fitting", "guard", "hellaswag",
              "loss_scale", "memory", "metrics", "optimizer_state", "optimizers", "options",
              "packages", "precision", "resume", "folder_lock", "saver", "sharded_init", "startup",
              "summary", "trackers", "weights"},
    "command": {"configurator"},
    "startup": {"command", "configurator", "options"},
    "bench": {"model", "command", "configurator", "dataloader", "distributed", "dry_run", "files",
              "metrics",
              "optimizers", "options", "resume", "startup", "tokenizer", "train"},
    "sample": {"model", "checkpoint", "command", "configurator", "distributed", "files",
               "generate", "precision", "startup", "tokenizer", "weights"},
    "configurator": set(),
    "characters": {"configurator", "files"},
    "tokenizer": {"characters", "files"},
    "dataloader": {"characters", "configurator", "files", "schemas", "tokenizer"},
    "distributed": {"configurator"},
    "metrics": {"distributed", "files", "schemas", "trackers"},
    "trackers": {"files", "options"},
    "corpus": {"characters", "configurator", "documents", "encoding", "files", "folder_lock",
               "schemas", "tokenizer"},
    "encoding": {"documents", "tokenizer"},
    "schemas": {"files"},
    "options": {"model", "configurator"},
    "checkpoint": {"configurator", "distributed", "files", "optimizer_state", "schemas",
                   "tokenizer"},
    "optimizer_state": {"configurator", "distributed"},
    "packages": {"configurator", "optimizer_state"},
    "transformers_models": {"model", "checkpoint"},
    "weights": {"model", "checkpoint", "configurator", "files", "options", "schemas", "tokenizer",
                "transformers_models"},
    "optimizers": {"sophia", "adam_family", "baselines", "configurator", "controlled_gamma",
                   "estimators", "matrix_optimizers", "optimizer_state", "options", "packages",
                   "update_rules"},
    "dry_run": {"model", "command", "configurator", "dataloader", "distributed", "estimators",
                "memory", "metrics", "optimizer_state", "optimizers", "options", "packages",
                "startup", "tokenizer"},
    "hellaswag": {"model", "checkpoint", "command", "configurator", "dataloader", "distributed",
                  "files", "options", "schemas", "startup", "tokenizer", "weights"},
    "superglue": {"model", "checkpoint", "command", "configurator", "distributed", "files",
                  "generate", "schemas", "startup", "tokenizer", "weights"},
    "nanogpt": {"checkpoint", "configurator", "files", "tokenizer", "weights"},
    "huggingface": {"checkpoint", "command", "configurator", "files", "metrics", "nanogpt",
                    "options", "schemas", "startup", "tokenizer", "transformers_models", "weights"},
    "files": set(),
    "chunked_loss": {"model"},
    "generate": {"model", "configurator"},
    "baselines": {"sophia"},
    "adam_family": {"sophia", "baselines"},
    "matrix_optimizers": {"sophia", "baselines", "distributed"},
    "controlled_gamma": {"sophia", "distributed"},
    "estimators": {"sophia", "attention", "options"},
    "attention": set(),
    "memory": {"options"},
    "loss_scale": {"distributed"},
    "sharded_init": {"model", "distributed"},
    "fitting": {"configurator", "distributed", "dry_run", "options", "resume"},
    "guard": {"sophia", "configurator", "distributed"},
    "update_rules": {"sophia", "distributed"},
    "evaluation": {"dataloader", "distributed", "tokenizer"},
    "resume": {"checkpoint", "configurator", "dataloader", "distributed", "dry_run", "files",
               "optimizers", "options", "precision", "schemas", "tokenizer", "weights"},
    "summary": {"model", "dataloader", "distributed", "generate", "options", "tokenizer"},
    "precision": set(),
    "documents": {"configurator"},
    "folder_lock": {"configurator", "files"},
    "saver": {"checkpoint", "distributed", "files"},
}
WITHOUT_TORCH = {"characters", "configurator", "tokenizer", "corpus", "documents", "encoding",
                 "files", "folder_lock", "options", "schemas"}
TORCH_ALONE = {"model", "sophia"}
# Missing packages must not stop training: these may only be imported where they are used.
LAZY = {"tiktoken", "fastokens", "datasets", "wandb", "transformers", "matplotlib", "pyarrow",
        "tensorboard"}
SHADOWS = {"config", "data", "evaluate", "types", "logging", "random", "profile"}
COMMANDS = {"train", "sample", "bench"}


def imports(path: Path) -> list[tuple[str, int, bool]]:
    """(module of ours or top-level package, line, whether at module level) of each import."""
    found = []
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            names = [f"{PACKAGE}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            first, _, second = name.partition(".")
            found.append((second or first if first == PACKAGE else first, node.lineno,
                          node in tree.body))
    return found


def own_modules() -> dict[str, Path]:
    """Every module of the root and of the package by its name, which is used once."""
    paths = [*ROOT.glob("*.py"), *(ROOT / PACKAGE).glob("*.py")]
    found = {path.stem: path for path in paths if path.stem != "__init__"}
    assert len(found) == len(paths) - 1
    return found


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


def test_the_import_table_has_no_cycle_no_arrow_upward_and_no_row_too_many():
    assert ALLOWED.keys() == own_modules().keys()
    above: list[str] = []

    def visit(module: str) -> None:
        assert module not in above, f"a cycle: {' -> '.join([*above, module])}"
        above.append(module)
        for name in sorted(ALLOWED[module]):
            visit(name)
        above.pop()

    for module, path in own_modules().items():
        visit(module)
        if path.parent.name == PACKAGE:
            assert not ALLOWED[module] & COMMANDS, module
        used = {name for name, _, _ in imports(path) if name in own_modules()}
        assert used == ALLOWED[module], f"{module}: the table allows what is not used"


def test_the_root_holds_what_was_asked_for_and_nothing_else():
    names = {path.stem for path in ROOT.glob("*.py")}
    assert names == {"train", "model", "sophia", "sample", "bench"}
    assert not SHADOWS & names
    assert not list(ROOT.glob("config/__init__.py")) + list(ROOT.glob("data/**/__init__.py"))


def test_the_loop_knows_no_optimizer_by_name():
    text = (ROOT / "train.py").read_text().lower()
    for name in ("adamw", "lion", "sophia(", "gauss_newton", "import sophia"):
        assert name not in text


def test_the_readme_names_every_file_of_the_root_and_the_package():
    readme = (ROOT / "README.md").read_text()
    assert not [f"{m}.py" for m in own_modules() if f"{m}.py" not in readme]
