"""Images in an .npz as ADM's evaluator reads it: `arr_0` uint8 [N, H, W, 3], classes as `arr_1` if any, uncompressed.

Written image by image and read by mapping the file, so that 50 000 images of 256 px (10 GB) need no memory.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset


def write_npz(path: Path, images: Iterable[np.ndarray], count: int, labels: list[int] | None = None) -> None:
    """`count` images, uint8 [H, W, 3] each; the file appears when it is whole."""
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        written = 0
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            for image in images:
                if written == 0:
                    shape = image.shape
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
                    np.lib.format.write_array_header_1_0(file, header)
                if image.dtype != np.uint8 or image.shape != shape:
                    raise ValueError(f"images: got {image.dtype} {image.shape}; allowed: uint8 {shape}")
                file.write(np.ascontiguousarray(image).tobytes())
                written += 1
        if written != count:
            raise ValueError(f"images: got {written}; {count} were announced")
        if labels is not None:
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, np.asarray(labels, dtype=np.int64))
    os.replace(part, path)


def save_images(path: Path, data: Any, without: Container[int]) -> str:
    """All of `data` but the ids in `without`, in the order of the ids."""
    ids = [i for i in range(len(data)) if i not in without]
    pixels = (((data.read(i)["pixels"] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for i in ids)
    write_npz(path, pixels, len(ids), None if data.labels is None else [data.labels[i] for i in ids])
    return f"wrote {path}: {len(ids)} images"


class NpzImages(Dataset):
    """The images of such a file, with the face of `Samples`."""

    captions, num_frames = None, 1
    unlisted: list[str] = []  # noqa: RUF012

    def __init__(self, path: Path, image_size: int):
        with zipfile.ZipFile(path) as archive:
            if "arr_0.npy" not in archive.namelist():
                raise ValueError(f"{path} has no arr_0; allowed: images as ADM's evaluator reads them")
            info = archive.getinfo("arr_0.npy")
            self.images = self._map(path, archive, info)
            self.labels = None
            if "arr_1.npy" in archive.namelist():
                with archive.open("arr_1.npy") as file:
                    self.labels = np.lib.format.read_array(file, allow_pickle=False).tolist()
        shape = self.images.shape
        if self.images.dtype != np.uint8 or len(shape) != 4 or shape[1:] != (image_size, image_size, 3):
            raise ValueError(
                f"image_size: got {image_size}; arr_0 of {path} is {self.images.dtype} {list(shape)}. Allowed: uint8 "
                "[N, image_size, image_size, 3]"
            )
        self.names = [f"{path.name}#{i}" for i in range(len(self.images))]
        self.classes = [str(i) for i in range(max(self.labels, default=-1) + 1)] if self.labels else []
        self.image_size = image_size

    @staticmethod
    def _map(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
        if info.compress_type != zipfile.ZIP_STORED:
            with archive.open(info) as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        with path.open("rb") as file:
            file.seek(info.header_offset + 26)  # the lengths of the name and of the extra field, in the local header
            name, extra = np.frombuffer(file.read(4), dtype="<u2").tolist()
            file.seek(info.header_offset + 30 + name + extra)
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, fortran, dtype = read[version](file)
            if fortran or dtype.hasobject:
                raise ValueError(f"{path}: arr_0 is not a plain array in C order")
            return np.memmap(path, dtype=dtype, mode="r", offset=file.tell(), shape=shape)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int, epoch: int = 0) -> dict[str, Any]:
        image = torch.from_numpy(np.array(self.images[index])).permute(2, 0, 1)
        sample: dict[str, Any] = {"pixels": image.float() / 127.5 - 1, "id": index}
        return sample | ({"label": int(self.labels[index])} if self.labels is not None else {})
