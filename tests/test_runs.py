"""How runs start, stop and go on: nothing of a user's is lost, nothing broken is called good, and what happened is said."""

import json
import os
import signal
import threading

import pytest
import torch
from small import small
from test_training import Squares

import nextscale as ns
from nextscale import cli, progress
from nextscale.encoded import encode_images
from nextscale.lock import alone_in
from nextscale.processes import Team
from nextscale.recipes.generators import var
from nextscale.training import checkpoints as rooms
from nextscale.training import fit as loop
from nextscale.training.checkpoints import Checkpoints
from nextscale.training.config import TokenizerLoss, TrainConfig
from nextscale.training.export import export_run
from nextscale.training.log import Progress, RunLog

DATA, VAL = Squares(12), Squares(4, seed=1)
OFTEN = {"batch_size": 4, "warmup": 1, "log_every": 1, "validate_every": 4, "save_every": 2, "ema": 0.9}
CONFIG = TrainConfig(steps=6, **OFTEN)
LOSS = TokenizerLoss(quantize_start=0.2, drop_scales=0.0, restart_every=0)


def tiny():
    return var.build(small(num_classes=3, classes=("red", "green", "blue")), seed=3)


def train(out, data=DATA, config=CONFIG, val=VAL):
    return ns.train_tokenizer(tiny(), data, config, out=out, val=val, loss=LOSS)


def generate(out, data=DATA, config=CONFIG, **options):
    return ns.train_model(tiny(), data, config, out=out, val=VAL, **options)


