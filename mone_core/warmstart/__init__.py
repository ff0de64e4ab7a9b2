"""Weights that were trained elsewhere, or as another model, as a beginning.

    tensors = read_npz("B_16-i21k.npz")           # or safetensors, read by the caller
    theirs = config_of(tensors)                   # sizes, GELU flavour and LN eps of the file
    model = build_model(replace(theirs, num_classes=10, nesting=NestingConfig()))
    report = load(model, tensors, allow=["head"]) # says what stayed fresh and what was left out

A file's family is known by its parameter names (`names`), turned into this package's names and
shapes (`convert`), and fitted to a model that may differ from it in what training can mend (`fit`):
size of the image, frames, nesting, experts, head. All else is an error that lists every parameter
concerned at once; nothing is dropped or left fresh without being reported.

Files are read by the caller, but for `.npz`, which numpy reads.
"""

from mone_core.warmstart.convert import Weights, config_of, convert, read_npz
from mone_core.warmstart.fit import Allowed, Report, load, upcycle
from mone_core.warmstart.names import Family, Source, Tensors, source_of
from mone_core.warmstart.problems import in_few_words
from mone_core.warmstart.sizes import Stated

__all__ = [
    "Allowed",
    "Family",
    "Report",
    "Source",
    "Stated",
    "Tensors",
    "Weights",
    "config_of",
    "convert",
    "in_few_words",
    "load",
    "read_npz",
    "source_of",
    "upcycle",
]
