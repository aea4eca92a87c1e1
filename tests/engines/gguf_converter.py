"""gguf_converter.py CONVERTER FOLDER OUT.gguf [FOLDER OUT.gguf ...]    llama.cpp's own converter on releases

It dequantizes the experts. Of its tokenizer code, which goes by hashes of published vocabularies, one name is set.
"""

from __future__ import annotations

import sys
from pathlib import Path

converter, *pairs = sys.argv[1:]
sys.path[:0] = [converter, f"{converter}/gguf-py"]

import gguf  # noqa: E402
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class  # noqa: E402
from conversion.base import TextModel  # noqa: E402

TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
TextModel._set_vocab_glm = TextModel._set_vocab_gpt2  # it asks for tokens of GLM's own vocabulary
for folder, out in zip(pairs[::2], pairs[1::2], strict=True):
    settings = ModelBase.load_hparams(Path(folder), False)
    kind = get_model_class(get_model_architecture(settings, ModelType.TEXT))
    kind(Path(folder), gguf.LlamaFileType.MOSTLY_BF16, Path(out)).write()
