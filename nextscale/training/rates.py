"""Learning rate and weight decay of every step; the curves of the reference are among them."""

from __future__ import annotations

import math

from nextscale.training.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up to the peak, a plateau, then the decay to `final_lr` of the peak, which the last step has."""
    if step < config.warmup:
        first = 1 / (config.warmup + 1) if config.first_lr is None else config.first_lr
        return config.lr * (first + (1 - first) * step / config.warmup)
    # 0 after warm-up, 1 at the last step
    passed = (step - config.warmup) / max(1, config.steps - 1 - config.warmup)
    return config.lr * _shape(config, passed)


def weight_decay(config: TrainConfig, step: int) -> float:
    """Half a cosine from `weight_decay` to `final_weight_decay` over the whole run, warm-up included."""
    end = config.weight_decay if config.final_weight_decay is None else config.final_weight_decay
    cosine = math.cos(math.pi * step / max(1, config.steps - 1))
    return end + (config.weight_decay - end) * (1 + cosine) / 2


def _shape(config: TrainConfig, passed: float) -> float:
    end, t = config.final_lr, max(0.0, passed - config.hold) / (1 - config.hold)
    if config.decay == "constant":
        return 1.0
    if config.decay == "cosine":
        return end + (1 - end) * (1 + math.cos(math.pi * t)) / 2
    if config.decay == "exponential":
        return end**t
    if config.knee is None:
        return end + (1 - end) * (1 - t)
    # Two straight pieces; at the knee half-way between the straight line and 1.
    middle = (1 + end + (1 - end) * (1 - config.knee)) / 2
    if t < config.knee:
        return 1 + (middle - 1) * t / config.knee
    return end + (middle - end) * (1 - t) / (1 - config.knee)
