"""Make data: pictures with questions, and tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def scenes(
    out: str,
    task: Literal["vqav2"] = "vqav2",
    split: str = "val2014",
    pictures: int = 1000,
    per_picture: int = 4,
    seed: int = 2,
    image_size: int = 96,
) -> None:
    """Write generated pictures and questions in a task's official files.

    Args:
        out: folder to write; must not exist or be empty.
        task: whose files.
        split: name of the split in the files' names.
        pictures: number of pictures.
        per_picture: questions about each.
        seed: the shipped models were trained with 1; any other gives unseen pictures.
        image_size: side in pixels.
    """
    from pumer.data.scene_files import write_vqav2

    write_vqav2(out, seed=seed, pictures=pictures, per_picture=per_picture, split=split, image_size=image_size)


def tokenizer(out: str, questions: int = 20000, sentences: list[str] | None = None, vocab_size: int = 800) -> None:
    """Train a lower-case WordPiece tokenizer on scene questions and on sentences of your own.

    Args:
        out: folder to write.
        questions: number of scene questions to learn from.
        sentences: Parquet files with a column `sentence` or `caption` to learn from as well.
        vocab_size: at most so many pieces.
    """
    import pyarrow.parquet

    from pumer.data.text import train_tokenizer
    from pumer.tasks.scenes import Scenes

    texts = [example.text for example in Scenes(questions=questions, per_picture=4, image_size=32).examples("train")[:]]
    for path in sentences or []:
        table = pyarrow.parquet.read_table(path)
        column = next((name for name in ("sentence", "caption") if name in table.column_names), None)
        if column is None:
            raise ValueError(f"{path} has no column sentence or caption, only {', '.join(table.column_names)}")
        texts += [text for text in table[column].to_pylist() if text]
    train_tokenizer(texts, vocab_size).save_pretrained(Path(out))
