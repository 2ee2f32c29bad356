"""Published methods as a few lines of this library each: a function that returns the loss of the paper.

| module               | method                                                                | arXiv      |
|----------------------|-----------------------------------------------------------------------|------------|
| data_weights         | min-SNR and EDM, weights of the denoising loss                        | 2303.09556 |
| pidm                 | physics-informed diffusion, mean and sample estimation                | 2403.14404 |
| pbfm                 | physics-based flow matching, unrolled, with ConFIG                    | 2506.08604 |
| controlnet_plus_plus | the condition that a frozen network reads in x0_hat                   | 2404.07987 |
| lpl                  | features of the autoencoder's decoder                                 | 2411.04873 |
| pixelgen             | image prediction with LPIPS and DINO losses                           | 2602.02493 |
| srpo                 | a reward at any noise level, by known noise                           | 2509.06942 |
| draft                | a reward on samples, through the last K sampling steps (AlignProp)    | 2309.17400 |

These are implementations of this project, not of the authors. docs/recipes lists what differs from their code.
"""

from .controlnet_plus_plus import controlnet_plus_plus as controlnet_plus_plus
from .data_weights import draw_sigma as draw_sigma
from .data_weights import edm as edm
from .data_weights import min_snr as min_snr
from .draft import Draft as Draft
from .lpl import latent_perceptual as latent_perceptual
from .pbfm import pbfm as pbfm
from .pbfm import straight_path as straight_path
from .pidm import pidm as pidm
from .pixelgen import LastLayerRatio as LastLayerRatio
from .pixelgen import pixelgen as pixelgen
from .srpo import srpo as srpo
