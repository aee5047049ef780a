"""How many test images of a recipe `sape2 explain` calls unlike its training images: false alarms, by rule.

Command:  python benchmarks/unlike.py digits
          python benchmarks/unlike.py cifar10 --data DIR
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace

from sape2.config.recipes import get_recipe
from sape2.data import load_data
from sape2.data.picture import Picture, unlike


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--data")
    options = parser.parse_args(argv)
    config = get_recipe(options.recipe)
    data, size = replace(config.data, source=options.data), config.model.image_size
    images = load_data(data, config.model).test.images
    found = [unlike(Picture(pixels, size, 0.0), data, [size]) for pixels in images]
    print(f"{options.recipe}: {sum(map(bool, found))} of {len(images)} test images are called unlike the training images")
    for kind, number in Counter(each.kind for several in found for each in several).most_common():
        print(f"{number} {kind}")


if __name__ == "__main__":
    main()
