r"""Checks that a wheel holds the files of the package, all and only, its types and the licence."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

wheel = sys.argv[1]
names = set(zipfile.ZipFile(wheel).namelist())
print("\n".join(sorted(names)))

package = {path.as_posix() for path in Path("pyro_vaediff").rglob("*") if path.is_file()}
package = {name for name in package if "__pycache__" not in name}
packed = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
licence = any(name.endswith("/licenses/LICENSE") for name in names)
typed = "pyro_vaediff/py.typed" in packed
if package != packed or not licence or not typed:
    found = f"it has a licence: {licence}, types: {typed}"
    sys.exit(f"{wheel} differs from the tree in {package ^ packed}; {found}")
