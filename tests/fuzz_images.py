"""Images, zips and npz files for tests/fuzz.py, read as data sets."""

import io
import random
import stat
import struct
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from data.datasets import ImageSet, load_images
from data.decode import BadImage, decode_rgb, fit_square
from data.sources import find_source, is_image_name
from functions.support.errors import UserError
from tests.fuzz_kinds import OTHER, SAME, Case, Fault
from tests.fuzz_mutations import damage, rezip, zip_headers

SIZE = 8
UNNOTICED = "read with other pixels (formats without a checksum)"
PART = "read in part, and said so: the others are as they were"


def encoded(image: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def pictures() -> dict[str, bytes]:
    """One of each form that data sets have, smooth enough to be small."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 200, 12 * 12 * 3).reshape(12, 12, 3)
    rgb = Image.fromarray((ramp + rng.integers(0, 50, ramp.shape)).astype(np.uint8))
    exif, text = Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x0112], exif[0x010F] = 6, "maker"
    text.add_text("Comment", "a face", zip=True)
    grey16 = Image.fromarray(np.asarray(rgb)[..., 0].astype(np.uint16) * 257)
    return {
        "rgb.png": encoded(rgb, "PNG", pnginfo=text, exif=exif),
        "other.png": encoded(rgb.rotate(90), "PNG"),
        "palette.png": encoded(rgb.convert("P"), "PNG", transparency=0),
        "grey.png": encoded(rgb.convert("LA"), "PNG"),
        "grey16.png": encoded(grey16, "PNG"),
        "photo.jpg": encoded(rgb, "JPEG", exif=exif),
        "progressive.jpg": encoded(rgb, "JPEG", progressive=True, quality=95),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "lossless.webp": encoded(rgb, "WEBP", lossless=True),
        "lossy.webp": encoded(rgb.convert("RGBA"), "WEBP", exif=exif),
        "bitmap.bmp": encoded(rgb, "BMP"),
        "packed.bmp": encoded(rgb.convert("P"), "BMP"),
    }


class Images:
    """A folder with a good image and a spoilt one."""

    name, errors = "image", (UserError,)

    def __init__(self, folder: Path):
        self.files = pictures()
        self.pixels = {name: fit_square(decode_rgb(data), SIZE) for name, data in self.files.items()}

    def make(self, folder: Path, rng: random.Random) -> Case:
        name, other = rng.choice(sorted(self.files)), rng.choice(sorted(self.files))
        (folder / "set").mkdir()
        (folder / "set" / "good.png").write_bytes(self.files["rgb.png"])
        path = folder / "set" / name
        path.write_bytes(damage(self.files[name], self.files[other], rng))
        return Case(path, value=[self.pixels[name], self.pixels[other]])

    def read(self, case: Case) -> ImageSet:
        try:
            return load_images(str(case.path.parent), SIZE, quiet=True)
        except UserError as error:
            refused = error
        try:
            decode_rgb(case.path.read_bytes())
        except BadImage:  # so does the decoder by itself; with the bad one left out, the good one is there
            self.check(load_images(str(case.path.parent), SIZE, 1, quiet=True))
            raise refused from None
        raise Fault("refused as a data set, but the decoder takes it") from refused

    def check(self, image_set: ImageSet) -> None:
        good = image_set.ids.index("good.png") if "good.png" in image_set.ids else None
        if good is None or not np.array_equal(image_set.images[good], self.pixels["rgb.png"]):
            raise Fault("the good image beside it is not as it was")

    def judge(self, case: Case, result: ImageSet) -> str:
        self.check(result)
        pixels = result.images[result.ids.index(case.path.name)]
        if any(np.array_equal(pixels, original) for original in case.value):
            return SAME
        if case.path.read_bytes().startswith(b"\x89PNG"):
            raise Fault("a WRONG RESULT: a damaged PNG, whose checksums tell, reads as other pixels")
        return UNNOTICED


class Zips:
    """An archive of five images."""

    name, errors = "zip", (UserError,)

    def __init__(self, folder: Path):
        files = pictures()
        chosen = ("rgb.png", "other.png", "palette.png", "photo.jpg", "lossless.webp")
        self.pixels = [fit_square(decode_rgb(files[name]), SIZE) for name in chosen]
        self.whole = []
        for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w", method) as archive:
                archive.writestr("readme.txt", "five images")
                for i, name in enumerate(chosen):
                    archive.writestr(f"{i:05d}{name[-5:]}", files[name])
            self.whole.append(buffer.getvalue())

    def make(self, folder: Path, rng: random.Random) -> Case:
        case = Case(folder / "set.zip", value=rng.choice((0, 0, 5)))
        whole, other = rng.sample(self.whole, 2)
        how = rng.random()
        if how < 0.5:
            spoilt = damage(whole, other, rng)
        elif how < 0.85:
            spoilt = zip_headers(whole, rng)
        else:
            case.on_purpose = True
            spoilt = rezip(whole, lambda info, data: self.odd_member(info, data, rng), lambda out: self.add(out, rng))
        case.path.write_bytes(spoilt)
        return case

    @staticmethod
    def odd_member(info: zipfile.ZipInfo, data: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.2:
            info.filename = rng.choice(("../x.png", "/x.png", "C:\\x.png", "a/../../x.png", "\x1b[2J\n.png", ".x.png"))
        if rng.random() < 0.1:
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
        if rng.random() < 0.1:
            info.compress_type = rng.choice((zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
        return data

    @staticmethod
    def add(archive: zipfile.ZipFile, rng: random.Random) -> None:
        name = rng.choice(("00001.png", "bomb.png", "x/00009.png", "é\u202e.png"))
        archive.writestr(name, rng.choice((b"", b"no image", bytes(10**6))), rng.choice((0, 8)))

    def read(self, case: Case) -> ImageSet:
        return load_images(str(case.path), SIZE, case.value, quiet=True)

    def judge(self, case: Case, result: ImageSet) -> str:
        for image in result.images:
            if not any(np.array_equal(image, original) for original in self.pixels):
                raise Fault("a WRONG RESULT: an image whose checksum was right is none of the originals")
        if len(result) == len(self.pixels):
            return SAME
        notes = find_source(case.path, SIZE).notes
        with zipfile.ZipFile(case.path) as archive:  # whose list may be damaged: what it no longer has, no one can miss
            listed = sum(map(is_image_name, set(archive.namelist())))
        if not any("Passed over" in note for note in notes) and len(result) + len(result.bad_images) != listed:
            raise Fault("a WRONG RESULT: images are missing, and nothing says so")
        return PART


class Arrays:
    """An npz of images."""

    name, errors = "npz", (UserError,)

    def __init__(self, folder: Path):
        self.images, self.whole = np.random.default_rng(0).integers(0, 256, (6, SIZE, SIZE, 3), dtype=np.uint8), []
        for save in (np.savez, np.savez_compressed):
            buffer = io.BytesIO()
            save(buffer, images=self.images, labels=np.arange(6))
            self.whole.append(buffer.getvalue())

    def make(self, folder: Path, rng: random.Random) -> Case:
        case = Case(folder / "set.npz")
        whole, other = rng.sample(self.whole, 2)
        how = rng.random()
        if how < 0.45:
            spoilt = damage(whole, other, rng)
        elif how < 0.7:
            spoilt = zip_headers(whole, rng)
        else:
            case.on_purpose = True
            spoilt = rezip(whole, lambda info, data: self.odd_array(data, rng))
        case.path.write_bytes(spoilt)
        return case

    @staticmethod
    def odd_array(data: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.4:
            return damage(data, data, rng)
        shape = rng.choice((
            "(10**12, 8, 8, 3)", "(1000000000000, 8, 8, 3)", "(6, 8, 8, -3)", "(-6, 8, 8, 3)", "(6, 100000, 100000, 3)",
            "(6, 4, 16, 3)", "(3, 8, 16, 3)", "(True, 8, 8, 3)", "(6.0, 8, 8, 3)", "((6,), 8, 8, 3)", "(6, 8" * 99,
            "(" * 500, "6", "()", "(0, 8, 8, 3)", "(" + "9" * 5000 + ", 8, 8, 3)", "__import__('os')", "None",
        ))  # fmt: skip
        kind = rng.choice(("|u1", "|u1", "|u1", "|O", "<f8", "|V1", "|u99", "('|u1', 3)", "\\x00"))
        text = f"{{'descr': '{kind}', 'fortran_order': {rng.choice(('False', 'True'))}, 'shape': {shape}, }}\n".encode()
        start = data.index(b"\n") + 1
        version, code = rng.choice(((b"\x01\x00", "<H"), (b"\x02\x00", "<I"), (b"\x03\x00", "<I"), (b"\x09\x00", "<I")))
        return b"\x93NUMPY" + version + struct.pack(code, len(text)) + text + data[start:]

    def read(self, case: Case) -> ImageSet:
        return load_images(str(case.path), SIZE, quiet=True)

    def judge(self, case: Case, result: ImageSet) -> str:
        if np.array_equal(result.images, self.images):
            return SAME
        if case.on_purpose:
            return OTHER
        raise Fault("a WRONG RESULT: other pixels than the original's, with the checksum right")
