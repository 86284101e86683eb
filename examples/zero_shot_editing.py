# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Editing without training
#
# A notebook as text: `jupytext --to ipynb examples/zero_shot_editing.py` makes one to click through, and
# `python examples/zero_shot_editing.py` runs it. Tokens of an image are kept where nothing shall change; all others are drawn
# (section 5.3 of VAR, arXiv 2404.02905).

# %%
import torch
from PIL import Image, ImageDraw

import nextscale as ns

system = ns.load("emoji-64")
source = ns.sample(system, ["face-smiling"], seed=2)
again = ns.decode(system, ns.encode(system, source))
print(f"the tokenizer gives the image back at {ns.psnr(again, source).item():.1f} dB")

# %% [markdown]
# ## In-painting
#
# A box is (top, left, bottom, right) in fractions of the image; what is inside is drawn anew, by the null class if no label is
# given.

# %%
box = (0.4, 0.2, 0.9, 0.8)
inpainted = ns.inpaint(system, source.repeat(4, 1, 1, 1), box=box, seed=0)
ns.image_grid(torch.cat([source, again, inpainted]), columns=6, labels=["image", "its tokens", *["in-painted"] * 4])

# %% [markdown]
# ## Out-painting
#
# The box is kept, and all around it is drawn.

# %%
outpainted = ns.outpaint(system, source.repeat(4, 1, 1, 1), (0.25, 0.25, 0.75, 0.75), seed=0)
ns.image_grid(torch.cat([source, outpainted]), columns=5, labels=["image", *["out-painted"] * 4])

# %% [markdown]
# ## Another class
#
# In-painting with a label puts something of that class there.

# %%
targets = ["cat-face", "heart", "flag"]
edited = torch.cat(
    [ns.class_edit(system, source, None, target, box=(0.1, 0.1, 0.9, 0.9), seed=1) for target in targets]
)
ns.image_grid(torch.cat([source, edited]), columns=4, labels=["image", *targets])

# %% [markdown]
# ## Images of any size, and masks
#
# With `fit` an image of any size comes back in its own; where the mask is False it is the same to the bit. `blend` lets the
# change fade in.

# %%
photo = Image.new("RGB", (300, 200), "white")
ImageDraw.Draw(photo).ellipse((90, 40, 210, 160), fill="gold", outline="black", width=5)
mask = torch.zeros(200, 300, dtype=torch.bool)
mask[90:150, 110:190] = True
result = ns.inpaint(system, photo, mask, "face-smiling", fit="pad", blend=6, seed=3)
assert result.shape == (1, 3, 200, 300)
ns.image_grid(result)

# %% [markdown]
# ## Variations, and what lies between two images
#
# The first scales stay and the finer ones are drawn anew; or one scale after the other goes over to another image.

# %%
varied = torch.cat([ns.vary(system, source, strength, "face-smiling", seed=1) for strength in (0.0, 0.3, 0.6, 1.0)])
between = ns.interpolate(system, source, ns.sample(system, ["heart"], seed=4), torch.linspace(0, 1, 4))
ns.image_grid(
    torch.cat([varied, between]),
    columns=4,
    labels=[*(f"strength {s:g}" for s in (0.0, 0.3, 0.6, 1.0)), *["between"] * 4],
)
