"""What a name, a record, an opening and the export may be: the very code by which the stacks in `pulumi/` read them.

One meaning of "valid" in the whole project: what the portal takes in, no stack refuses later. The package is pure
Python and lies beside the portal in every checkout and archive (portal/build); it is found by its place, as the
protocol's schema is, so that nothing else in that folder can be imported by accident. Nobody but this module names it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "pulumi" / "remotegpu_network"


def _make_known() -> None:
    """So that `import remotegpu_network` works in this process: where it is installed or on the path, it is already."""
    if importlib.util.find_spec("remotegpu_network") is not None:
        return
    spec = importlib.util.spec_from_file_location(
        "remotegpu_network", PACKAGE / "__init__.py", submodule_search_locations=[str(PACKAGE)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{PACKAGE} is missing: the portal was unpacked in part")
    module = importlib.util.module_from_spec(spec)
    sys.modules["remotegpu_network"] = module
    spec.loader.exec_module(module)


_make_known()

from remotegpu_network import desired, document, names, openings, records, settings  # noqa: E402 - found just now

__all__ = ["desired", "document", "names", "openings", "records", "settings"]
