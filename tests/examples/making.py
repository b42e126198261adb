"""Small files of the real formats, and tiny random networks saved as their libraries save them."""

from __future__ import annotations

import io
import json
import tarfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

CAPTIONS = ("a red cat", "a blue dog", "two birds")


def picture(seed: int, size: tuple[int, int] = (20, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def picture_bytes(seed: int, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, kind)
    return buffer.getvalue()


def image_folder(root: Path, per_class: int = 3, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """png, jpg and webp in turn; sample i shows `picture(i)`."""
    i = 0
    for name in classes:
        (root / name).mkdir(parents=True)
        for _ in range(per_class):
            picture(i).save(root / name / f"{i:02d}.{('png', 'jpg', 'webp')[i % 3]}", lossless=True)
            i += 1
    return root


def captioned_folder(root: Path, count: int = 6) -> Path:
    root.mkdir(parents=True)
    rows = []
    for i in range(count):
        picture(i).save(root / f"{i}.png")
        rows.append({"file": f"{i}.png", "caption": CAPTIONS[i % 3], "class": ("cat", "dog", "bird")[i % 3]})
    (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def tar_shards(root: Path) -> Path:
    """Two shards of two samples, with classes and captions."""
    root.mkdir()
    for shard in range(2):
        with tarfile.open(root / f"train-{shard:04d}.tar", "w") as tar:
            for i in range(2 * shard, 2 * shard + 2):
                parts = {"png": picture_bytes(i), "cls": str(i % 2).encode(), "txt": CAPTIONS[i % 3].encode()}
                for extension, data in parts.items():
                    info = tarfile.TarInfo(f"{i:06d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return root


def hugging_face(root: Path, suffix: str = ".parquet") -> Path:
    """Four samples in row groups of two, with class names in the schema as `datasets` writes them."""
    root.mkdir()
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    table = pa.table(
        {
            "image": [{"bytes": picture_bytes(i), "path": None} for i in range(4)],
            "label": pa.array([0, 1, 0, 1], pa.int64()),
            "text": [CAPTIONS[i % 3] for i in range(4)],
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    if suffix == ".parquet":
        pq.write_table(table, root / "train-00000-of-00001.parquet", row_group_size=2)
    else:
        with (
            pa.OSFile(str(root / "data-00000-of-00001.arrow"), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as s,
        ):
            s.write_table(table)
    return root


def clip(path: Path, frames: int, size: int = 32, codec: str = "libx264") -> Path:
    """Frame k is all of grey level 8·k, so that a decoded frame says which one it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(8))
        stream.width = stream.height = size
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        stream.codec_context.max_b_frames = 2  # shown in another order than decoded
        stream.gop_size = 5  # several key frames, and frames between them
        for k in range(frames):
            grey = np.full((size, size, 3), 8 * k, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, "rgb24")))
        container.mux(stream.encode())
    return path


def video_table(root: Path, count: int = 3, frames: int = 12) -> Path:
    """videos.csv with path and text, and the clips beside it."""
    lines = ["path,text"]
    for i in range(count):
        clip(root / f"{i}.mp4", frames)
        lines.append(f"{i}.mp4,{CAPTIONS[i % 3]}")
    (root / "videos.csv").write_text("\n".join(lines) + "\n")
    return root / "videos.csv"


def tiny_vae(folder: Path) -> Path:
    """AutoencoderKL with 4 channels and factor 2."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.2,
        shift_factor=0.1,
        mid_block_add_attention=False,  # 256 px would take it seconds
    ).save_pretrained(folder)
    return folder


def word_tokenizer(folder: Path, pad: str = "<pad>") -> None:
    """One token per word, an end token at the end, padded with id 0."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "cat", "dog", "two", "birds"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)


def tiny_text_encoder(folder: Path, kind: str) -> Path:
    import transformers

    torch.manual_seed(0)
    small = {"vocab_size": 10, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    if kind == "clip":
        text = {**small, "num_hidden_layers": 1, "max_position_embeddings": 12, "eos_token_id": 1}
        vision = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
        vision |= {"image_size": 16, "patch_size": 8}
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)
        model = transformers.CLIPModel(config)
    elif kind == "t5":
        config = transformers.T5Config(vocab_size=10, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        model = transformers.T5EncoderModel(config)
    else:
        model = transformers.BertModel(
            transformers.BertConfig(**small, num_hidden_layers=1, max_position_embeddings=16)
        )
    model.save_pretrained(folder)
    word_tokenizer(folder)
    return folder
