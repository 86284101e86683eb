"""The reference loop that training is timed against computes what our transformer does."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nextscale.cli import main
from nextscale.draws import Draws
from nextscale.recipes.generators import var


def test_reference_loop_has_our_loss_and_gradients():
    path = Path(__file__).parent.parent / "benchmarks" / "reference.py"
    spec = importlib.util.spec_from_file_location("reference", path)
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    config = var.tiny()
    model = var.build(config, seed=1).model.train()
    other = reference.ReferenceVAR(config).copy_from(model)
    generator = torch.Generator().manual_seed(0)
    schedule = config.schedule
    labels = torch.randint(config.num_classes, (3,), generator=generator)
    inputs = torch.randn(3, schedule.length - 1, config.pyramid.code_dim, generator=generator)
    targets = torch.randint(32, (3, schedule.length), generator=generator)
    ours = model.head.loss(
        model.hidden(inputs, model.prepare(model.conditioner({"label": labels})), schedule.span()),
        targets,
        Draws(generator, 3),
    ).mean()
    theirs = F.cross_entropy(other(labels, inputs).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    ours.backward()
    theirs.backward()
    pairs = [
        (model.embed_input.weight, other.word.weight),
        (model.positions.table, other.positions),
        (model.blocks[0].branches[0].layer.qkv.weight, other.blocks[0].qkv.weight),
        (model.blocks[0].branches[0].layer.log_scale, other.blocks[0].log_scale),
        (model.blocks[1].modulation.linear.weight, other.blocks[1].modulation[1].weight),
        (model.head.linear.weight, other.head.weight),
    ]
    for mine, its in pairs:
        scale = float(its.grad.abs().max())
        torch.testing.assert_close(mine.grad, its.grad.view_as(mine.grad), atol=1e-4 * scale, rtol=0)


@pytest.mark.slow
def test_bench_train_prints_one_line_of_json(capsys):
    assert (
        main(["bench", "train", "--shape", "tiny", "--batch", "2", "--steps", "1", "--rounds", "1", "--json", "-"]) == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert {"ratio", "memory_ratio", "gemm_share"} <= set(report) and report["ratio"] > 0


def test_bench_refuses_before_it_measures(capsys):
    assert main(["bench", "train", "--batch", "0"]) == 2
    assert "--batch" in capsys.readouterr().err
