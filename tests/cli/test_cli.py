from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import Muonscale


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


def test_help_does_not_import_torch() -> None:
    program = (
        "import sys; sys.argv = ['muonscale', '--help']\n"
        "from muonscale.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('HEAVY', sorted({'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    answer = python(program).stdout
    assert "train" in answer and "HEAVY []" in answer


def test_without_the_lab_extra_the_install_command_is_printed() -> None:
    program = (
        "import sys; sys.modules['typer'] = None\nfrom muonscale.cli import main\nsys.exit(main())"
    )
    answer = python(program)
    assert answer.returncode == 2
    assert 'pip install "muonscale[lab]"' in answer.stderr and "Traceback" not in answer.stderr


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
    ],
)
def test_a_mistake_gets_a_sentence_and_exit_code_2(
    words: list[str], said: str, muonscale: Muonscale
) -> None:
    answer = muonscale(*words)
    assert answer.code == 2
    assert said in answer.err and "Traceback" not in answer.err
