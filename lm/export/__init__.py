"""Export models to transformers and llama.cpp, and import checkpoints of transformers."""

from lm.export.gguf import export_gguf
from lm.export.huggingface import choose_readout, export_huggingface
from lm.export.import_huggingface import import_checkpoint
from lm.export.stock_architectures import stock_class

__all__ = ["choose_readout", "export_gguf", "export_huggingface", "import_checkpoint", "stock_class"]
