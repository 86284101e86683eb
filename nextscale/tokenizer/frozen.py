"""Networks that are used and never trained."""

from __future__ import annotations

from typing import Any

from torch import nn


class Frozen(nn.Module):
    """A network inside another module that is never trained, nor part of its state.

    Its parameters become buffers that no state holds. So `.to(...)` reaches them, `state_dict` and `load_state_dict` do not
    know them, and neither an optimizer nor `requires_grad_` ever finds them; gradients still flow to what goes in. It stays
    in eval mode whatever its owner does.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        for module in network.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach(), persistent=False)
            for name, buffer in list(module.named_buffers(recurse=False)):
                module.register_buffer(name, buffer, persistent=False)
        self.network = network
        self.train(False)

    def train(self, mode: bool = True) -> Frozen:
        """Stays in eval mode."""
        return super().train(False)

    def forward(self, *values: Any) -> Any:
        return self.network(*values)
