# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Sampling
#
# A notebook as text: `jupytext --to ipynb examples/sampling.py` makes one to click through, and `python examples/sampling.py`
# runs it. It draws with the system that comes with nextscale.

# %%
import torch

import nextscale as ns

system = ns.load("emoji-64")
print(system)

# %% [markdown]
# ## Images of labels
#
# Image i draws from seed + i: the same call gives the same images, alone or in a batch.

# %%
labels = ["face-smiling", "cat-face", "heart", "person"] * 2
images = ns.sample(system, labels, seed=0)
assert torch.allclose(images[3:4], ns.sample(system, ["person"], seed=3), atol=1e-4)
ns.image_grid(images, columns=4, labels=labels)

# %% [markdown]
# ## Coarse to fine
#
# An image is made scale by scale. `on_scale` sees what the tokens so far give.

# %%
steps = []
ns.sample(system, ["face-smiling"], seed=1, on_scale=lambda k, image: steps.append(image))
sizes = [f"{height}x{width}" for height, width in system.schedule.sizes]
ns.image_grid(torch.cat(steps), columns=len(steps), labels=sizes)

# %% [markdown]
# ## Guidance
#
# A weight of 1 is off; a ramp lets it rise from scale to scale, up to the weight at the last one.

# %%
weights = [1.0, 2.0, 4.0, 8.0]
rows = [ns.sample(system, ["cat-face"] * 4, seed=0, guidance=ns.cfg_ramp(weight)) for weight in weights]
ns.image_grid(torch.cat(rows), columns=4, labels=[f"guidance {weight:g}" for weight in weights for _ in range(4)])

# %% [markdown]
# ## Which tokens are taken
#
# Few likely ones, many, or a soft mixture of them (Gumbel softmax), which is smoother.

# %%
picks = {
    "the likeliest": ns.greedy,
    "top-k 20": ns.top_k_top_p(20, 0.0),
    "all": ns.multinomial,
    "smooth": ns.gumbel_soft(50, 0.95),
}
rows = [ns.sample(system, ["heart"] * 4, seed=0, pick=pick) for pick in picks.values()]
ns.image_grid(torch.cat(rows), columns=4, labels=[name for name in picks for _ in range(4)])

# %% [markdown]
# ## Step by step
#
# The loop in hand: a state can be stepped twice, so one beginning may have several endings.

# %%
state = ns.start(system, ["face-smiling"], seed=5)
while state.k < 3:
    state = ns.step(system, state)
early = ns.finish(system, state)
final = ns.finish(system, ns.run(system, state))
ns.image_grid(torch.cat([early, final]), labels=["after 3 scales", "after all"])
