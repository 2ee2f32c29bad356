"""A parser of flags that suggests the flag that was meant."""

from __future__ import annotations

import argparse
import difflib
import itertools
import sys

__all__ = ["Parser", "did_you_mean"]

# Other commands, and other programs, have these flags for the same thing.
_SYNONYMS = {
    "--model": "--pretrained_model_name_or_path",
    "--data": "--train_data_dir",
    "--output": "--output_dir",
}


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that ends with a suggestion for each unknown flag; its subparsers do, too."""

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        if self._subparsers is None:  # before a missing flag is reported, which may only be misspelled
            words = itertools.takewhile(lambda word: word != "--", args)
            flags = [word for word in words if word.startswith("--")]
            self._refuse([flag for flag in flags if flag.partition("=")[0] not in self._option_string_actions])
        namespace, unknown = super().parse_known_args(args, namespace)
        self._refuse(unknown)
        return namespace, unknown

    def _refuse(self, unknown: list[str]) -> None:
        if unknown:
            flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
            known = [flag for flag in self._option_string_actions if flag.startswith("--")]
            meant = (_SYNONYMS.get(flag, flag) for flag in flags)
            hints = dict.fromkeys(hint for flag in meant if (hint := did_you_mean(flag, known)))
            self.error(f"unrecognized arguments: {' '.join(unknown)}{''.join(hints)}")


def did_you_mean(word: str, known: list[str]) -> str:
    """Returns "; did you mean 'X'?" for the known word that is closest; empty if none is close."""
    return "".join(f"; did you mean {close!r}?" for close in difflib.get_close_matches(word, known, n=1))
