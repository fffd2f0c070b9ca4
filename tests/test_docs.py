"""README and docs: every command parses and names what is there, every snippet runs, links lead."""

import importlib
import importlib.util
import re
import shlex

import pytest

from experiments.runs import RunSettings
from nanosophia.configurator import ConfigError, Settings, load
from nanosophia.optimizers import OPTIMIZERS
from nanosophia.resume import load_config
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Words that a reader replaces: a value that stands in for them here.
STANDS_IN = {"CONFIG": "config/quickstart.py", "FILE": "config/quickstart.py"}


def commands():
    """(page, line) of every shell command in the pages, continuation lines joined."""
    for page in PAGES:
        for language, text in BLOCK.findall(page.read_text()):
            if not language:
                for line in text.replace("\\\n", " ").splitlines():
                    for part in line.split("&&"):
                        if part.strip() and not part.lstrip().startswith("#"):
                            yield page.name, part.strip()


def words_of(line):
    """A command's words, without what the shell adds."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    if "torchrun" in words:  # srun, torchrun's own flags
        words = ["python", *words[next(i for i, w in enumerate(words) if w.endswith(".py")):]]
        words = words[:words.index("||")] if "||" in words else words
    return words


def settings_of(module):
    """The one class of settings that a command's module defines, or else imports."""
    every = [value for value in vars(module).values() if isinstance(value, type)
             and issubclass(value, Settings) and value not in (Settings, RunSettings)]
    found = [cls for cls in every if cls.__module__ == module.__name__] or every
    found = [cls for cls in found if not any(issubclass(other, cls) for other in found
                                             if other is not cls)]
    assert len(found) <= 1, module
    return found[0] if found else None


KNOWN = ("bash .ci/run", "pip install", "lm_eval", "[ $SECONDS", "python -m pytest",
         "python -m tests.faults")


@pytest.mark.parametrize("page, line", sorted(set(commands())))
def test_each_command_names_what_is_there_and_its_settings_parse(page, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    if line.startswith(KNOWN):
        return
    words = words_of(line)
    assert words[0] == "python", line
    words = [STANDS_IN.get(word, word) for word in words]
    words = [re.sub(r"^(--config)=(CONFIG|FILE)$", r"\1=config/quickstart.py", w) for w in words]
    if words[1:] == ["train.py", "--help"]:
        return
    if words[1] == "train.py":
        load_config(words[2:])
        return
    name = words[2] if words[1] == "-m" else words[1].removesuffix(".py").replace("/", ".")
    argv = words[3:] if words[1] == "-m" else words[2:]
    if name.startswith("data."):
        spec = importlib.util.spec_from_file_location("prepare", ROOT / words[1])
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(name)
    settings = settings_of(module)
    if settings is None:  # a command without settings of its own
        assert all(not word.startswith("-") for word in argv), line
        return
    try:
        load(settings, argv, "")
    except ConfigError as error:
        assert re.search(r"\b(FOLDER|FILES?|PATH)\b", str(error)), error  # a place of the reader's
        assert "unknown key" not in str(error)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_each_python_snippet_runs_or_is_a_method_of_a_hook(page, capsys):
    for language, text in BLOCK.findall(page.read_text()):
        if language == "python" and "TrainerCallback" not in text:
            exec(compile(text, page.name, "exec"), {})
        elif language == "python":
            compile(text, page.name, "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_each_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_every_optimizer_has_its_paragraph_and_configs():
    text = (ROOT / "docs" / "optimizers.md").read_text()
    ablations = {"clip", "normalize", "ef_clip", "ah_clip", "gnb_unclipped"}
    for name in OPTIMIZERS.keys() - ablations:
        assert re.search(rf"^\*\*[^*]*\b{name}\b", text, re.MULTILINE), name
    for config in re.findall(r"`(train_gpt2_\w+\.py)`", text):
        assert (ROOT / "config" / config).exists(), config
