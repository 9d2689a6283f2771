"""torch-fidelity's own command `fidelity`, with its options, also where torchvision does not fit the torch build.

Its import of torchvision fails beside a CPU build of torch that torchvision was not compiled for; nothing else differs.
"""

from wavelatent.common.torchvision_import import ensure_torchvision

if __name__ == "__main__":
    ensure_torchvision()
    from torch_fidelity.fidelity import main

    main()
