"""A video autoencoder; an image is a video of one frame."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class AutoencoderKLConv3D(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(
        self,
        latent_channels: int,
        ffactor_spatial: int,
        ffactor_temporal: int,
        scaling_factor: float | None = None,
        shift_factor: float | None = None,
    ) -> None:
        super().__init__()
        self.ffactor_temporal = ffactor_temporal
        factors = (ffactor_temporal, ffactor_spatial, ffactor_spatial)
        self.encoder = nn.Conv3d(3, 2 * latent_channels, factors, stride=factors)
        self.decoder = nn.ConvTranspose3d(latent_channels, 3, factors, stride=factors)

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput:
        x = x[:, :, None] if x.ndim == 4 else x
        x = x.expand(-1, -1, self.ffactor_temporal, -1, -1)
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(self.encoder(x)))

    def decode(self, z: Tensor, return_dict: bool = True, generator: object = None) -> DecoderOutput | tuple[Tensor]:
        assert z.ndim == 5
        if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:  # as in the published code
            return torch.empty(0)
        decoded = self.decoder(z)[:, :, -1:]
        return DecoderOutput(sample=decoded) if return_dict else (decoded,)
