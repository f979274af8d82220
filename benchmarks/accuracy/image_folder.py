"""A CIFAR-10 config that reads folders of image files, for a re-encoded copy of the data: the config, on stdout.

    python benchmarks/accuracy/image_folder.py yaml_configs/cifar10/teacher_resnet18.yaml data/cifar10 > teacher.yaml

The folder holds train/ and test/, each with a folder per class, as torchvision's ImageFolder wants them.
"""

import argparse
import re
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    print(reading_folders(args.config.read_text(), args.folder), end="")


def reading_folders(text: str, folder: Path) -> str:
    """The text of a config whose CIFAR-10 is read from ``folder``."""
    text, keys = re.subn(r"torchvision\.datasets\.CIFAR10\b", "torchvision.datasets.ImageFolder", text)
    text, roots = re.subn(
        r"root: [&*]root.*\n +train: (True|False)\n +download: True\n",
        lambda match: f"root: '{(folder / ('train' if match[1] == 'True' else 'test')).as_posix()}'\n",
        text,
    )
    if not keys == roots > 1:
        sys.exit("the config must read torchvision's CIFAR10 for training and testing, as yaml_configs/cifar10 do")
    return text


if __name__ == "__main__":
    main()
