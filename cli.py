"""The command line: one command per pipeline, no logic. ``wavelatent --help`` lists them."""

import sys

if "wavelatent" not in sys.modules and __package__ in (None, ""):
    # Run as a file, or imported by the tests from a bare checkout: this folder is the namespace ``wavelatent``.
    from importlib.machinery import ModuleSpec
    from importlib.util import module_from_spec
    from pathlib import Path

    _spec = ModuleSpec("wavelatent", None, is_package=True)
    _spec.submodule_search_locations = [str(Path(__file__).resolve().parent)]
    sys.modules["wavelatent"] = module_from_spec(_spec)
