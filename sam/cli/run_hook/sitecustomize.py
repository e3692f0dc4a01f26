"""Python imports this as it starts, in every process of a program that ``sam run`` started: the folder is on its path.

Other Pythons that the program starts import it too: no syntax here that an old one would not read.
"""

import importlib
import os
import sys

_here = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry) != _here]  # the program finds the usual path

if os.environ.get("FASTSAM_RUN") == sys.prefix:
    from importlib.util import module_from_spec, spec_from_file_location

    _file = os.path.join(os.path.dirname(os.path.dirname(_here)), "drop_in.py")
    _spec = spec_from_file_location("_fastsam_drop_in", _file)
    assert _spec is not None
    assert _spec.loader is not None
    _drop_in = module_from_spec(_spec)
    _spec.loader.exec_module(_drop_in)
    _drop_in.serve_program("FASTSAM_REPLACE_LOCAL" in os.environ)

# Now the one that this one hides. Where there is none, ``site`` expects the ImportError.
del sys.modules["sitecustomize"]
importlib.import_module("sitecustomize")
