"""Tables are made again from stored runs, and from nothing else."""

import json

import pytest

from experiments import compare, figures, report, sampling
from tests.test_experiments import contenders, quick  # noqa: F401  (a fixture)


@pytest.fixture
def results(tmp_path):
    (tmp_path / "results" / "runs").mkdir(parents=True)
    return tmp_path / "results"


def keep(results, name, source):
    """Stores a file of runs, with a place for its table."""
    (results / "runs" / f"{name}.json").write_text(source.read_text())
    with open(results / "page.md", "a") as page:
        page.write(f"# {name}\n\n<!-- {name} -->\n<!-- end -->\n\nProse.\n")


def table_lines(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def test_a_comparison_is_written_again_from_its_runs(quick, tmp_path, results, capsys):  # noqa: F811
    compare.main([*contenders(quick, tmp_path / "out"), "--max_iters=6,12", "--rates=0.1,1",
                  "--seeds=2"])
    printed = capsys.readouterr().out
    keep(results, "mine", tmp_path / "out" / "comparison.json")
    report.main([f"--results={results}"])
    page = (results / "page.md").read_text()
    assert table_lines(page) == table_lines(printed) and page.endswith("<!-- end -->\n\nProse.\n")
    assert "`python -m experiments.compare --baseline=" in page and "on 4 windows" in page
    report.main([f"--results={results}", "--verify"])
    assert capsys.readouterr().out.endswith("1 tables; 0 files differ\n")


def test_a_figure_of_two_seeds_is_written_again(quick, tmp_path, results, capsys,  # noqa: F811
                                                refused):
    flags = " ".join(flag for flag in quick if not flag.startswith("--gamma"))
    figures.main(["--figure=6c", "--preset=small", "--seeds=2", f"--out_dir={tmp_path / 'out'}",
                  f"--flags={flags}"])
    printed = table_lines(capsys.readouterr().out)
    assert printed[2].count(", ") == 3  # two losses in each of three cells
    file = tmp_path / "out" / "small_6c.json"
    data = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert list(data["groups"]) == ["1337", "1338"]
    assert {run["config"]["seed"] for run in data["groups"]["1338"]} == {1338}
    keep(results, "figure", file)
    report.main([f"--results={results}"])
    page = (results / "page.md").read_text()
    assert table_lines(page) == printed
    assert "18 runs, seeds 1337, 1338, validation on 4 windows" in page

    def mistake(change, words, *flags):
        changed = json.loads(file.read_text())
        change(changed)
        (results / "runs" / "figure.json").write_text(json.dumps(changed))
        assert words in refused(report.main, [f"--results={results}", *flags])
        assert (results / "page.md").read_text() == page

    first = data["groups"]["1338"][0]["name"]
    mistake(lambda d: d["groups"]["1338"].pop(0), f"the run {first} is not stored")
    mistake(lambda d: d["common"].update(beta1=0.5), "has beta1 = 0.5, and 0.9 is asked for")
    mistake(lambda d: d["common"].pop("n_embd"), "has n_embd = 768, and")
    mistake(lambda d: d["groups"]["1337"][0]["records"]["step"].append(9), "is not what")
    mistake(lambda d: d.update(groups=[]), "is not what an experiment wrote")
    mistake(lambda d: d.pop("experiment"), "is not what an experiment wrote")
    mistake(lambda d: d["groups"]["1337"][0]["records"]["val/loss"].__setitem__(-1, 9.0),
            "page.md: tables differ", "--verify")


def test_timings_are_written_again_and_no_file_goes_unused(tmp_path, results, capsys, refused):
    sampling.main(["--max_new_tokens=2", "--rounds=1", "--batch=2", f"--json={tmp_path / 'a'}"])
    printed = table_lines(capsys.readouterr().out)
    keep(results, "speeds", tmp_path / "a")
    report.main([f"--results={results}"])
    assert table_lines((results / "page.md").read_text()) == printed
    (results / "runs" / "other.json").write_text("{}")
    assert "no table in" in refused(report.main, [f"--results={results}"])
    for text in ("<!-- gone -->\n<!-- end -->\n", "a\n<!-- gone -->\r\nold\r\n<!-- end -->"):
        (results / "page.md").write_text(text)
        assert "gone.json is not what an experiment wrote" in refused(
            report.main, [f"--results={results}"])
    text = "<!-- toc -->\n<!-- other -->\nprose\n\n<!-- speeds -->\nold\n<!-- end -->\n"
    (results / "page.md").write_text(text)  # an end is missing
    assert "no table in" in refused(report.main, [f"--results={results}"])
    assert (results / "page.md").read_text() == text
    (results / "runs" / "other.json").unlink()
    report.main([f"--results={results}"])
    assert (results / "page.md").read_text().startswith(text[:text.index("old")])
    for content in (b"\xff", None):
        (results / "page.md").write_bytes(content) if content else (results / "page.md").unlink()
        words = "cannot be read" if content else "holds no Markdown files"
        assert words in refused(report.main, [f"--results={results}"])


def test_the_tables_of_this_repository_are_what_their_runs_give(capsys):
    report.main(["--verify"])
    assert "0 files differ" in capsys.readouterr().out
