"""The notebook runs from top to bottom, and holds the outputs of such a run."""

import shutil

import pytest

from tests.conftest import ROOT

nbformat = pytest.importorskip("nbformat")
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "out", "*.bin", "__pycache__", ".pytest_cache",
                                  "meta.json", "meta.pkl", "lock", "results")


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_runs_from_top_to_bottom_without_a_network(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    notebook = nbformat.read(NOTEBOOK, 4)
    nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3", resources=dict(
        metadata=dict(path=str(copy / "notebooks")))).execute()
    texts = "".join(o.get("text", "") for c in code_cells(notebook) for o in c.outputs)
    assert texts.count("step 599: loss") == 2 and "saved in out/notebook/sophia" in texts
    assert "error" not in texts.lower()


def test_it_is_kept_with_its_outputs_and_pictures():
    cells = code_cells(nbformat.read(NOTEBOOK, 4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [o for cell in cells for o in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 2
    assert "/tmp" not in NOTEBOOK.read_text() and "/home" not in NOTEBOOK.read_text()
