"""pixlat: pixel space against latent space in image generation.

Everything is imported as `pixlat.common`, `pixlat.methods`, `pixlat.evaluation` and `pixlat.launch`.
In a wheel these are folders of this package.
In a checkout they lie beside this folder, and the lines below let Python find them there,
with or without an installation.
"""

from pathlib import Path

__version__ = "0.2.0"

if not Path(__file__).with_name("common").is_dir():
    __path__.append(str(Path(__file__).resolve().parent.parent))