def stopped(monkeypatch, after, number=signal.SIGTERM, times=1):
    """The next training gets a signal in step `after`."""
    real = loop.set_rates

    def set_rates(optimizers, config, step):
        if step + 1 == after:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return real(optimizers, config, step)

    monkeypatch.setattr(loop, "set_rates", set_rates)


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- numbers that are not finite -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["module.a", "average.a", "optimizers.model.a.exp_avg", "module.frozen_buffer"])
def test_what_is_not_finite_is_never_called_good(name, bad, tmp_path):
    saved = Checkpoints(tmp_path, keep=2)
    saved.save({"module.a": torch.zeros(3), name: torch.tensor([1.0, 2.0])}, 1)
    with pytest.raises(FloatingPointError, match=f"diverged at step 2: lower --lr.*{name}"):
        saved.save({"module.a": torch.zeros(3), name: torch.tensor([1.0, bad])}, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"] and saved.newest().step == 1


def test_a_broken_image_is_named(tmp_path):
    data = Squares(4)
    data.items[2]["image"] = data.items[2]["image"] * float("nan")
    with pytest.raises((ValueError, FloatingPointError), match=r"item 2 holds numbers that are not finite|diverged"):
        train(tmp_path, data)
    assert not (tmp_path / "system").exists()


@pytest.mark.parametrize("verb", [train, generate])
def test_one_image_trains(verb, tmp_path):
    verb(tmp_path, Squares(1), TrainConfig(steps=3, **OFTEN | {"batch_size": 1}))
    assert all(p.isfinite().all() for p in ns.load(tmp_path).parameters())


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_cannot_be_read_stops_the_run(tmp_path, monkeypatch):
    stopped(monkeypatch, 4)
    with pytest.raises(SystemExit):
        train(tmp_path)
    before = content(tmp_path / "checkpoints")
    for door in ("digest", "read_json"):
        with monkeypatch.context() as patch:

            def fail(path, **options):
                raise OSError(5, "Input/output error", str(path))

            patch.setattr(rooms, door, fail)
            with pytest.raises(OSError, match=r"cannot be read .Input/output error.; nothing was changed"):
                train(tmp_path)
        assert content(tmp_path / "checkpoints") == before
    train(tmp_path)


DAMAGED = [
    "",
    "[]",
    "{}",
    '{"step": -1, "score": null, "files": {}, "facts": {}}',
    '{"step": 1e99, "score": null, "files": {}, "facts": {}}',
    '{"step": 4, "score": NaN, "files": {}, "facts": {}}',
    '{"step": 5, "score": null, "files": {}, "facts": {}}',
    '{"step": 4, "score": "high", "files": {}, "facts": {}}',
    '{"step": 4, "score": null, "files": {"../../x": "y"}, "facts": {}}',
    '{"step": 4, "score": null, "files": [1], "facts": {}}',
    '{"step": 4, "score": null, "files": {}, "facts": 7}',
    "[" * 2000 + "]" * 2000,
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps of six."""
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        stopped(patch, 4)
        with pytest.raises(SystemExit, match=r"stopped by SIGTERM after step 4, which is saved"):
            train(out)
    return out


@pytest.mark.parametrize("text", DAMAGED)
def test_what_a_checkpoint_holds_may_be_edited_by_anybody(text, run, tmp_path):
    import shutil

    copy = shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    (copy / "00000004" / "state.json").write_text(text)
    with pytest.warns(UserWarning, match=r"is damaged .* is left aside"):
        assert Checkpoints(copy, keep=2).newest().step == 2
    (copy / "00000002" / "state.json").write_text(text)
    with (
        pytest.warns(UserWarning, match=r"is damaged"),
        pytest.raises(ValueError, match=r"all checkpoints in .* are damaged"),
    ):
        Checkpoints(copy, keep=2).newest()


def test_a_run_that_has_not_ended_becomes_a_system(run, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"nextscale save .* --to FOLDER"):
        ns.load(run)
    assert cli.main(["save", str(run), "--to", str(tmp_path / "best")]) == 0
    assert cli.main(["save", str(run / "checkpoints" / "00000002"), "--to", str(tmp_path / "early")]) == 0
    found = Checkpoints(run / "checkpoints", keep=1)
    for name, step in (("best", max(found.all(), key=lambda one: one.score or -1e9).step), ("early", 2)):
        system, names = ns.load(tmp_path / name), {}
        for key, tensor in system.tokenizer.state_dict().items():
            place = f"average.tokenizer.{key}"
            names[place if place in found._complete()[step].shapes() else f"module.tokenizer.{key}"] = tensor
        tensors = {place: torch.empty_like(tensor) for place, tensor in names.items()}
        found._complete()[step].fill(tensors)
        assert all(torch.equal(tensors[place], tensor) for place, tensor in names.items())
    capsys.readouterr()
    assert cli.main(["save", str(run), "--to", str(tmp_path / "best")]) == 2
    assert "holds a system already" in capsys.readouterr().err


def test_a_run_that_has_ended_needs_no_start(tmp_path):
    system = generate(tmp_path)
    assert not (tmp_path / "start").exists()
    export_run(tmp_path / "checkpoints" / "00000006", tmp_path / "again")
    again = ns.load(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(system.parameters(), again.parameters(), strict=True))


def test_to_train_longer_is_told(run):
    with pytest.raises(ValueError, match=r"steps was 6, now 60; to train longer: --init-from .* and another --out"):
        train(run, config=CONFIG.model_copy(update={"steps": 60}))


# ---- other data ------------------------------------------------------------------------------------------------------


def relabelled():
    data = Squares(12)
    data.items[5] = data.items[5] | {"label": 0, "labels": (0,)}
    return data


OTHERS = {"content": Squares(12, seed=9), "labels": relabelled()}


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_goes_on_with_its_own_data_alone(name, run):
    data = OTHERS[name]
    data = data.items  # a list, so that all of it is looked at
    with pytest.raises(ValueError, match=r"began with other data: as many images, but"):
        train_list = Squares(12).items
        assert len(train_list) == len(data)
        resumed = run.parent / f"list-{name}"
        with pytest.MonkeyPatch.context() as patch:
            stopped(patch, 2)
            with pytest.raises(SystemExit):
                train(resumed, train_list)
        train(resumed, data)


def test_a_cache_of_other_labels_is_refused(tmp_path):
    system = tiny()
    encode_images(system, Squares(12).items, tmp_path, strict=True)
    for data in (relabelled().items, Squares(12, seed=9).items):
        with pytest.raises(ValueError, match=r"encoded with another"):
            encode_images(system, data, tmp_path, strict=True)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def fewer(path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, "pt") as file:
        about = file.metadata()
    save_file({name: tensor[:-1].contiguous() for name, tensor in load_file(path).items()}, path, metadata=about)


def typed(path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, "pt") as file:
        about = file.metadata()
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(path).items()}, path, metadata=about)


DAMAGES = {
    "a flipped bit": flip,
    "fewer rows": fewer,
    "another type": typed,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "no digest": lambda path: path.with_suffix(".blake2b").unlink(),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_shard_is_encoded_again(name, tmp_path):
    system = tiny()
    before = encode_images(system, DATA, tmp_path)
    DAMAGES[name](tmp_path / "shard-00000.safetensors")
    with pytest.warns(UserWarning, match=r"1 files in .* are not what was written \(shard-00000"):
        after = encode_images(system, DATA, tmp_path)
    assert torch.equal(before.content, after.content) and len(after) == len(DATA)


@pytest.mark.parametrize("text", ["", "[]", '{"key": []}', '{"key": {"images": 1}}', "[" * 5000])
def test_an_index_may_be_edited_by_anybody(text, tmp_path):
    system = tiny()
    encode_images(system, DATA, tmp_path)
    (tmp_path / "index.json").write_text(text)
    assert len(encode_images(system, DATA, tmp_path)) == len(DATA)
    with pytest.raises(ValueError, match=r"encoded with another"):
        (tmp_path / "index.json").write_text(text)
        encode_images(system, DATA, tmp_path, strict=True)


# ---- the log ---------------------------------------------------------------------------------------------------------


def test_a_log_that_is_taken_away_is_made_again(tmp_path):
    log = RunLog(tmp_path, 4, "tokenizer")
    log.scalars(1, {"loss": 1.0}, "train")
    (tmp_path / "metrics.jsonl").unlink()
    log.scalars(2, {"loss": 0.5}, "train")
    log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [2]


def test_lines_that_are_no_metrics_stay_in_a_copy(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = b'{"step": 1}\n\xff\xfe\n{"step": "x"}\n{"step": 2}\n{"step": 9}\n{"st'
    path.write_bytes(lines)
    with pytest.warns(UserWarning, match=r"metrics.damaged.jsonl"):
        RunLog(tmp_path, 4, "tokenizer", first=2).close()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == lines


def test_without_a_terminal_there_are_plain_lines(capsys, monkeypatch):
    monkeypatch.setattr(progress.Bar, "EVERY", 0.0)
    with Progress(2, 0, "tokenizer", silent=False) as bar:
        bar.show_loss(0.25)
        bar.update()
        with bar.doing("validating"):
            pass
        bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" left")[0].rpartition(", ")[0] or line for line in lines] == [
        "tokenizer: step 1/2, loss 0.2500",
        "tokenizer: step 1/2",
        "tokenizer: step 2/2, loss 0.2500",
    ]
    with Progress(2, 0, "tokenizer", silent=True) as bar:
        bar.update()
    assert not capsys.readouterr().err


def test_the_first_line_says_what_the_run_is(tmp_path, capsys):
    train(tmp_path)
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("tokenizer: 12 images"))
    assert "3 classes, 4 held out, 32x32 px" in line and "k parameters; 6 steps of 4" in line
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0 and first["data"]["images"] == 12
    assert json.loads((tmp_path / "run.json").read_text())["data"]["held_out"] == 4


# ---- two at once, signals, workers -----------------------------------------------------------------------------------


def test_two_trainings_in_one_folder_are_refused(tmp_path):
    with (
        alone_in(tmp_path),
        pytest.raises(BlockingIOError, match=rf"in use by another training \(process {os.getpid()} on "),
    ):
        train(tmp_path)
    with alone_in(tmp_path / "g"), pytest.raises(BlockingIOError, match="in use by another training"):
        ns.train_model(var.build(small(), seed=1), DATA, TrainConfig(steps=1, batch_size=2), out=tmp_path / "g")
    assert not (tmp_path / "g" / "encoded").exists()  # which a second one would take away from the first
    train(tmp_path)  # whoever held it let go


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_saves_and_a_second_one_stops_at_once(times, tmp_path, monkeypatch):
    stopped(monkeypatch, 3, signal.SIGINT, times)
    with pytest.raises(KeyboardInterrupt) as stop:
        train(tmp_path)
    assert ("stopped by Ctrl-C after step 3, which is saved" in str(stop.value)) == (times == 1)
    assert Checkpoints(tmp_path / "checkpoints", keep=2).newest().step == (3 if times == 1 else 2)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Vanishing(Squares):
    """Its files are taken away while it is read; or the process that reads is killed."""

    def __init__(self, how):
        super().__init__(12)
        self.how, self.read = how, 0

    def __getitem__(self, i):
        self.read += 1
        if self.read > 30 and self.how == "file":
            raise FileNotFoundError(f"no such image file: photos/{i}.png")
        if self.read > 30 and threading.current_thread() is threading.main_thread() and self.how == "worker":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


@pytest.mark.parametrize(("how", "workers"), [("file", 0), ("file", 1), ("worker", 1)])
def test_what_fails_while_images_are_read_is_one_sentence(how, workers, tmp_path):
    config = TrainConfig(steps=40, **OFTEN | {"validate_every": 100, "workers": workers})
    with pytest.raises(
        OSError, match=r"(reading images failed|loads images died) .*the checkpoint of step \d+ in .* is whole"
    ) as error:
        ns.train_tokenizer(tiny(), Vanishing(how), config, out=tmp_path, loss=LOSS)
    assert "\n" not in str(error.value) and ("photos/" in str(error.value)) == (how == "file")


@pytest.mark.parametrize("name", ["metrics.jsonl", "encoded/index.json"])
def test_a_pipe_in_a_run_is_not_waited_for(name, tmp_path, monkeypatch):
    stopped(monkeypatch, 4)
    with pytest.raises(SystemExit):
        generate(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    if name == "metrics.jsonl":
        with pytest.raises(ValueError, match="is no ordinary file; expected the run's own metrics"):
            generate(tmp_path)
    else:
        generate(tmp_path)
        assert (tmp_path / name).is_file()


STALE = [
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set .* RANK is not"),
    ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK is not"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
    ({"WORLD_SIZE": "-1"}, "WORLD_SIZE='-1'"),
    ({"WORLD_SIZE": "9" * 30}, "WORLD_SIZE='999"),
    ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK='x'"),
]


@pytest.mark.parametrize(("environment", "said"), STALE)
def test_a_stale_environment_is_named(environment, said, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        Team.of_environment()
