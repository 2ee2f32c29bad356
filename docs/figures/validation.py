"""The picture of held-out images in docs/data.md: the validation.png of a training on few images, for a long time.

python docs/figures/validation.py
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import PIL.Image
from shared import IMAGES, images

NUMBER, STEPS = 48, 1600
FLAGS = (
    f"--validation_split 0.25 --validation_steps 100 --max_train_steps {STEPS} --preview_steps {STEPS} --resolution 16"
    " --train_batch_size 12 --learning_rate 2e-3 --regularizer total_variation --prediction_type v_prediction"
    " --num_threads 1 --mixed_precision no"
).split()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for number, image in enumerate(images()[0][:NUMBER]):
            path = Path(folder, "photos", f"{number:03}.png")
            path.parent.mkdir(exist_ok=True)
            PIL.Image.fromarray(((image[0] + 1) * 127.5).round().byte().numpy()).save(path)
        script = Path(__file__).parents[2] / "train_reg.py"
        data = ["--train_data_dir", "photos", "--cache_dir", "cache", "--output_dir", "out"]
        subprocess.run([sys.executable, str(script), *data, *FLAGS], cwd=folder, check=True)
        shutil.copy(Path(folder, "out", "validation.png"), IMAGES / "validation.png")


if __name__ == "__main__":
    main()
