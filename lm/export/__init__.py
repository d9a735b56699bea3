"""Export models to transformers, llama.cpp, PEFT and sentence-transformers, and import checkpoints of transformers."""

from lm.export.gguf import export_gguf
from lm.export.huggingface import choose_readout, export_huggingface
from lm.export.image_model import export_image_model
from lm.export.import_huggingface import import_checkpoint
from lm.export.peft_adapter import export_adapter
from lm.export.sentence_transformers import export_sentence_transformers
from lm.export.stock_architectures import stock_class
from lm.export.task_model import export_task_model

__all__ = [
    "choose_readout",
    "export_adapter",
    "export_gguf",
    "export_huggingface",
    "export_image_model",
    "export_sentence_transformers",
    "export_task_model",
    "import_checkpoint",
    "stock_class",
]
