"""`python -m reg_diffusers` is `reg-diffusers`; this form suits launchers such as `accelerate launch -m`."""

from .cli import main

main()
