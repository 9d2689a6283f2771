"""Write the Inception weights that `wavelatent` measures with as torch-fidelity reads them: inception_file.py FILE.

torch-fidelity fetches them from an address of its own; this way both use the very same tensors and neither needs a
network. The classifier, which none of the figures here uses, is zeros.
"""

import sys
from pathlib import Path

import torch

from wavelatent.common.metric_weights import inception_weights

CLASSES, FEATURES = 1008, 2048


def main(path: Path) -> None:
    """Write the file, whole or not at all."""
    classifier = {"fc.weight": torch.zeros(CLASSES, FEATURES), "fc.bias": torch.zeros(CLASSES)}
    part = path.with_suffix(".part")
    torch.save({**inception_weights().tensors, **classifier}, part)
    part.replace(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
