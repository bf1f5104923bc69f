"""The commands of `hga-kvd` beside the daemon itself, one file each. They may print; they own no process state.

Exit codes: 0 done and sound, 1 done and something is wrong (it is named), 2 refused: the arguments, or nothing was done.
"""

from __future__ import annotations

from collections.abc import Callable

from hga_kvd.commands.bench import bench
from hga_kvd.commands.dump import dump
from hga_kvd.commands.stat import stat
from hga_kvd.commands.transfer import export, import_
from hga_kvd.commands.verify import verify

COMMANDS: dict[str, Callable[..., None]] = {
    "stat": stat,
    "bench": bench,
    "export": export,
    "import": import_,
    "verify": verify,
    "dump": dump,
}
