"""The one prompt of a system, encoded once: prompt.safetensors in its folder, as encode_prompt.py writes it.

    text, about = read_prompt(folder / PROMPT)         # [1, L, D], and the file's metadata: the prompt in words
    write_prompt(folder, text, about)

    python -m mirage_min.systems.prompt                # one written and read, and two that are refused
"""

from pathlib import Path

import torch
from torch import Tensor

from ..networks import weights
from ..networks.hub import PROMPT


def read_prompt(file: str | Path) -> tuple[Tensor, dict[str, str]]:
    """The tensor `text` [1, L, D] of a file, and its metadata.

    ValueError naming the file if it cannot be read, has no `text`, or numbers that are not finite.
    """
    tensors, about = weights.load_tensors(file)
    if "text" not in tensors:
        raise ValueError(f"{file}: wanted a tensor `text` (encode_prompt.py), got {sorted(tensors)[:5]}")
    weights.check_finite("text", tensors["text"], file)
    return tensors["text"], about


def choose_prompt(file: str | Path | None, base: str | Path | None) -> Tensor | None:
    """`text` [1, L, D] of a file, if one is given, or else of the trained system in the folder `base`.

    None where there is neither. ValueError as in `read_prompt`.
    """
    if file is not None:
        return read_prompt(file)[0]
    if base is not None and Path(base, PROMPT).exists():
        return read_prompt(Path(base, PROMPT))[0]
    return None


def write_prompt(folder: Path, text: Tensor, about: dict[str, str] | None = None) -> None:
    """Write `text` [1, L, D] and metadata to the prompt file of a folder, atomically."""
    weights.save_tensors(folder / PROMPT, {"text": text}, about)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_prompt(Path(folder), torch.zeros(1, 3, 8), {"text": "remove degradation"})
        text, about = read_prompt(Path(folder, PROMPT))
        print(f"text {list(text.shape)}, {about}")
        for tensors in ({"embedding": text}, {"text": text / 0}):
            weights.save_tensors(Path(folder, PROMPT), tensors)
            try:
                read_prompt(Path(folder, PROMPT))
            except ValueError as error:
                print("refused:", str(error).replace(folder, "FOLDER"))
