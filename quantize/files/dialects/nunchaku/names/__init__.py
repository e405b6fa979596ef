"""Names of layers in Nunchaku files, one model family per file. NAME_MAPS is what lies in this folder."""

import sys

from ......kernels.discover import modules
from ..tables import NameMap

NAME_MAPS: dict[str, NameMap] = {module.NAMES.name: module.NAMES for module in modules(sys.modules[__name__])}
