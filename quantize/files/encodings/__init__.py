"""How a weight can be stored in fewer bits. ENCODINGS is what lies in this folder; a new one is one file with `decode`.

`decode` takes the tensors of a model and gives them back with the weights of its encoding decoded: under their own
names, when they are read, and without the tensors that only describe them. A file without such weights it gives back
as it is.
"""

import sys
from collections.abc import Callable

from ....kernels.discover import modules
from ..tensor_file import TensorFile

Decode = Callable[[TensorFile], TensorFile]
ENCODINGS: list[Decode] = [module.decode for module in modules(sys.modules[__name__])]


def decoded(file: TensorFile) -> TensorFile:
    """The tensors of a model with every weight in 16 or 32 bits. Raises TensorFileError."""
    for decode in ENCODINGS:
        file = decode(file)
    return file
