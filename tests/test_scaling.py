"""Power laws, and a whole ladder in small."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small import small

import nextscale as ns
from nextscale.cli import main
from nextscale.recipes.generators import var
from nextscale.training.ladder import parameters, rungs, shape
from nextscale.training.scaling import Training, fit_power, frontier, laws


def test_a_power_law_is_found_again():
    x = np.array([1e-4, 3e-4, 1e-3, 2e-3, 1e-2])
    law = fit_power(x, (2.0 * x) ** -0.23)
    assert law.exponent == pytest.approx(-0.23) and law.scale == pytest.approx(2.0) and law.r == pytest.approx(-1)
    assert law(5e-3) == pytest.approx((2.0 * 5e-3) ** -0.23)
    assert law.exponent_interval.low <= -0.23 <= law.exponent_interval.high


def test_the_intervals_hold_the_truth_about_as_often_as_they_say():
    draws, inside, rs = np.random.default_rng(0), 0, 0
    x = np.geomspace(1e-4, 1e-2, 6)
    for _ in range(400):
        law = fit_power(x, x**-0.2 * np.exp(draws.normal(0, 0.05, 6)))
        inside += law.exponent_interval.low <= -0.2 <= law.exponent_interval.high
        rs += law.r_interval.low <= law.r <= law.r_interval.high
    assert 0.9 < inside / 400 < 0.99 and rs == 400


@pytest.mark.parametrize(
    "x, y", [([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [1, -2, 3]), ([1, 2, 3], [1, 2, math.nan])]
)
def test_what_follows_no_law_is_refused(x, y):
    with pytest.raises(ValueError, match="power law"):
        fit_power(x, y)


def training(depth: int, seed: int = 0, off: float = 1.0) -> Training:
    """One whose loss is a law of its size at the end, and falls with the steps."""
    size = 18 * depth**3 * 100
    end = off * 3 * (size / 1e5) ** -0.1
    curve = {step: end * (1 + 10 / step) for step in (10, 100, 1000)}
    return Training(
        depth,
        10 * depth,
        seed,
        size,
        1e12 * size,
        dict.fromkeys(("loss_last", "loss_all", "error_last", "error_all"), curve),
    )


def test_laws_of_a_ladder():
    ladder = [training(depth, seed, 1 + 0.001 * seed) for depth in (2, 3, 4, 6, 8) for seed in (0, 1)]
    found = laws(ladder)["loss_all"]
    assert found["parameters"].exponent == pytest.approx(-0.1, abs=1e-6) and found["parameters"].points == 10
    assert found["parameters"].r < -0.999 and abs(found["largest"]["off"]) < 0.001
    surprise = [t if t.depth < 8 else training(8, t.seed, 2.0) for t in ladder]
    assert laws(surprise)["loss_all"]["largest"]["off"] == pytest.approx(-0.5, abs=0.01)


def test_the_frontier_is_what_least_compute_reaches():
    best = frontier([training(2), training(8)], "loss_all")
    assert [c for c, _ in best] == sorted(c for c, _ in best) and [v for _, v in best] == sorted(
        (v for _, v in best), reverse=True
    )
    for t in (training(2), training(8)):
        for step, value in t.curves["loss_all"].items():
            assert any(c <= t.compute(step) and v <= value for c, v in best)


def test_rungs_have_the_papers_proportions():
    (rung,) = rungs("out", (4,), 16, (3,))
    config = small(num_classes=3)
    settings = shape(config.transformer, rung)
    assert (settings.depth, settings.num_heads, settings.dim) == (4, 4, 64) and settings.drop_path == pytest.approx(
        0.1 * 4 / 24
    )
    system = var.build(config.model_copy(update={"transformer": settings}))
    n = parameters(system)
    assert n == pytest.approx(18 * 4 * 64**2, rel=0.02)  # and biases
    for wrong in ({"depths": ()}, {"depths": (2, 2)}, {"depths": (0,)}, {"width": 0}, {"seeds": (-1,)}):
        with pytest.raises(ValueError, match="whole number"):
            rungs("out", **{"depths": (2,), "width": 16, "seeds": (0,)} | wrong)


def test_a_ladder_is_trained_and_reported(tmp_path: Path, capsys):
    pytest.importorskip("tensorboard")
    draws = np.random.default_rng(0)
    for i in range(30):
        folder = tmp_path / "images" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    tokenizer = ns.save(var.build(small(sizes=(1, 2), num_classes=0)), tmp_path / "tokenizer")
    out = tmp_path / "ladder"
    words = [
        "scaling",
        "--out",
        str(out),
        "--tokenizer",
        str(tokenizer),
        "--data",
        str(tmp_path / "images"),
        "--width",
        "8",
    ]
    words += [
        "--depths",
        "1",
        "2",
        "3",
        "4",
        "--views",
        "1",
        "--steps",
        "3",
        "--batch-size",
        "4",
        "--validate-every",
        "1",
    ]
    assert main([*words, "--seeds", "1"]) == 0  # one process may do one seed
    assert main([*words, "--samples", "8"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out / "scaling.md")
    found = json.loads((out / "scaling.json").read_text())
    assert [(t["depth"], t["seed"]) for t in found["trainings"]] == [(d, s) for d in (1, 2, 3, 4) for s in (0, 1)]
    assert found["laws"]["loss_all"]["parameters"]["points"] == 8 and len(found["kid_lite0"]) == 4
    text = (out / "scaling.md").read_text()
    assert "foretold" in text and "Pearson r" in text and (out / "samples.png").exists()
    assert Image.open(out / "scaling.png").width > 1000
    for wrong, message in (
        (["--depths", "0"], "depths"),
        (["--samples", "1"], "at least 2"),
        (["--width", "1"], "width"),
    ):
        assert main([*words, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert main(["scaling"]) == 2 and "--out" in capsys.readouterr().err
