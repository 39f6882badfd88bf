"""The command line: help, version, doctor, and errors that end with a sentence instead of a traceback."""

import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import bkd_fast
from bkd_fast.app import cli, doctor

runner = CliRunner()


def test_version_and_help():
    assert runner.invoke(cli.app, ["--version"]).output.strip() == f"bkd_fast {bkd_fast.__version__}"
    shown = runner.invoke(cli.app, ["--help"]).output
    for command in ("run", "demo", "doctor"):
        assert command in shown


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("sampling: {thinn: 3}", [], "did you mean 'thin'"),
        ("{}", ["--set", "sampling.thin=0"], "sampling.thin = 0"),
        ("{}", ["--set", "sampling.thin"], "KEY=VALUE"),
        ("data: {name: mnist}", [], "BKD_FAST_DATA is not set"),
        ("data: {train_size: 5000}", [], "data.train_size = 5000"),
    ],
)
def test_mistakes_end_with_a_sentence_and_exit_code_2(tmp_path, monkeypatch, text, overrides, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BKD_FAST_DATA", raising=False)
    (tmp_path / "run.yaml").write_text(text)
    result = runner.invoke(cli.app, ["run", "run.yaml", *overrides])
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_chain_that_diverges_ends_with_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(
        "{output: results, data: {train_size: 100, test_size: 50}, teacher: {epochs: 2}, student: {epochs: 2}, "
        "sampling: {lr: 1e20, warm_start: 20, burn_in: 20, num_draws: 2}}"
    )
    result = runner.invoke(cli.app, ["run", "run.yaml"])
    assert result.exit_code == 1
    assert "diverged: lower sampling.lr" in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "results" / "metrics.json").exists()


def test_a_missing_file_is_named():
    result = runner.invoke(cli.app, ["run", "nowhere.yaml"])
    assert result.exit_code == 2
    assert "nowhere.yaml" in result.output


def test_doctor_finds_this_machine_healthy():
    result = runner.invoke(cli.app, ["doctor"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    for word in ("reference", "cpp", "torch", "works"):
        assert word in result.output


def test_doctor_notices_a_backend_that_computes_something_else(monkeypatch):
    exercise = doctor._exercise
    calls = []

    def wrong_after_the_first(device="cpu"):
        found = exercise(device)
        calls.append(found)
        if len(calls) > 1:
            found["KD energy"] = found["KD energy"] + 0.01
        return found

    monkeypatch.setattr(doctor, "_exercise", wrong_after_the_first)
    if doctor.native is None:
        pytest.skip("the compiled kernels are missing")
    before = doctor.native.isa()
    result = runner.invoke(cli.app, ["doctor"])
    assert result.exit_code == 1
    assert "WRONG" in result.output
    assert doctor.native.isa() == before


def test_doctor_says_why_an_instruction_set_is_missing(monkeypatch):
    if doctor.native is None:
        pytest.skip("the compiled kernels are missing")
    monkeypatch.setattr(doctor, "_exercise", lambda device="cpu": {"noise": torch.zeros(1)})
    found = {finding.name: finding for finding in doctor.examine()}
    for isa in ("scalar", "avx2", "avx512"):
        expected = doctor.WORKS if isa in doctor.native.isas() else doctor.MISSING
        assert found[f"cpp, {isa}"].state == expected
        assert found[f"cpp, {isa}"].reason


def test_importing_the_package_loads_nothing_of_the_application():
    heavy = ["bkd_fast.app", "typer", "pydantic", "yaml", "sklearn", "matplotlib", "jinja2"]
    code = f"import bkd_fast, sys; print([name for name in {heavy} if name in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_the_command_names_the_extra_it_needs():
    lacking = "import sys; sys.modules['typer'] = None; from bkd_fast.app.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", lacking], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "bkd-fast needs typer, which the app extra brings: pip install 'bkd_fast[app]'"
