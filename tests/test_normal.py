"""`nextscale check-run`: a run like the one that the bands were made of is normal; one that is not is told where."""

import json

import pytest

from nextscale.cli import main
from nextscale.evaluation import normal


def write(out, factor: float = 1.0, since: int = 0, batch_size: int = 4):
    out.mkdir()
    (out / "run.json").write_text(json.dumps({"kind": "generator", "config": {"batch_size": batch_size}}))
    lines = []
    for i in range(1, 101):
        step = 40 * i // batch_size  # 10 images a line
        value = 2 + 8 / i
        changed = value * (factor if step * batch_size >= since else 1)
        lines.append({"step": step, "train/loss": changed, "train/grad_norm": 1.0})
        if i % 10 == 0:
            lines.append({"step": step, "val/loss": changed})
    lines.append({"step": 400 // batch_size, "alarm": "a sentence"})
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


@pytest.fixture
def bands(tmp_path, monkeypatch):
    made = {"mine": {"generator": normal.bands_of(write(tmp_path / "good"), "generator", 4)}}
    monkeypatch.setattr(normal, "presets", lambda: made)


def test_runs_are_compared_by_the_images_they_saw(tmp_path, bands, capsys):
    assert normal.check_run(tmp_path / "good", "mine") == []
    assert normal.check_run(write(tmp_path / "other", batch_size=8), "mine") == []
    found = normal.check_run(write(tmp_path / "bad", factor=1.5, since=2000), "mine")
    assert {departure.metric for departure in found} == {"train/loss", "val/loss"}
    assert all(2000 <= departure.images <= 2100 and departure.value > departure.high for departure in found)
    assert main(["check-run", str(tmp_path / "good"), "--preset", "mine"]) == 0
    with pytest.raises(SystemExit) as end:
        main(["check-run", str(tmp_path / "bad"), "--preset", "mine"])
    assert end.value.code == 1 and "train/loss is above its band for 5" in capsys.readouterr().out


def test_mistakes_are_told(tmp_path, bands, capsys):
    with pytest.raises(ValueError, match="no bands for the preset 'x'; there are mine"):
        normal.check_run(tmp_path / "good", "x")
    assert main(["check-run", str(tmp_path), "--preset", "mine"]) == 2
    assert "run.json" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no run of a tokenizer"):
        normal.bands_of(tmp_path / "good", "tokenizer", 4)


def test_shipped_bands_are_whole():
    for kinds in normal.presets().values():
        for kind, metrics in kinds.items():
            assert set(metrics) == set(normal.WATCHED[kind])
            for band in metrics.values():
                assert len(band["images"]) == len(band["low"]) == len(band["high"]) > 1
                assert band["images"] == sorted(band["images"])
                assert all(low < high for low, high in zip(band["low"], band["high"], strict=True))
