"""The command line: what it prints, how it fails, and that the light commands stay light."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clbench import reproducibility
from clbench.cli import runs
from clbench.cli.options import app, parse_seeds, parse_splits
from clbench.data.cache import default_root
from clbench.errors import SettingError, StoreError, UnknownName
from clbench.store import run_folder
from clbench.training.launch import Place


def run_cli(*words: str) -> subprocess.CompletedProcess[str]:
    """The installed program, as a user starts it."""
    return subprocess.run(
        [sys.executable, "-m", "clbench", *words], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0", [0]), ("0-2", [0, 1, 2]), ("0,5", [0, 5]), ("0-1,7", [0, 1, 7]), ("1,0-2", [1, 0, 2])],
)
def test_seeds(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "2-", "-1", "3-1", "0-2,5-3", "0-b", "²"])
def test_wrong_seeds(text: str) -> None:
    with pytest.raises(SettingError, match="seed"):
        parse_seeds(text)


def test_the_home_folder_stands_where_a_shell_leaves_its_sign(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "runs").mkdir()
    for words in (["--results=~/runs"], ["--results", "~/runs"]):
        done = CliRunner().invoke(app, ["table", "summary", "--bench", "tumor_ext", *words])
        assert isinstance(done.exception, StoreError), done.exception
        assert str(done.exception.where).startswith(str(tmp_path / "runs"))
    monkeypatch.setenv("CLBENCH_CACHE", "~/cache")
    assert default_root() == tmp_path / "cache"


def test_a_seed_that_no_table_can_hold_is_refused() -> None:
    words = ["run", "--bench", "tumor_ext", "--strategy", "finetune", "--seed", str(2**63)]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, SettingError), done.exception
    assert (done.exception.where, done.exception.got) == ("--seed", 2**63)


def test_list_names_every_part_with_one_line() -> None:
    out = CliRunner().invoke(app, ["list"]).output
    for name in ("tumor_ext", "universal", "finetune", "joint", "swin_unetr", "unet", "segresnet",
                 "small_unet", "minilm", "clip", "onehot", "random", "smoke", "quick", "paper"):  # fmt: skip
        (line,) = [x for x in out.splitlines() if x.split()[:1] == [name]]
        assert len(line.split()) > 3, line


def test_an_error_is_one_message_without_traceback(tmp_path: Path) -> None:
    done = run_cli("run", "--bench", "tumor", "--strategy", "universal", "--out", str(tmp_path))
    assert done.returncode == 1
    assert "did you mean 'tumor_ext'" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_split_that_does_not_come_with_clbench_lists_those_that_do() -> None:
    with pytest.raises(UnknownName, match="btcv_publi") as err:
        parse_splits(["btcv=btcv_publi"])
    assert "did you mean 'btcv_public'" in str(err.value)


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--bench", "tumor_ext", "--strategy", "universal", "--scoring", "lenient"],
        ["run", "--bench", "tumor_ext", "--strategy", "universal", "--keep-predictions", "all"],
        ["run", "--bench", "tumor_ext", "--strategy", "universal", "--split", "btcv"],
        ["run", "--bench", "tumor_ext", "--strategy", "universal", "--seeds", "2-0"],
        ["run", "--bench", "tumor_ext", "--strategy", "universal", "--seeds", ""],
        ["run", "--bench", "tumor_ext", "--strategy", "universal", "--seeds", "0-2", "--seed", "1"],
        ["table", "10", "--seeds", ""],
        ["table", "9"],
        ["table", "10", "--source", "paper"],
        ["table", "10", "--format", "docx"],
        ["table", "10", "--scoring", "both"],
    ],
)
def test_a_wrong_choice_lists_the_right_ones(words: list[str]) -> None:
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, SettingError)
    assert done.exception.expected or "SOURCE=FILE" in done.exception.what


ONE = "--bench tumor_ext --strategy nowhere:Method"  # where nothing refuses, it cannot be loaded
SLURM = f"grid {ONE} --on slurm"


@pytest.mark.parametrize(
    ("words", "dropped"),
    [
        (f"run {ONE} --bench body_ext", "--bench is given 2 times"),
        ("table 10 --format=md --format csv", "--format is given 2 times"),
        ("data check . --set data.expect_hu=true --bench a --bench b", "--bench is given 2 times"),
        (f"run {ONE} --cache=", "--cache ''"),
        (f"run {ONE} --processes 2 --device cuda", "--processes 2 and --device cuda"),
        (f"grid {ONE} --address auto", "add --on ray"),
        (f"grid {ONE} --minutes 1440", "add --on slurm"),
        (f"grid {ONE} --gpus 1", "uses every GPU"),
        (f"grid {ONE} --on ray --partition gpu", "--partition does nothing with --on ray"),
        (f"{SLURM} --address auto", "add --on ray"),
        (f"{SLURM} --device cpu", "with --gpus 1"),
        (f"{SLURM} --sbatch qos=a --sbatch qos=b", "given twice"),
        (f"{SLURM} --sbatch time=3", "use --minutes"),
        (f"{SLURM} --sbatch dependency=3", "clbench sets dependency"),
        (f"{SLURM} --sbatch gres=gpu:a100:1", "add --gpus 1"),
        (f"{SLURM} --gpus 1 --sbatch gres=tmp:3", "gres=gpu:1,tmp:3"),
        ("score RUN --bench tumor_ext", "--bench with --predictions"),
        ("score RUN --seed 0", "--seed with --predictions"),
        ("score RUN --set data.expect_hu=false", "--set with --predictions"),
        ("score RUN --allow-missing", "--allow-missing with --predictions"),
        ("cost RUN --format csv", "--format with a method"),
        ("table calibration --bench body_ext", "--bench with a table of runs"),
        ("table 10 --source printed --seeds 0-2", "--seeds with --source measured or both"),
        ("table 6 --source printed --bench body_ext", "--bench with --source measured or both"),
        ("table continual --metric lesion", "lesion_"),
        ("data prepare --set strategy.weight=3", "every strategy uses the same volumes"),
        ("figure list --ref lwf", "--ref with a figure"),
        ("figure plane --data ct", "--data with the figure strip"),
        ("figure all --external clinic", "--external with the figure heatmap or forgetting"),
        ("data check . --layout nnunet --split btcv=a.toml", "--split with a benchmark"),
    ],
)
def test_what_would_be_passed_over_is_refused(words: str, dropped: str) -> None:
    done = CliRunner().invoke(app, words.split())
    assert isinstance(done.exception, SettingError)
    assert dropped in str(done.exception)
    assert done.exception.next_step


@pytest.mark.parametrize("words", [["verify", ""], ["verify", "RUN", "--data", ""]])
def test_an_empty_word_is_refused(words: list[str]) -> None:
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, SettingError)
    assert "an empty word is given" in str(done.exception)


@pytest.mark.parametrize(
    "words", ["table summary --bench tumor_ex", "report --ref lwf --bench tumor_ex"]
)
def test_a_course_that_is_nowhere_is_a_typing_error(words: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [*words.split(), "--results", str(tmp_path)])
    assert isinstance(done.exception, UnknownName)
    assert "did you mean 'tumor_ext'?" in str(done.exception)


def test_an_option_of_many_values_and_a_flag_may_be_repeated() -> None:
    words = ["data", "check", "nowhere", "--set", "a", "--set", "b", "--split", "c", "--split", "d"]
    assert "takes one value" not in str(CliRunner().invoke(app, words).exception)
    done = CliRunner().invoke(app, ["table", "10", "--source", "printed", "--percent", "--percent"])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("more", [["--gpus", "3"], ["--processes", "3"], ["--device", "cuda:1"]])
def test_torchrun_says_how_many_processes_there_are(
    more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproducibility, "gpus", lambda: 4)
    place = Place(rank=0, local=0, size=2, url="env://")
    monkeypatch.setattr(runs, "place", lambda: place)
    done = CliRunner().invoke(app, ["run", *ONE.split(), *more])
    assert isinstance(done.exception, SettingError)
    assert "2 processes" in str(done.exception)
    assert " ".join(more) in str(done.exception)


@pytest.mark.parametrize(
    "words", [["table", "10"], ["table", "summary", "--bench", "tumor_ext"], ["figure", "heatmap"]]
)
def test_a_named_results_folder_must_be_there(words: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [*words, "--results", str(tmp_path / "nope")])
    assert isinstance(done.exception, StoreError)
    assert "no such folder of results" in str(done.exception)
    assert str(tmp_path / "nope") in str(done.exception)


def test_run_prints_the_phantom_scores_forgetting_and_place(
    smoke_run: Path, cache_root: Path, smoke_out: Path
) -> None:
    done = CliRunner().invoke(
        app,
        ["run", "--bench", "tumor_ext", "--strategy", "universal", "--profile", "smoke",
         "--out", str(smoke_out), "--cache", str(cache_root), "--scoring", "both"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert "PHANTOM" in lines[0]
    assert "orgetting" in done.output
    assert (
        "liver_tumor" in done.output or "Liver Tumor" in done.output or "liver tumor" in done.output
    )
    assert str(smoke_run) in done.output.replace("\n", "")
    assert "paper" in done.output


def test_several_seeds_are_several_runs(cache_root: Path, smoke_out: Path, smoke_run: Path) -> None:
    done = CliRunner().invoke(
        app,
        ["run", "--bench", "tumor_ext", "--strategy", "universal", "--profile", "smoke", "--seeds", "0-1",
         "--out", str(smoke_out), "--cache", str(cache_root), "--keep-predictions", "none"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    seeds = {
        json.loads((f / "run.json").read_text())["identity"]["seed"]
        for f in run_folder.find_runs(smoke_out)
        if f.parent.name == "universal"
    }
    assert seeds >= {0, 1}


def test_a_summary_of_phantom_runs_says_so(smoke_run: Path, smoke_out: Path) -> None:
    for words in (["summary"], ["10", "--source", "measured"]):
        done = CliRunner().invoke(
            app, ["table", *words, "--results", str(smoke_out), "--format", "md"]
        )
        assert done.exit_code == 0, done.output
        assert "phantom" in done.output.lower()
        assert "universal" in done.output
