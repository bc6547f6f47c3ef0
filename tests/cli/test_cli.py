from __future__ import annotations

import ast
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import muonscale as muonscale_package
from muonscale.cli.app import GROUPS, app
from muonscale.errors import command_line
from muonscale.lab.config.load import load_config
from muonscale.lab.studies.kinds import load_study
from tests.conftest import Muonscale

COMMAND = re.compile(r"muonscale [a-z]+( [a-z]+)? $")
"""The beginning of a command, up to a value that is put in."""


def python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = "import muonscale, sys; print(*sorted(sys.modules))"
    loaded = set(python(program).stdout.split())
    assert "muonscale" in loaded
    assert not loaded & {"torch", "transformers", "matplotlib", "numpy", "pydantic"}


def test_the_optimizer_imports_torch_alone() -> None:
    program = (
        "import sys, torch; before = set(sys.modules)\n"
        "from muonscale import Muon, orthogonalize, parameter_groups\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    added = set(python(program).stdout.split()) - set(sys.stdlib_module_names)
    assert added <= {"muonscale", "torch"}


def test_what_needs_no_torch_does_not_import_it() -> None:
    program = (
        "import sys\n"
        "from muonscale.cli import main\n"
        "for words in (['--help'], ['--version'], ['recipes'], ['recipes', 'demo'], ['config'],\n"
        "              ['config', 'train.tokens'], ['train', '--help'], ['plan', '--help'],\n"
        "              ['train', '--dry-run', '--json'], ['train', 'optimizer.lr=high']):\n"
        "    sys.argv = ['muonscale', *words]\n"
        "    try: main()\n"
        "    except SystemExit: pass\n"
        "    if words == ['--version']: print('PYDANTIC', 'pydantic' in sys.modules)\n"
        "print('HEAVY', sorted({'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
    )
    answer = python(program)
    assert "PYDANTIC False" in answer.stdout and "HEAVY []" in answer.stdout
    assert "muon-adamw-nano" in answer.stdout and "optimizer.lr" in answer.stderr


def test_without_the_lab_extra_the_install_command_is_printed() -> None:
    program = (
        "import sys; sys.modules['typer'] = None\nfrom muonscale.cli import main\nsys.exit(main())"
    )
    answer = python(program)
    assert answer.returncode == 2
    assert 'pip install "muonscale[lab]"' in answer.stderr and "Traceback" not in answer.stderr


def test_windows_is_refused_with_a_sentence() -> None:
    program = (
        "import sys; sys.platform = 'win32'; sys.argv = ['muonscale', 'recipes']\n"
        "from muonscale.cli import main\n"
        "sys.exit(main())"
    )
    answer = python(program)
    assert answer.returncode == 2 and "Windows" in answer.stderr and "Linux" in answer.stderr
    answer = python("import sys; sys.modules['fcntl'] = None; import muonscale.lab.files")
    assert "ImportError: muonscale.lab locks files" in answer.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_characters_that_the_output_cannot_show_are_replaced(encoding: str) -> None:
    program = (
        "import sys; sys.argv = ['muonscale', 'recipes']\n"
        "from muonscale.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "import typer\n"
        "from muonscale.lab.training.console import RunConsole\n"
        "RunConsole().log('sample \u2581\u0416')\n"
        "typer.echo('schedule \u2581\u0416')"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert answer.returncode == 0 and answer.stderr == b""
    *_, sample, schedule = answer.stdout.splitlines()
    assert sample == b"sample ??"
    # typer writes UTF-8 where the encoding is ASCII, which it takes for a mistake.
    assert schedule == (b"schedule ??" if encoding == "latin-1" else "schedule ▁Ж".encode())


def test_paths_in_commands_of_messages_are_quoted() -> None:
    assert command_line("train", "a b", "--resume") == "muonscale train 'a b' --resume"
    bare = []
    for path in sorted(Path(muonscale_package.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.JoinedStr):
                continue
            for before, after in itertools.pairwise(node.values):
                text = before.value if isinstance(before, ast.Constant) else ""
                if isinstance(after, ast.FormattedValue) and COMMAND.search(str(text)):
                    bare.append(f"{path}:{node.lineno}")
    assert not bare


def test_every_public_name_can_be_loaded() -> None:
    import muonscale

    for name in muonscale.__all__:
        assert getattr(muonscale, name).__doc__
    with pytest.raises(AttributeError, match="nothing"):
        muonscale.nothing  # noqa: B018


def test_recipes_are_listed(muonscale: Muonscale) -> None:
    answer = muonscale("recipes")
    assert answer.code == 0 and answer.out.startswith("muonscale train NAME\n  demo ")
    _, studies = answer.out.split("muonscale study run NAME\n")
    assert "  batch-nano " in studies and "  muon-adamw-nano " in studies


def test_a_recipe_is_printed_as_it_is_used(muonscale: Muonscale, tmp_path: Path) -> None:
    for name, load in (("demo", load_config), ("muon-adamw-nano", load_study)):
        answer = muonscale("recipes", name)
        (tmp_path / "own.yaml").write_text(answer.out)
        assert answer.code == 0 and load(str(tmp_path / "own.yaml"), []) == load(name, [])


def test_the_configuration_of_a_run_is_a_recipe(muonscale: Muonscale, tmp_path: Path) -> None:
    words = ["optimizer.lr=0.5", "train.tokens=10M"]
    answer = muonscale("train", "demo", *words, "--dry-run", "--json")
    (tmp_path / "own.json").write_text(answer.out)
    assert load_config(str(tmp_path / "own.json")) == load_config("demo", words)


def test_the_version_and_every_verb_are_in_the_help(muonscale: Muonscale) -> None:
    assert muonscale("--version").out == f"muonscale {muonscale_package.__version__}\n"
    answer = muonscale("-h")
    assert answer.code == 0
    sections = re.split(r"^(.*):$", answer.out, flags=re.M)[1:]
    listed = {title: sections[n + 1] for n, title in enumerate(sections) if title in GROUPS}
    for title, names in GROUPS.items():
        assert re.findall(r"^  ([a-z]+) ", listed[title], flags=re.M) == list(names)
    verbs = [name for names in GROUPS.values() for name in names]
    assert sorted(verbs) == sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert not re.search(r"\w\.\.\.$", answer.out, flags=re.M)
    assert muonscale("fit", "scaling", "-h").code == 0


def test_keys_are_printed(muonscale: Muonscale) -> None:
    answer = muonscale("config", "train.tokens")
    assert answer.code == 0 and "train.tokens" in answer.out and "train.steps" not in answer.out
    (key,) = json.loads(muonscale("config", "train.batch_tokens", "--json").out)
    assert key["name"] == "train.batch_tokens" and key["default"] == "8192"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("muonscale coordc", {"coordcheck"}),
        ("muonscale train dem", {"demo"}),
        ("muonscale train data.val", {"data.validation="}),
        ("muonscale study plan batch", {"batch-nano"}),
        ("muonscale config prof", {"profile", "profile.steps"}),
    ],
)
def test_a_shell_completes_verbs_recipes_and_keys(
    words: str, found: set[str], muonscale: Muonscale, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_MUONSCALE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    assert set(muonscale().out.split()) == found


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "dmo"], "did you mean demo"),
        (["train", "demo", "other"], "demo and other"),
        (["train", "trian.steps=1"], "did you mean train"),
        (["train", "train.steps=many"], "train.steps='many'"),
        (["train", "model.preset=lama-nano", "--dry-run"], "llama-nano"),
        (["train", "model.fields.hidden_sizes=1", "--dry-run"], "hidden_size"),
        (["train", "schedule.warmup=1e9", "--dry-run"], "schedule.warmup"),
        (["tarin"], "tarin"),
        (["train", "--restart"], "--restart"),
        (["train", "--data.path=my text.txt"], "data.path='my text.txt'"),
        (["train", "lr=0.01"], "did you mean optimizer.lr?"),
        (["train", "train.lr=0.01"], "did you mean optimizer.lr?"),
        (["train", "optimizer.rule=normuon"], "optimizer.post_norm=normuon"),
        (["train", "train.batch_tokens=4k"], "4096"),
        (["train", "--json"], "--dry-run"),
        (["recipes", "dmo"], "did you mean demo"),
        (["config", "train.tokns"], "did you mean train.tokens"),
    ],
)
def test_a_mistake_gets_a_sentence_and_exit_code_2(
    words: list[str], said: str, muonscale: Muonscale
) -> None:
    answer = muonscale(*words)
    assert answer.code == 2
    assert said in answer.err and "Traceback" not in answer.err


def test_closed_streams_end_nothing() -> None:
    code = "import sys; from muonscale.cli import main\ntry: main()\nfinally: sys.stdout.flush()"
    words = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} no-such-verb <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", words], check=False).returncode == 2
