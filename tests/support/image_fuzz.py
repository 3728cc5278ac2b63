"""Near-valid image files at random: each is decoded or refused with ImageError, in bounded time and memory.

    python -m support.image_fuzz SEED N_FILES SECONDS    (in tests/)

Prints the number of files that were decoded and refused, and the most memory in MB.
"""

from __future__ import annotations

import faulthandler
import random
import resource
import sys
import time
import warnings

import numpy as np
from PIL import Image

from pydiffusion import ImageError
from pydiffusion.vision.loading import open_image
from support.images import file_bytes, pattern, picture

_INTERESTING = (b"\0", b"\xff", b"\x7f", b"\x80", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff")


def seeds() -> list[bytes]:
    """Small valid files of every format and of the modes that its decoder treats apart."""
    color = Image.fromarray(pattern(40, 56, 3))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    files = [file_bytes(picture(mode, 30, 41), "PNG") for mode in ("L", "LA", "1", "P", "RGBA", "I;16")]
    files += [file_bytes(picture(mode, 30, 41), "TIFF") for mode in ("L", "1", "P", "RGBA", "CMYK", "I;16")]
    files += [file_bytes(color, "TIFF", compression=kind) for kind in ("tiff_lzw", "jpeg", "packbits")]
    files += [file_bytes(color, "JPEG", exif=exif), file_bytes(color, "JPEG", progressive=True)]
    files += [
        file_bytes(picture("CMYK", 30, 41), "JPEG"),
        file_bytes(picture("P-color", 30, 41), "PNG", exif=exif),
    ]
    files += [file_bytes(color, "WEBP", lossless=lossless) for lossless in (True, False)]
    files += [file_bytes(color, format) for format in ("BMP", "PPM", "JPEG2000", "ICO", "GIF")]
    frames = [Image.fromarray(pattern(40, 56, 3, seed)) for seed in (1, 2)]
    for format in ("GIF", "PNG", "WEBP", "TIFF"):
        files.append(file_bytes(color, format, save_all=True, append_images=frames))
    return files


def mutated(data: bytes, generator: random.Random) -> bytes:
    """The file with one to four changes, most of them near its beginning, where the headers are."""
    changed = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        end = min(len(changed), generator.choice((16, 64, 256, len(changed))))
        at = generator.randrange(max(1, end))
        kind = generator.randrange(6)
        if kind == 0:
            changed[at : at + 1] = generator.randbytes(1)
        elif kind == 1:
            some = generator.choice(_INTERESTING)
            changed[at : at + len(some)] = some
        elif kind == 2:
            del changed[at : at + generator.randint(1, 20)]
        elif kind == 3:
            changed[at:at] = generator.randbytes(generator.randint(1, 20))
        elif kind == 4:
            del changed[max(1, at) :]
        else:
            changed[at : at + 1] = bytes([changed[at] ^ (1 << generator.randrange(8))]) if changed else b""
    return bytes(changed)


def main() -> None:
    seed, n_files, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    faulthandler.enable()
    warnings.simplefilter("ignore")
    generator = random.Random(seed)
    valid = seeds()
    for data in valid:
        open_image(data)
    decoded = refused = 0
    end = time.monotonic() + seconds
    while decoded + refused < n_files and time.monotonic() < end:
        data = mutated(generator.choice(valid), generator)
        try:
            image = open_image(data)
        except ImageError as error:
            if "\n" in str(error):
                raise AssertionError(repr(error)) from error
            refused += 1
        else:
            assert image.mode == "RGB" and np.asarray(image).ndim == 3
            decoded += 1
    print(decoded, refused, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


if __name__ == "__main__":
    main()
