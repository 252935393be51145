"""Tokenizers as the hub has them: of CogVideoX and LTX-Video a sentencepiece model alone."""

from pathlib import Path

import sentencepiece
from transformers import AutoTokenizer, T5Tokenizer


def test_a_sentencepiece_model_is_enough(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("put the red block on the plate\nopen the drawer\npress the button\n" * 20)
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.train(input=str(tmp_path / "texts.txt"), model_prefix=str(tmp_path / "spiece"),
                                             vocab_size=26, minloglevel=2, **ids)  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 0}')
    for kind in (T5Tokenizer, AutoTokenizer):
        words = kind.from_pretrained(tmp_path)
        ids = words("open the drawer").input_ids
        assert len(ids) > 3 and words.decode(ids, skip_special_tokens=True).strip() == "open the drawer"
