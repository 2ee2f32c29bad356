#!/usr/bin/env bash
# What a new user pastes in the first hour, after the first command of README has made the environment. Run it in the
# folder of the repository: docs/first_hour.sh [FOLDER]. All files go to FOLDER, by default a new temporary one.
set -euo pipefail
source .venv/bin/activate
folder=${1:-$(mktemp -d)}
mkdir -p "$folder"
cd "$folder"
run() { printf '\n$ %s\n' "$*"; "$@"; }

run reg-diffusers --version
run reg-diffusers env

# Photos and a loss of your own: here 64 gradients in two tints, and a wish for a quiet border.
python - <<'PY'
import numpy as np
from pathlib import Path
from PIL import Image

ramp, generator = np.linspace(0, 255, 24), np.random.default_rng(0)
for number in range(64):
    tint = [(1, 0.6, 0.4), (0.4, 0.6, 1)][number % 2]
    pixels = np.roll(ramp, generator.integers(24))[None, :, None] * np.ones((24, 1, 1)) * tint
    path = Path("photos", ["warm", "cold"][number % 2], f"{number}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
PY
cat > my_module.py <<'PY'
class MyReg:
    def __call__(self, x):
        return (x[..., 0] ** 2).flatten(1).mean(1)
PY

# Ask, twice.
ask=(reg-diffusers diagnose --train_data_dir photos --resolution 16 --regularizer my_module:MyReg --num_levels 4)
run "${ask[@]}"
run "${ask[@]}" --verbose > verdict.txt
grep -q "Verdict: MyReg" verdict.txt
test -s diagnosis/MyReg.png

# Train, stop by Ctrl-C, paste the command that is printed.
train=(reg-diffusers train --train_data_dir photos --resolution 16 --regularizer my_module:MyReg --reg_weight 0.1)
train+=(--compare --output_dir run --train_batch_size 8 --ddpm_num_inference_steps 5 --preview_steps 1000)
train+=(--lr_scheduler constant --max_train_steps 100000)
printf '\n$ %s   (and Ctrl-C)\n' "${train[*]}"
set -m # so that Ctrl-C is not ignored in the background
"${train[@]}" > training.txt 2>&1 &
until [ -s run/metrics.jsonl ]; do
    sleep 0.5
    kill -0 $! || { cat training.txt; exit 1; }
done
kill -INT $!
wait $!
printed=$(grep -o "stopped by SIGINT; continue with: .*" training.txt | cut -d : -f 2-)
steps=$(($(ls -d run/checkpoint-* | tr -dc '0-9\n' | sort -n | tail -1) + 5))
printf '\n$%s --max_train_steps %s\n' "$printed" "$steps"
eval "$printed --max_train_steps $steps"
test -s run/comparison.png -a -s run/plain/unet/diffusion_pytorch_model.safetensors -a -s run/README.md

# Look at the result.
run reg-diffusers sample --model run --num_images 8 --num_inference_steps 5
run reg-diffusers evaluate --model run --model run/plain --regularizer my_module:MyReg --num_images 20 \
    --num_inference_steps 5 --features pixels
test -s evaluation/index.html
printf '\nall files are in %s\n' "$folder"
