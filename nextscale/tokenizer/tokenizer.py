"""The tokenizer: images to token maps and back."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nextscale.contracts import Encoded, TrainablePyramid
from nextscale.schedule import Schedule
from nextscale.tokenizer.autoencoder import AutoencoderSettings, Decoder, Encoder
from nextscale.tokens import Tokens, first_tensor


class ImageTokenizer(nn.Module):
    """Encoder, pyramid, decoder. Images are [B, 3, H, W] in [-1, 1]; feature maps [B, C, H / stride, W / stride]."""

    def __init__(self, autoencoder: AutoencoderSettings, pyramid: TrainablePyramid) -> None:
        super().__init__()
        self.channels, self.stride = autoencoder.image_channels, autoencoder.stride
        self.pyramid = pyramid
        channels, kernel = pyramid.code_dim, autoencoder.around
        latent = autoencoder.latent or channels
        if not kernel and latent != channels:
            raise ValueError(
                f"around=0 leaves no convolution between {latent} latent channels and codes of {channels}; give the "
                "latent as many channels as a code, or around=1"
            )
        self.encoder = Encoder(autoencoder, latent)
        self.quant_conv: nn.Module = nn.Identity()
        self.post_quant_conv: nn.Module = nn.Identity()
        if kernel:
            self.quant_conv = nn.Conv2d(latent, channels, kernel, padding=kernel // 2)
            self.post_quant_conv = nn.Conv2d(channels, latent, kernel, padding=kernel // 2)
        self.decoder = Decoder(autoencoder, latent)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights of encoder and decoder."""
        return self.decoder.conv_in.weight.dtype

    def features(self, images: Tensor) -> Tensor:
        """The feature map that is quantized, float32 [B, C, H / stride, W / stride]."""
        if images.shape[-1] % self.stride or images.shape[-2] % self.stride:
            raise ValueError(
                f"image sides must be multiples of {self.stride} pixels, got {images.shape[-2]}x{images.shape[-1]}; "
                "resize or crop the images first"
            )
        return self.quant_conv(self.encoder(images.to(self.dtype))).float()

    def encode(self, images: Tensor, schedule: Schedule) -> Encoded:
        """Tokens, inputs and running sums of images (see `Encoded`)."""
        return self.pyramid.encode(self.features(images), schedule)

    def decode(self, f_hat: Tensor) -> Tensor:
        """Images of feature maps [B, C, h, w]; not clamped, since a loss needs the gradient beyond [-1, 1]."""
        return self.decoder(self.post_quant_conv(f_hat.to(self.dtype)))

    def f_hat(self, tokens: Sequence[Tokens], schedule: Schedule) -> Tensor:
        """The sum of the token maps of the first scales (all, or any prefix), [B, C, H, W]."""
        first = first_tensor(tokens[0])
        f_hat = self.pyramid.start(len(first), schedule, first.device)
        for k, token_map in enumerate(tokens):
            f_hat = self.pyramid.add(f_hat, token_map, k, schedule)
        return f_hat

    @property
    def networks(self) -> Sequence[nn.Module]:
        """Those that `compile` compiles while training."""
        return self.encoder, self.decoder

    @property
    def last_weight(self) -> Tensor:
        """Of the decoder's last convolution, where gradients of losses are compared."""
        return self.decoder.conv_out.weight
