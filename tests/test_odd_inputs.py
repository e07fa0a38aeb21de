"""What a user sees of odd input: an exit code, and a word that says what is wrong. Never a traceback, never silence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from tiny import tiny_config

from openmoba import cli
from openmoba.bench.rows import columns
from openmoba.bench.table import Row
from openmoba.lab.arms import ArmConfig
from openmoba.lab.config import DataConfig, EvalConfig, RunConfig, TrainConfig, from_dict, to_dict
from openmoba.lab.train.run import run_training
from openmoba.records import disk

HUGE = str(10**20)
CONVERT = ["--block-size", "8", "--top-k", "2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, a model, and what is neither."""
    root = tmp_path_factory.mktemp("place")
    config = tiny_config(root)
    run_training(config, root / "run")
    shutil.copytree(root / "run" / "checkpoint-4", root / "model")
    (root / "file").write_text("x")
    (root / "empty").mkdir()
    (root / "taken.md").mkdir()
    for name, file, content in (
        ("no-config", "config.json", b""),
        ("list-config", "config.json", b"[]"),
        ("no-tokenizer", "tokenizer.json", b""),
        ("odd-tokenizer", "tokenizer_config.json", b"["),
        ("no-weights", "model.safetensors", b""),
    ):
        shutil.copytree(root / "model", root / name)
        (root / name / file).write_bytes(content)
    shutil.copytree(root / "model", root / "sentencepiece")
    (root / "sentencepiece" / "tokenizer.json").unlink()
    (root / "sentencepiece" / "tokenizer.model").write_bytes(b"\x0a\x01")
    disk.write_json(root / "sentencepiece" / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    for name, file, content in (
        ("run-of-a-list", "config.json", b"[]"),
        ("run-of-a-word", "config.json", b'{"data": {"length": "x"}}'),
        ("run-of-nan", "config.json", b'{"train": {"learning_rate": NaN}}'),
        ("run-of-nothing", "config.json", b""),
        ("run-without-data", "data.json", b"[]"),
        ("run-without-result", "result.json", b"{}"),
        ("run-of-half-a-result", "result.json", b'{"config": {}}'),
    ):
        shutil.copytree(root / "run", root / name)
        (root / name / file).write_bytes(content)
    shutil.copytree(root / "run", root / "run-without-weights", ignore=shutil.ignore_patterns("checkpoint-*"))
    (root / "not.toml").write_text("x=")
    (root / "nan.toml").write_text(
        '[run.train]\nlearning_rate = nan\n[sizes.nano.model]\nsize = "nano"\n[arms.full]\nname = "full"\n'
        '[[stages]]\nname = "one"\nsizes = ["nano"]\narms = ["full"]\n'
    )
    (root / "one.toml").write_text(recipe_of(config))
    (root / "latin.toml").write_bytes(b'title = "\xe9"')
    (root / "not.csv").write_text("a,b\n1,2\n")
    (root / "words.csv").write_text(f"{','.join(columns(Row))}\n{','.join('x' for _ in columns(Row))}\n")
    (root / "short.csv").write_text(f"{','.join(columns(Row))}\nx\n")
    for name, line in (("no-record", "{}"), ("no-evaluation", '{"kind": "eval", "step": 4}')):
        study = root / f"study-{name}"
        (study / "one").mkdir(parents=True)
        (study / "recipe.toml").write_text(recipe_of(config))
        shutil.copytree(root / "run", study / "one" / "nano-full-seed0")
        (study / "one" / "nano-full-seed0" / "metrics.jsonl").write_text(f"{line}\n")
    return root


def recipe_of(config: RunConfig) -> str:
    """A recipe of one run, `one/nano-full-seed0`, of this configuration."""
    tables = to_dict(config)
    overrides = ", ".join(f"{key} = {json.dumps(value)}" for key, value in tables["model"]["overrides"].items())
    lines = ["[run.model]", f"overrides = {{ {overrides} }}", f"family = {json.dumps(config.model.family)}"]
    for group in ("data", "arm", "train", "eval"):
        entries = {key: value for key, value in tables[group].items() if value is not None and key != "seed"}
        lines += [f"[run.{group}]", *(f"{key} = {json.dumps(value)}" for key, value in entries.items())]
    lines += [f"[sizes.nano.model]\nsize = {json.dumps(config.model.size)}", f'[arms.full]\nname = "{config.arm.name}"']
    return "\n".join([*lines, '[[stages]]\nname = "one"\nsizes = ["nano"]\narms = ["full"]\n'])


def setting(name: str, *values: str) -> list[str]:
    return ["train", "new", f"--{name}", *values]


ROWS: list[tuple[list[str], int, str]] = [
    ([], 2, ""),
    (["--help"], 0, ""),
    (["tarin", "run"], 2, "unknown command 'tarin'"),
    (["train", "run", "--steps", "3"], 2, "--train.steps"),
    # A folder that can be none
    (["train", "file"], 2, "file: File exists; something is in the way"),
    (["train", "file/run"], 2, "Not a directory; a file is in the way"),
    (["train", "/proc/run"], 2, "/proc/run: No such file or directory; check the path"),
    (["train", "/dev/null"], 2, "File exists"),
    (["train", "x" * 300], 2, "File name too long; give a shorter path"),
    (["train", "a\0b"], 2, "embedded null byte"),
    (["train", "new", "--data.cache", "file"], 2, "cannot write file: File exists; set data.cache"),
    (["train", "new", "--data.cache", "/proc/cache"], 2, "cannot write /proc/cache"),
    (["evaluate", "run", "--out", "/proc/x.json"], 2, "cannot write into the folder of --out"),
    (["evaluate", "run", "--out", "empty"], 2, "--out empty is a folder; name a file"),
    (["evaluate", "run", "--out", "file/x.json"], 2, "cannot write into the folder of --out"),
    (["evaluate", "needle", "run", "--out", "/proc/x"], 2, "cannot write into the folder of --out"),
    (["evaluate", "needle", "run", "--out", "taken"], 2, "--out taken.md is a folder; name a file"),
    (["convert", "model", "file", *CONVERT], 2, "file exists; name a new folder"),
    (["convert", "model", "file/out", *CONVERT], 2, "Not a directory"),
    (["convert", "model", "/proc/out", *CONVERT], 2, "No such file or directory"),
    (["study", "empty"], 2, "empty is not readable as a recipe (Is a directory)"),
    (["study", "/proc/self/mem"], 2, "not readable as a recipe (Input/output error)"),
    (["fit", "file"], 2, "file is not the folder of a study"),
    (["plot", "empty"], 2, "empty is not the folder of a study: it has no recipe.toml; give the folder that"),
    (["plot", "run"], 2, "run is not the folder of a study"),
    (["study", "one.toml", "--out", "run"], 2, "run holds a run or a model, and a study has a folder of its own"),
    (["study", "one.toml", "--out", "model", "--dry-run"], 2, "model holds a run or a model"),
    (["train", "study-no-record"], 2, "study-no-record is the folder of a study, and a run takes one of its own"),
    (["train", "model"], 2, "model holds a model, not a run; use another folder, with train.start_from=model"),
    (["bench", "plot", "empty"], 2, "empty: Is a directory; that is a folder"),
    (["bench", "plot", "not.csv"], 2, "other columns"),
    (["bench", "plot", "words.csv"], 2, "words.csv, line 2: "),
    (["bench", "plot", "short.csv"], 2, "short.csv, line 2: "),
    (["runs"], 2, "there are no runs below runs; give a folder"),
    (["runs", "empty"], 2, "there are no runs below empty; give a folder"),
    (["runs", "file"], 2, "there are no runs below file"),
    (["runs", "run", "empty", "nowhere"], 2, "there are no runs below nowhere; give a folder"),
    (["generate", "run", "--file", "nowhere.txt"], 2, "nowhere.txt: No such file or directory; check the path"),
    (["generate", "run", "--file", "run/checkpoint-4/model.safetensors"], 2, "is not text in UTF-8"),
    (["generate", "run", "--file", "empty"], 2, "empty: Is a directory; that is a folder, give a file"),
    (["corpus", "empty"], 2, "empty"),
    # What is no model, run, recipe or record
    (["evaluate", ""], 2, "an empty name does not exist"),
    (["evaluate", "/nowhere/model"], 2, "/nowhere/model does not exist; give a run's folder"),
    (["evaluate", "empty/nowhere"], 2, "empty/nowhere does not exist; give"),
    (["evaluate", "a/b/c"], 2, "a/b/c does not exist"),
    (["evaluate", "file"], 2, "file holds no readable model"),
    (["evaluate", "empty"], 2, "empty holds no readable model"),
    (["evaluate", "no-config"], 2, "no-config/config.json' is not a valid JSON"),
    (["evaluate", "list-config"], 2, "list-config holds no readable model"),
    (["evaluate", "no-weights"], 2, "no-weights holds no readable model"),
    (["evaluate", "no-tokenizer"], 2, "no tokenizer in no-tokenizer; use bytes"),
    (["evaluate", "odd-tokenizer"], 2, "no tokenizer in odd-tokenizer; use bytes"),
    (["evaluate", "sentencepiece"], 2, "no tokenizer in sentencepiece; use bytes"),
    (["evaluate", "run-of-a-list"], 2, "run-of-a-list/config.json holds a list"),
    (["evaluate", "run-of-a-word"], 2, "data.length must be int, got 'x'"),
    (["evaluate", "run-of-nan"], 2, "train.learning_rate must be a finite number > 0, got nan"),
    (["evaluate", "run-of-nothing"], 2, "run-of-nothing/config.json is not JSON"),
    (["evaluate", "run-without-weights"], 2, "is a finished run without its checkpoint; train it again in another"),
    (["evaluate", "run-without-data"], 2, "run-without-data/data.json holds a list"),
    (["train", "run-without-result"], 2, "run-without-result/result.json has no 'config'"),
    (["train", "run-of-half-a-result"], 2, "run-of-half-a-result/result.json has no 'params'"),
    (["train", "run-of-a-list"], 2, "run-of-a-list/config.json holds a list"),
    (["generate", "empty/nowhere", "--prompt", "x"], 2, "does not exist"),
    (["generate", "no-weights", "--prompt", "x"], 2, "no-weights holds no readable model"),
    (["generate", "no-tokenizer", "--prompt", "x"], 2, "no tokenizer in no-tokenizer"),
    (["generate", "run", "--prompt", ""], 2, "the prompt has no tokens"),
    (["convert", "./nowhere", "out", *CONVERT], 2, "./nowhere does not exist; give"),
    (["convert", "empty/nowhere", "out", *CONVERT], 2, "does not exist"),
    (["convert", "no-config", "out", *CONVERT], 2, "no-config has no config.json that transformers understands"),
    (["convert", "list-config", "out", *CONVERT], 2, "list-config has no config.json that transformers understands"),
    (["convert", "no-weights", "out", *CONVERT], 2, "no-weights/model.safetensors is not readable as safetensors"),
    (["train", "new", "--train.start-from", "run/nowhere"], 2, "run/nowhere does not exist"),
    (["train", "new", "--train.start-from", "no-weights"], 2, "no-weights holds no readable model"),
    (["train", "new", "--data.tokenizer", "./nowhere"], 2, "./nowhere does not exist; give bytes"),
    (["train", "new", "--data.tokenizer", "sentencepiece"], 2, "no tokenizer in sentencepiece"),
    (["train", "new", "--data.source", "texts/nowhere"], 2, "texts/nowhere does not exist"),
    (["study", "not.toml"], 2, "not.toml: Invalid value"),
    (["study", "latin.toml"], 2, "latin.toml: 'utf-8' codec"),
    (["study", "nan.toml"], 2, "run one/nano-full-seed0: train.learning_rate must be a finite number > 0, got nan"),
    (["plot", "study-no-record"], 2, "metrics.jsonl, line 1 has no 'kind'"),
    (["plot", "study-no-evaluation"], 2, "metrics.jsonl, line 1 has no 'lm_loss'"),
    # Numbers
    (setting("train.learning-rate", "nan"), 2, "train.learning_rate must be a finite number > 0, got nan"),
    (setting("train.learning-rate", "inf"), 2, "train.learning_rate must be a finite number > 0, got inf"),
    (setting("train.clip", "-1"), 2, "train.clip must be a finite number > 0, got -1"),
    (setting("train.clip", "0"), 2, "train.clip must be a finite number > 0, got 0"),
    (setting("train.beta1", "-1"), 2, "train.beta1 is a share in [0, 1), got -1"),
    (setting("train.beta2", "1"), 2, "train.beta2 is a share in [0, 1), got 1"),
    (setting("train.weight-decay", "nan"), 2, "train.weight_decay must be a finite number >= 0, got nan"),
    (setting("train.weight-decay", "-1"), 2, "train.weight_decay must be a finite number >= 0"),
    (setting("train.warmup", "nan"), 2, "train.warmup is a share in [0, 1], got nan"),
    (
        setting("train.warmup", "0.9", "--train.schedule", "wsd"),
        2,
        "train.warmup=0.9 and train.decay=0.2 are shares of",
    ),
    (setting("train.final-learning-rate", "-1"), 2, "train.final_learning_rate is a share"),
    (setting("train.seed", "-1"), 2, "train.seed must be >= 0, got -1"),
    (setting("train.seed", HUGE), 2, "train.seed must be at most 4294967295"),
    (setting("train.steps", HUGE), 2, "train.steps must be at most 2147483647"),
    (setting("train.batch-size", HUGE), 2, "train.batch_size must be at most"),
    (setting("data.length", HUGE), 2, "data.length must be at most"),
    (setting("data.hold-out", HUGE), 2, "data.hold_out must be at most"),
    (setting("data.vocab-size", HUGE), 2, "data.vocab_size must be at most"),
    (setting("arm.block-size", HUGE), 2, "block_size must be at most"),
    (setting("arm.key-conv", HUGE), 2, "key_conv must be at most 2147483647"),
    (setting("arm.top-k", HUGE), 2, "top_k must be at most"),
    (setting("arm.switch-at", "nan"), 2, "arm.switch_at is a share of the steps in [0, 1], got nan"),
    (setting("arm.full-layers", "3"), 2, "arm.full_layers=3 is of arm.name=hybrid, and arm.name is moba; set arm.name"),
    (setting("arm.switch-at", "0.5"), 2, "arm.switch_at=0.5 is of arm.name=time_hybrid, and arm.name is moba"),
    (setting("eval.batch-size", "0"), 2, "eval.batch_size must be >= 1, got 0"),
    (setting("eval.windows", HUGE), 2, "eval.windows must be at most"),
    (setting("model.overrides", "num_hidden_layers", "-1"), 2, "num_hidden_layers must be 1 to 10,000, got -1"),
    (setting("model.overrides", "hidden_size", "-64"), 2, "hidden_size must be >= 1, got -64"),
    (setting("model.overrides", "hidden_size", "1e20"), 2, "hidden_size"),
    (["generate", "run", "--prompt", "x", "--temperature", "nan"], 2, "--temperature must be a finite number >= 0"),
    (["generate", "run", "--prompt", "x", "--temperature", "-1"], 2, "--temperature must be a finite number >= 0"),
    (["generate", "run", "--prompt", "x", "--max-new-tokens", "0"], 2, "--max-new-tokens must be >= 1, got 0"),
    (["generate", "run", "--prompt", "x", "--max-new-tokens", HUGE], 2, "--max-new-tokens must be at most"),
    (["generate", "run", "--prompt", "x", "--seed", "-1"], 2, "--seed must be >= 0, got -1"),
    (["generate", "run", "--prompt", "x", "--seed", HUGE], 2, "--seed must be at most"),
    (["generate", "run", "--prompt", "x", "--prefill-chunk", "0"], 2, "--prefill-chunk must be >= 1, got 0"),
    (["evaluate", "needle", "run", "--lengths", "0"], 2, "--lengths must be >= 2, got 0"),
    (["evaluate", "needle", "run", "--lengths", HUGE], 2, "--lengths must be at most"),
    (["evaluate", "needle", "run", "--depths", "0"], 2, "--depths must be >= 1, got 0"),
    (["evaluate", "needle", "run", "--samples", HUGE], 2, "--samples must be at most"),
    (["evaluate", "needle", "run", "--seed", "-1"], 2, "--seed must be >= 0, got -1"),
    (["convert", "model", "out", "--block-size", "8", "--top-k", HUGE], 2, "top_k must be at most"),
    (["bench", "attention", "--minutes", "nan"], 2, "--minutes must be a finite number >= 0, got nan"),
    (["bench", "attention", "--minutes", "-1"], 2, "--minutes must be a finite number >= 0, got -1"),
    (["bench", "training", "--minutes", "nan"], 2, "--minutes must be a finite number >= 0, got nan"),
    (["bench", "training", "--step-seconds", "0"], 2, "--step-seconds must be a finite number > 0"),
    (["bench", "decode", "--lengths", "0"], 2, "--lengths must be >= 1, got 0"),
]


@pytest.mark.parametrize(
    ("words", "code", "said"), ROWS, ids=[" ".join(words)[:60].replace("\0", "0") for words, *_ in ROWS]
)
def test_odd_input_is_one_sentence(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(place)
    if words[:2] == ["train", "new"]:
        words = [*words[:2], *options_of(place), *words[2:]]
    before = set(place.iterdir())
    try:
        found = cli.main(words)
    except SystemExit as left:  # the reader of options leaves so
        found = int(str(left.code))
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert found == code, error
    assert said in error
    assert "Traceback" not in error
    assert set(place.iterdir()) - before <= {place / "new"}, "nothing is left"


def options_of(place: Path) -> list[str]:
    data = ["--data.source", "texts", "--data.cache", "cache", "--data.hold-out", "4", "--data.length", "32"]
    tokenizer = ["--data.tokenizer", "bytes"]
    return [*data, *tokenizer, "--model.size", "nano", "--eval.windows", "4", "--train.steps", "10"]


def test_refused_on_construction() -> None:
    for kind, values in (
        (TrainConfig, {"clip": float("nan")}),
        (TrainConfig, {"learning_rate": float("inf")}),
        (ArmConfig, {"switch_at": float("nan")}),
        (DataConfig, {"length": 2**40}),
        (EvalConfig, {"windows": 0}),
    ):
        with pytest.raises(ValueError, match=next(iter(values))):
            kind(**values)
    assert from_dict(RunConfig, to_dict(RunConfig())) == RunConfig()


@pytest.mark.parametrize("full", [OSError(28, "No space left on device", "a.png"), OSError(5, "Input/output error")])
def test_a_disk_that_is_full_while_drawing_is_one_sentence(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], full: OSError
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise full

    study = shutil.copytree(place / "study-no-record", place / f"study-{full.errno}")
    shutil.rmtree(study / "one")
    shutil.copytree(place / "run", study / "one" / "nano-full-seed0")
    monkeypatch.setattr(Figure, "savefig", fail)
    assert cli.main(["plot", str(study)]) == 2
    assert str(full.strerror) in capsys.readouterr().err
    monkeypatch.setattr(shutil, "copyfile", fail)
    assert cli.main(["convert", str(place / "model"), str(place / "out"), *CONVERT]) == 2
    assert str(full.strerror) in capsys.readouterr().err
    assert not (place / "out").exists()
