"""The optimizer as a package: a wheel with one module, which needs torch alone."""

import re
import shutil
import subprocess
import sys
import zipfile

from tests.conftest import ROOT, torchrun


def test_a_wheel_holds_the_one_module_and_runs_the_readmes_snippet_elsewhere(tmp_path):
    source = tmp_path / "source"  # building writes beside the files
    source.mkdir()
    for name in ("sophia.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--quiet",
                    f"--wheel-dir={tmp_path}"], check=True)
    wheel, = tmp_path.glob("nanosophia-*.whl")
    with zipfile.ZipFile(wheel) as file:
        modules = [name for name in file.namelist() if name.endswith(".py")]
        metadata = file.read(next(n for n in file.namelist() if n.endswith("METADATA"))).decode()
    assert modules == ["sophia.py"]
    assert re.findall(r"Requires-Dist: (.*)", metadata) == ["torch>=2.11"]
    place = tmp_path / "installed"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps",
                    f"--target={place}", str(wheel)], check=True)
    snippet = re.search(r"```python\n(import torch.*?)```", (ROOT / "README.md").read_text(),
                        re.DOTALL)[1]
    run = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(place)!r})\n"
                          f"{snippet}\nimport sophia; print(sophia.__file__)"], cwd=tmp_path,
                         check=True, capture_output=True, text=True)
    loss, file = re.fullmatch(r"tensor\(([\d.]+).*\)\n(.*)\n", run.stdout).groups()
    assert float(loss) < 0.5 and file == str(place / "sophia.py")


def test_ranks_stay_alike_without_being_told_to_reduce():
    result = torchrun(2, "-m", "tests.reduce_worker")
    assert result.returncode == 0, result.stderr
