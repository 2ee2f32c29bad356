"""`python -m reg_diffusers` is `reg-diffusers`; this form suits launchers such as `accelerate launch -m`."""

import sys

from .cli import main

sys.argv[0] = "reg-diffusers"  # error messages begin with it
main()
